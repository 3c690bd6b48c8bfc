"""Fine-tunes a published network, by adapters beside its codes or floats, and goes on from where it was stopped.

    qat finetune --config configs/<file>.py[:arg] --workdir <dir> [--config.<leaf>=<value>]
    qat finetune --plan --config configs/<file>.py[:arg]

config.pretrained is a published network, the workdir of qat train, or a folder of qat merge: published.py.

Leaves in workdir what qat train does, and adapter/ in PEFT's layout; checkpoints hold adapters and the optimizer's
state, never the base. `--plan` runs nothing, and prints the memory that it would take; --config.pretrained may then be
a name such as llama2_70b too.
"""

import math
import sys
import time

from qat.evals import size
from qat.export import peft
from qat.models.pretrained import families
from qat.nn import explain
from qat.nn import weights
from qat.run import adaptation
from qat.run import checkpoint
from qat.run import classification
from qat.run import config as configs
from qat.run import errors
from qat.run import hosts
from qat.run import memory_plan
from qat.run import mesh
from qat.run import metrics
from qat.run import plots
from qat.run import provenance
from qat.run import published
from qat.run import report
from qat.run import state as states
from qat.run import stop
from qat.run import train
from qat.run import workdirs


def main(argv):
  """The program, from its arguments."""
  if '--plan' in argv:
    config, _ = configs.parse(['--workdir=.', *(a for a in argv if a != '--plan')])
    print(memory_plan.plan(config))
    return
  finetune(*configs.parse(argv))


def finetune(config, workdir):
  """The whole run, from its config to its report."""
  began, origin = time.monotonic(), provenance.provenance()
  # ------------------------------------------------------------------------ where
  configs.check_counts(config)
  devices = mesh.make(config)
  workdir = workdirs.begin(workdir, config)

  # ------------------------------------------------------------------------ texts, base, adapters, optimizer
  run = adaptation.run(config, devices)
  batches = adaptation.batches(run)
  placed = mesh.say(devices.facts(trained=run.state.params, optimizer=run.state.opt_state, base=run.skeleton.base))

  # ------------------------------------------------------------------------ train
  state, seconds_before = begin(run, batches, workdir)
  seconds = lambda: seconds_before + time.monotonic() - began
  with stop.Stop() as heard:
    stopped = hosts.Together(heard)
    state = train.Loop(run, workdir, batches, seconds)(state, stopped)
  if int(state.step) < config.total_steps:
    print(f'{stopped.asked.name}: saved at step {int(state.step)} of {config.total_steps}. '
          'The same command goes on from there.', flush=True)
    return

  # ------------------------------------------------------------------------ evaluate, report
  found = scores(run, run.model(state))
  model = hosts.local_model(run.model(state))
  if not hosts.is_first():
    return
  result = dict(config=configs.plain(config), seed=config.seed, steps=config.total_steps, about=run.about['network'],
                **found, best_step=checkpoint.best_step(workdir, run.objective.score), **facts(run, model),
                wall_seconds=seconds(), peak_memory_bytes=provenance.peak_memory_bytes(), **placed, **origin)
  provenance.save(workdir / 'result.json', result)
  if config.adapter.rules:
    save_adapter(model, config, workdir / 'adapter')
  print(f'{line(result)}\n{write(workdir, result, model)}\n{workdir / "result.json"}', flush=True)


def begin(run, batches, workdir):
  """(state, seconds spent before): of the last checkpoint, to which `batches` are moved; or new, and scored."""
  restored = checkpoint.restore(workdir, run.state)
  if not restored:
    before = run.about['before'] = run.scorer(run.model(run.state))
    print('before  ' + '  '.join(f'{k} {v:.4g}' for k, v in before.items()), flush=True)
    return run.state, 0.0
  state, about = restored
  check_base(run, about, workdir)
  batches.set_state(about['data'])
  run.about['before'] = about['before']
  print(f'Going on from step {int(state.step)} of {run.config.total_steps}.', flush=True)
  return state, about['seconds']


def scores(run, model):
  """The held-out scores before and after, and the perplexity of a language model."""
  before, after = run.about['before'], run.scorer(model)
  found = dict(metrics=after, metrics_before=before)
  if run.config.objective != 'weighted_language':
    return found
  return found | dict(perplexity=math.exp(after['loss']), perplexity_before=math.exp(before['loss']))


def check_base(run, about, workdir):
  """Raises when a checkpoint's adapters were trained beside another base than the one made now."""
  there, made = about['base_sha256'], run.about['base_sha256']
  if there != made:
    raise ValueError(f'--workdir {str(workdir)!r}: its adapters were trained beside a base of SHA-256 '
                     f'{there[:16]}, and the config makes {made[:16]} now. The published file, '
                     'the versions of jax and of this package, and OPENBLAS_NUM_THREADS are part of it: restore them, '
                     'or begin in another --workdir.')


def facts(run, model):
  """What a fine-tuned network takes, and that its base is what it was."""
  after = adaptation.fingerprint(adaptation.fixed(model, run.config))
  before = run.about['base_sha256']
  found = dict(base_sha256=before, base_sha256_after=after, base_unchanged=after == before,
               trained_parameters=sum(x.size for x in run.state.params.values()),
               optimizer_bytes=states.size_bytes(run.state.opt_state))
  if weights.any_codes(model):
    taken = size.measure(model)                                          # Packed: counted from bytes.
    found |= dict(quantized_weights=taken.weights, quantized_bytes=taken.quantized_bytes)
    return found | dict(bits_per_weight=taken.bits_per_weight, size_bytes=explain.explain(model).size_bytes)
  return found | dict(bits_per_weight=32.0, size_bytes=explain.explain(model).size_bytes)


def save_adapter(model, config, folder):
  """Writes the adapter as Hugging Face's PEFT keeps it, if it is one that PEFT has a place for."""
  reader = published.reader(published.located(config.pretrained))
  family = getattr(reader, 'family', families.FAMILIES['llama'])         # GGUF files are read as llama only.
  head = classification.saved(model) if adaptation.HEAD in config else None
  try:
    peft.save(model, folder, family, base=config.pretrained, overwrite=True, head=head)
  except ValueError as error:
    print(f"No adapter in PEFT's layout: {errors.join(error)}", file=sys.stderr)


def line(result):
  """The result in one line."""
  after, before = result['metrics'], result['metrics_before']
  scores = ', '.join(f'{name} {before[name]:.4f} to {after[name]:.4f}' for name in after)
  return f'{scores}; {result["bits_per_weight"]:.4g} bits per weight, {result["trained_parameters"]:,} trained'


def write(workdir, result, model):
  """Writes report.html; returns its path."""
  config = result['config']
  rows = report.numbers(result) + [(f'{name}, before', v) for name, v in result['metrics_before'].items()]
  rows += [(name.replace('_', ' '), result[name]) for name in ('perplexity', 'perplexity_before', 'trained_parameters',
                                                               'base_unchanged', 'base_sha256') if name in result]
  sections = {'Result': report.table(('metric', 'value'), rows),
              'Learning curves': plots.curves(metrics.read(workdir)), **report.layers(model),
              'Provenance': report.provenance(result)}
  title = f'{config["pretrained"]}, {adaptation.grid(config["recipe"])}, fine-tuned: {line(result)}'
  return report.write_page(workdir, title, sections)


if __name__ == '__main__':
  from qat.run import cli
  sys.exit(cli.main(['finetune', *sys.argv[1:]]))
