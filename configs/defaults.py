"""What every config has, and the reading of `:arg`. Data only: no config imports qat."""

import difflib

import ml_collections as mlc

TRUE, FALSE = ('true', '1', ''), ('false', '0')


def parse_arg(arg, **defaults):
  """The settings in 'quantizer=lsq,bits=2,smoke', over `defaults` of the same types.

  >>> parse_arg('bits=4,smoke', quantizer='lsq', bits=2, smoke=False).to_dict()
  {'quantizer': 'lsq', 'bits': 4, 'smoke': True}
  """
  settings = mlc.ConfigDict(defaults)
  for item in filter(None, arg.split(',')):
    name, _, value = item.partition('=')
    if name not in defaults:
      near = difflib.get_close_matches(name, defaults, n=1)
      hint = f'Did you mean {near[0]!r}?' if near else f'Choose among {", ".join(defaults)}.'
      raise ValueError(f'Config argument {item!r}: there is no {name!r}. {hint}')
    settings[name] = _as(type(defaults[name]), name, value)
  return settings


def _as(kind, name, value):
  """`value` as a bool, int, float or str."""
  if kind is bool:
    if value.lower() not in TRUE + FALSE:
      raise ValueError(f'Config argument {name}={value!r}: it is a switch. Write {name}, or {name}=false.')
    return value.lower() in TRUE
  try:
    return kind(value)
  except ValueError as error:
    raise ValueError(
        f'Config argument {name}={value!r} is no {kind.__name__}. Write {name}=<{kind.__name__}>.') from error


def mesh(config):
  """Adds the leaves of many devices: all at 1 and empty are one device, and the rules that docs/meshes.md shows."""
  config.mesh = mlc.ConfigDict(dict(data=1, fsdp=1, sequence=1, model=1))  # Their product: how many devices there are.
  config.sharding = ()             # (regex over paths of parameters, axes of the mesh), first match wins.
  config.activation_sharding = ()  # (regex over paths of modules, likewise), of what they return.


def base():
  """The leaves that all configs share, in the order of their sections."""
  config = mlc.ConfigDict()
  config.seed = 0

  config.data = mlc.ConfigDict(dict(
      name='', train='train', test='test', batch_size=64, options={}, train_options={}))
  config.data.data_dir = mlc.config_dict.placeholder(str)

  config.model = mlc.ConfigDict(dict(name='', dtype='float32'))
  config.init_from = ''  # The workdir of a finished float run.

  config.recipe = mlc.ConfigDict()  # Empty: stay in floats.
  config.compute = 'low_bit'  # Products of codes where the device has them; 'float': of the decoded numbers.
  config.calibrate_batches = 4

  config.objective = 'classification'
  config.optimizer = mlc.ConfigDict(dict(
      name='adamw', learning_rate=1e-3, weight_decay=1e-4, options={}, state_bits=32, groups=(),
      quantizer_rate_scale=1.0, clip_norm=1.0, accumulate_steps=1, weight_decay_until=1.0))
  config.schedule = mlc.ConfigDict(dict(name='cosine_decay_schedule', warmup_steps=0))
  config.total_steps = 1000

  config.eval = mlc.ConfigDict(dict(batch_size=500, every_steps=200))
  config.trackers = ()  # Beside TensorBoard: 'wandb', 'mlflow'.
  config.log_every_steps = 10
  config.log_every_seconds = 10
  config.checkpoint_every_steps = 200
  config.keep_checkpoints = 2
  mesh(config)
  return config


def ptq(task, pretrained):
  """The leaves that all configs of `qat ptq` share, in the order of their sections."""
  config = mlc.ConfigDict()
  config.seed = 0
  config.task = task  # Of qat/run/tasks.py; it says what calibration and eval hold.
  config.pretrained = pretrained  # A name of qat/run/published.py, or a path.
  config.dtype = 'float32'
  config.calibration = mlc.ConfigDict()
  config.transforms = ()  # Of qat/run/transforms.py, in order: (dict(name='smooth', alpha=0.5),).
  config.recipe = mlc.ConfigDict()
  # Bits to search first: (recipe names) for each layer that the recipe quantizes, so many bits of storage a weight in
  # all, by costs of qat/ptq/sensitivity.py: fisher, hessian, kl or output. No candidates: no search.
  config.search = mlc.ConfigDict(dict(candidates=(), bits_per_weight=3.5, sensitivity='fisher'))
  config.method = mlc.ConfigDict()
  config.eval = mlc.ConfigDict()
  config.log_every_seconds = 10
  mesh(config)
  return config


