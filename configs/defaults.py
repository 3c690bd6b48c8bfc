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
  config.calibrate_batches = 4

  config.objective = 'classification'
  config.optimizer = mlc.ConfigDict(dict(
      name='adamw', learning_rate=1e-3, weight_decay=1e-4, options={}, state_bits=32, groups=(),
      quantizer_rate_scale=1.0, clip_norm=1.0, accumulate_steps=1))
  config.schedule = mlc.ConfigDict(dict(name='cosine_decay_schedule', warmup_steps=0))
  config.total_steps = 1000

  config.eval = mlc.ConfigDict(dict(batch_size=500, every_steps=200))
  config.log_every_steps = 10
  config.log_every_seconds = 10
  config.checkpoint_every_steps = 200
  config.keep_checkpoints = 2
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
  config.method = mlc.ConfigDict()
  config.eval = mlc.ConfigDict()
  config.log_every_seconds = 10
  return config


# The options of each method of qat/ptq/methods.py, so that --config.method.<option> can change them.
METHODS = dict(
    rtn=dict(rule='midrange'), gptq=dict(rule='hessian', damp=0.01, act_order=True),
    quantease=dict(rule='hessian', damp=0.01, rounds=2, sweeps=2), ldlq=dict(rule='hessian', damp=0.01), hqq=dict(),
    awq=dict(rule='midrange'),
    adaround=dict(steps=1000, batch_size=8, rate=1e-2, start=''), autoround=dict(steps=200, batch_size=8, start=''))


def method(name):
  """A method by its name, with its options."""
  return mlc.ConfigDict(dict(METHODS.get(name, {}), name=name))


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
