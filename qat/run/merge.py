"""Merges the adapters that `qat finetune` has trained into the network, and says what that costs.

    qat merge --workdir <dir> [--into float|grid|zeros] [--method rtn gptq ...] [--sequences 16]

    float    W + s A B in floats, where the adapters were
    grid     the same on the grid of the base, by methods of qat/ptq/named.py, one after another, each with its own
             options there; errors are measured on the inputs of the adapted layers, over training sequences
    zeros    QA-LoRA's: the codes of the base stay, and their zeros move

Prints the held-out loss and perplexity before and after, and the KL divergence between the two. Leaves in
<dir>/merged/<name>: config.json, result.json, and model.safetensors under Hugging Face's names, or checkpoints/ where
there are codes: these and floats by their paths, codes of less than a byte in a byte each. The folder is read as a
published network: qat/run/merged.py says by what.
"""

import argparse
import json
import math
import pathlib
import shutil
import sys
import time

import jax.numpy as jnp
import numpy as np
import rich.box
import rich.console
import rich.table

from qat.core import qarray
from qat.core import ranges
from qat.evals import size
from qat.export import bitsandbytes
from qat.models import decoder
from qat.models.pretrained import families
from qat.nn import explain
from qat.nn import lora
from qat.nn import weights
from qat.ptq import merge as rounding
from qat.ptq import methods
from qat.ptq import named
from qat.ptq import solvers
from qat.run import adaptation
from qat.run import checkpoint
from qat.run import config as configs
from qat.run import finetune
from qat.run import merged as networks
from qat.run import metrics
from qat.run import progress
from qat.run import provenance
from qat.run import published

INTO = ('float', 'grid', 'zeros')


def main(argv):
  """The program, from its arguments."""
  parser = argparse.ArgumentParser(prog='qat merge', description=__doc__.splitlines()[0])
  parser.add_argument('--workdir', required=True, type=pathlib.Path, help='of a finished qat finetune')
  parser.add_argument('--into', choices=INTO, default='float')
  parser.add_argument('--method', nargs='+', default=['gptq'], help='of qat/ptq/named.py, for --into grid')
  parser.add_argument('--sequences', type=int, default=16, help='of the training texts, for --into grid')
  args = parser.parse_args(argv)
  if args.into != 'grid' and args.method != ['gptq']:
    raise ValueError(f'--method {args.method} --into {args.into}: only the grid is reached by a method. '
                     'Leave one of the two out.')
  run, model = trained(args.workdir)
  if args.into != 'float' and not weights.any_codes(model):
    raise ValueError(f'--into {args.into}: the adapters of --workdir {str(args.workdir)!r} are beside floats, '
                     'which are on no grid. Use --into float.')
  for name in args.method if args.into == 'grid' else [args.into]:
    began = time.monotonic()
    merged = to_grid(run, model, name, args.sequences) if args.into == 'grid' else networks.FORMS[args.into](model)
    found = dict(into=args.into, method=name, config=configs.plain(run.config), seed=run.config.seed,
                 **compare(run, model, merged), wall_seconds=time.monotonic() - began, **provenance.provenance())
    folder = args.workdir / 'merged' / (name if args.into != 'grid' else f'grid_{name}')
    leave(merged, run.config, found, folder)
    rich.console.Console().print(printed(found))
    print(folder / 'result.json', flush=True)


def trained(workdir):
  """(the Run of a workdir, its network with the adapters of the last checkpoint)."""
  config = configs.load(workdir)
  if networks.is_merged(workdir):
    raise ValueError(f'--workdir {str(workdir)!r} is merged already. Give the run that it was merged from, '
                     f'{str(workdir.parents[1])!r}, or fine-tune this one further and merge that run.')
  if 'adapter' not in config or not config.adapter.rules:
    raise ValueError(f'--workdir {str(workdir)!r} is of a run without adapters: there is nothing to merge. Give one of '
                     'qat finetune.')
  if adaptation.HEAD in config:
    raise ValueError(f'--workdir {str(workdir)!r} is of a classifier: decoders are merged here. Its adapters and head '
                     'are in adapter/.')
  with config.unlocked():
    config.remat = ''                                                    # Nothing is trained here.
  step = max(checkpoint.steps(workdir), default=None)
  if step is None:
    raise ValueError(f'--workdir {str(workdir)!r} has no checkpoint. Train there first: qat finetune.')
  run = adaptation.run(config)
  finetune.check_base(run, checkpoint.about(workdir, step), workdir)
  arrays, _ = checkpoint.read_part(workdir, step, dict(params=run.state.params, rest=run.state.rest))
  model = run.skeleton.join(**arrays)
  model.eval()
  return run, model