def finetune(pretrained):
  """The leaves that all configs of `qat finetune` share, in the order of their sections."""
  config = mlc.ConfigDict()
  config.seed = 0
  config.pretrained = pretrained  # A name of qat/run/published.py, or a path.
  config.tokenizer = ''  # A tokenizer.json, if not the one beside the weights.
  config.dtype = 'float32'

  config.data = mlc.ConfigDict(dict(
      name='', options={}, length=512, packing='stream', separator='<|endoftext|>', batch_size=1))
  config.recipe = mlc.ConfigDict()  # Empty: the base stays in floats.
  config.adapter = mlc.ConfigDict(dict(
      rules=(r'blocks/.*',), rank=16, alpha=16.0, scaling='by_rank', dropout=0.0, init='gaussian', options={},
      dora=False, group=1))
  config.remat = ''  # Paths of modules that run again in the backward pass: r'blocks/\d+'.

  config.objective = 'weighted_language'
  config.optimizer = mlc.ConfigDict(dict(  # QLoRA's: a constant rate, its beta2, its norm.
      name='adamw', learning_rate=2e-4, weight_decay=0.0, options=dict(b2=0.999), state_bits=32, memory='device',
      groups=(), quantizer_rate_scale=1.0, clip_norm=0.3, accumulate_steps=1))
  config.schedule = mlc.ConfigDict(dict(name='constant_schedule', warmup_steps=0))
  config.total_steps = 100

  config.eval = mlc.ConfigDict(dict(length=512, sequences=4, batch_size=1, every_steps=50))
  config.trackers = ()  # Beside TensorBoard: 'wandb', 'mlflow'.
  config.log_every_steps = 10
  config.log_every_seconds = 10
  config.checkpoint_every_steps = 50
  config.keep_checkpoints = 2
  mesh(config)
  return config


# The options of each method of qat/ptq/named.py, so that --config.method.<option> can change them.
_HESSIAN = dict(rule='hessian', damp=0.01, act_order=True, sequential=False)
_ROUNDING = dict(steps=1000, batch_size=8, rate=1e-2, regularization=0.01, rule='search', start='')
METHODS = dict(
    rtn=dict(rule='midrange'), gptq=dict(_HESSIAN), ldlq=dict(_HESSIAN), quip=dict(_HESSIAN), qronos=dict(_HESSIAN),
    quantease=dict(rule='hessian', damp=0.01, rounds=2, sweeps=2, sequential=False),
    hqq=dict(p=0.7, beta=10.0, kappa=1.01, iterations=20, rule='absmax'), awq=dict(rule='midrange', sequential=False),
    adaround=dict(_ROUNDING), brecq=dict(_ROUNDING), qdrop=dict(_ROUNDING, step_rate=4e-5, probability=0.5),
    flexround=dict(steps=1000, batch_size=8, rate=3e-3, rule='search'),
    autoround=dict(steps=200, batch_size=8, reach=0.5, rule='absmax', start=''),
    omniquant=dict(steps=500, batch_size=4, rate=1e-2, rule='absmax'),
    efficientqat=dict(steps=1000, batch_size=2, rate=1e-4, weight_rate=1e-5, rule='absmax'),
    tesseraq=dict(steps=1000, batch_size=4, rate=1e-2, rounds=20, rule='search', start=''))
# What a method needs done to the network first (qat/run/transforms.py).
TRANSFORMS = dict(quip=(dict(name='incoherence', seed=0),))


def transforms(method, *more):
  """The transforms that a method needs, and then those named."""
  return (*TRANSFORMS.get(method, ()), *(dict(name=name) for name in filter(None, more)))


def method(name, smoke=False):
  """A method by its name, with its options; `smoke` leaves 2 steps to those that learn."""
  options = METHODS.get(name, {})
  return mlc.ConfigDict(options | dict(name=name) | (dict(steps=2) if smoke and 'steps' in options else {}))


def bits(quantizer, bits):
  """The recipe of a quantizer with as many bits for weights as for inputs."""
  return mlc.ConfigDict(dict(quantizer=quantizer, weight_bits=bits, input_bits=bits))


def smoke(config):
  """Cuts a config down to a run of seconds, for the tests."""
  config.total_steps = 2
  config.schedule.warmup_steps = min(config.schedule.warmup_steps, 1)
  config.data.batch_size = 8
  config.data.test = config.data.test + '[:64]'
  config.calibrate_batches = 1
  config.eval.update(batch_size=32, every_steps=2)
  config.log_every_steps = 1
  config.checkpoint_every_steps = 1
