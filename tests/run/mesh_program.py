"""What the tests of meshes run on 8 simulated devices, in a process of its own: a function, its arguments, JSON out."""

import json
import pathlib
import re
import shutil
import sys

from flax import nnx
import jax
import numpy as np

import qat
from qat.run import build
from qat.run import cli
from qat.run import config as configs
from qat.run import data
from qat.run import mesh
from qat.run import metrics
from qat.run import state as states

CONFIG = 'tests/run/mesh_config.py'


def losses(arg, steps, *settings):
  """[(losses, facts)] of the first steps under each of the settings, such as 'data=4,model=2'."""
  found = []
  for setting in settings:
    config = configs.build(f'{CONFIG}:{arg}')
    config.mesh.update({k: int(v) for k, v in (pair.split('=') for pair in setting.split(',') if pair)})
    devices, b = mesh.make(config), config.data.batch_size
    run = build.run(config, devices)
    facts = devices.facts(parameters=run.state.params, optimizer=run.state.opt_state)
    splits = {path: str(x.sharding.spec) for path, x in run.state.params.items() if setting}
    step = states.train_step(run.skeleton, run.objective, run.tx, after=devices.after(run.state, None))
    batches, state, values = data.batches(run.train, b, config.seed, rows=devices.rows(b)), run.state, []
    for _ in range(int(steps)):
      state, value = step(state, devices.put(next(batches), b))
      values.append(float(value['loss']))
    kept = all(x.sharding == y.sharding for x, y in zip(*map(jax.tree.leaves, (state, begin(config, devices)))))
    found.append(dict(losses=values, facts=facts, splits=splits, kept=kept))
  return found


def all_losses(args, *rest):
  """{arg: losses(arg, *rest)} of a list, in JSON."""
  return {arg: losses(arg, *rest) for arg in json.loads(args)}


def tied_head():
  """What devices hand each other in the product by a tied head whose vocabulary they share: names of instructions."""
  devices = jax.make_mesh((8,), ('model',), axis_types=(jax.sharding.AxisType.Auto,))
  model = qat.quantize(nnx.Dict(embed=nnx.Embed(800, 64, rngs=nnx.Rngs(0))), qat.recipes.get('w4a16'))
  rows = jax.sharding.NamedSharding(devices, jax.sharding.PartitionSpec('model'))
  model.embed.embedding[...] = jax.device_put(model.embed.embedding.get_value(), rows)
  program = jax.jit(lambda state, x: nnx.merge(graph, state).embed.attend(x))
  graph, state = nnx.split(model)
  text = program.lower(state, jax.numpy.ones((1, 16, 64))).compile().as_text()
  return sorted(set(re.findall(r'all-[a-z]+|collective-[a-z]+', text)))


def begin(config, devices):
  return build.run(config, devices).state


def programs(folder, config, *settings):
  """[result.json, with the lines of metrics.jsonl] of a run that goes on from step 2 on each mesh after the first."""
  workdir, found = pathlib.Path(folder), []
  for setting in settings:
    flags = [f'--config.mesh.{pair}' for pair in setting.split(',') if pair]
    shutil.rmtree(workdir / 'checkpoints' / '4', ignore_errors=True)
    assert cli.main(['train', f'--config={config}', f'--workdir={workdir}', *flags]) == 0
    lines = [{k: v for k, v in line.items() if k != 'seconds'} for line in metrics.read(workdir)]
    found.append(json.loads((workdir / 'result.json').read_text()) | dict(lines=lines))
  return found


def each(program, folder, config, *settings):
  """[result.json, with the lines of metrics.jsonl], of a run of its own on each mesh."""
  found = []
  for k, setting in enumerate(settings):
    workdir = pathlib.Path(folder) / str(k)
    flags = [f'--config.mesh.{pair}' for pair in setting.split(',') if pair]
    assert cli.main([program, f'--config={config}', f'--workdir={workdir}', *flags]) == 0
    found.append(json.loads((workdir / 'result.json').read_text()) | dict(lines=metrics.read(workdir)))
  return found


def solved(folder, arg, *settings):
  """`each` of qat ptq, of a float run that is trained first."""
  floats = pathlib.Path(folder) / 'floats'
  train = 'tests/run/tiny.py:steps=60'
  assert cli.main(['train', f'--config={train}', f'--workdir={floats}', '--config.checkpoint_every_steps=60']) == 0
  return each('ptq', folder, f'configs/ptq.py:workdir={floats},{arg}', *settings)


if __name__ == '__main__':
  np.testing.assert_equal(jax.device_count(), 8)
  print(json.dumps(globals()[sys.argv[1]](*sys.argv[2:])), flush=True)