def to_grid(run, model, name, sequences):
  """The network on the grid of its base, by a method of named.py on so many training sequences."""
  size_, rows = run.config.eval.batch_size, min(sequences, len(run.train))
  if rows < 1:
    raise ValueError(f'--sequences {sequences}: errors are measured on at least one. Give more.')
  chosen = np.random.default_rng(run.config.seed).permutation(len(run.train))[:max(rows // size_, 1) * size_]
  batches = [jnp.asarray(run.train.take(chosen[i:i + size_])['tokens']) for i in range(0, len(chosen), size_)]
  rule = range_rule(model)
  method = methods.Layerwise(solvers.Nearest(rule)) if name == 'rtn' else named.named(name)
  with progress.bar(model.config.layers, 0, run.config.log_every_seconds) as bar:
    merged, _ = rounding.reround(model, batches, method, rule, watch=lambda done: bar.update(done, {}))
  return merged


def range_rule(model):
  """The range rule under which the base was rounded: that of scales with a minimum is `centered`, as in NF4_DQ."""
  specs = [site.variable.get_value().spec for site in lora.sites(model) if isinstance(site.variable, weights.Codes)]
  centered = any(isinstance(s.scale, qarray.Spec) and s.scale.zero is not None for s in specs)
  return ranges.centered if centered else ranges.absmax


def compare(run, model, merged):
  """The scores of both, and the KL divergence from the first to the second."""
  before, after = run.scorer(model), run.scorer(merged)
  bits = size.measure(merged).bits_per_weight if weights.any_codes(merged) else 32.0
  return dict(metrics=dict(after, perplexity=math.exp(after['loss']), mean_kl=run.scorer.mean_kl(model, merged)),
              metrics_before=dict(before, perplexity=math.exp(before['loss'])), bits_per_weight=bits,
              size_bytes=explain.explain(merged).size_bytes)


def leave(model, config, found, folder):
  """Writes a network without adapters and its result, in place of what an earlier merge left."""
  config = config.copy_and_resolve_references()
  with config.unlocked():
    config.merged = dict(into=found['into'], method=found['method'])
  reader = published.reader(published.located(config.pretrained))
  coded = weights.any_codes(model)
  if coded:
    networks.check(model, reader, config)
  about = folder / 'config.json'                                         # Makes it a network: removed first, put last.
  about.unlink(missing_ok=True)
  (folder / networks.WEIGHTS).unlink(missing_ok=True)
  shutil.rmtree(checkpoint.folder(folder), ignore_errors=True)
  folder.mkdir(parents=True, exist_ok=True)
  if coded:
    networks.write(model, folder)
  else:                                                                  # Queries and keys in Hugging Face's order.
    family = getattr(reader, 'family', families.FAMILIES['llama'])
    bitsandbytes.save(decoder.halved(model), folder / networks.WEIGHTS, family)
  provenance.save(folder / 'result.json', found)
  metrics.write(about, json.dumps(configs.plain(config), indent=2) + '\n')


def printed(found):
  """The table for a terminal."""
  c = found['config']
  title = f'{c["pretrained"]}, {adaptation.grid(c["recipe"])}, merged into {found["into"]} by {found["method"]}'
  table = rich.table.Table(title=title, box=rich.box.SIMPLE_HEAD, pad_edge=False)
  for i, head in enumerate(('', 'with adapters', 'merged')):
    table.add_column(head, justify='right' if i else 'left')
  for name, value in found['metrics'].items():
    before = found['metrics_before'].get(name)
    table.add_row(name.replace('_', ' '), '' if before is None else f'{before:.4f}', f'{value:.4g}')
  table.add_row('bits a weight', '', f'{found["bits_per_weight"]:.3f}')
  return table


if __name__ == '__main__':
  from qat.run import cli
  sys.exit(cli.main(['merge', *sys.argv[1:]]))
