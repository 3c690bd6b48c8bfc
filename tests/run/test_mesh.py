"""Training on 8 simulated devices is training on one.

A number that lies within the rounding of a sum to a boundary of its grid gets another code on a mesh: then losses
differ by what a code does. Steps are few, so that here none does.
"""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from qat.run import mesh
from tests.run import mesh_config

ROOT = pathlib.Path(__file__).parents[2]
# The second keeps XLA from ending a process whose simulated devices wait for a busy CPU.
FLAGS = '--xla_force_host_platform_device_count={} --xla_cpu_collective_call_terminate_timeout_seconds=600'
MESHES = '', 'data=4,model=2', 'fsdp=8'
ARGS = ['recipe=w8a8', 'recipe=w4a16_g64,width=64', 'model=mlp,recipe=lsq']


def run(*argv, devices=8):
  """What tests/run/mesh_program.py prints at the end, as JSON."""
  env = dict(os.environ, JAX_PLATFORMS='cpu', XLA_FLAGS=FLAGS.format(devices))
  done = subprocess.run([sys.executable, '-m', 'tests.run.mesh_program', *map(str, argv)], cwd=ROOT, env=env,
                        capture_output=True, text=True, timeout=400)
  assert done.returncode == 0, done.stdout + done.stderr
  return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope='module')
def found():
  """{arg: what `losses` says of it}, all of one process: to begin one takes longer than the steps."""
  return run('all_losses', json.dumps(ARGS), 3, *MESHES)


@pytest.mark.parametrize('arg', ARGS)
def test_losses_are_those_of_one_device(arg, found):
  one, tensor, fsdp = found[arg]
  assert len(set(one['losses'])) == 3
  for other in tensor, fsdp:
    assert other['losses'] == pytest.approx(one['losses'], rel=0, abs=1e-5)
    assert other['kept']                                                 # A step leaves everything where it was.
  assert one['facts'] == {}
  for facts, most in ((tensor['facts'], 0.7), (fsdp['facts'], 0.3)):
    for part in ('parameters', 'optimizer'):
      taken = facts['mesh'][part]
      assert taken['bytes'] / 8 <= taken['bytes_per_device'] <= max(most * taken['bytes'], 100), part


def test_a_tied_head_stays_shared_out():
  assert run('tied_head') == []


def test_a_run_goes_on_on_another_mesh(tmp_path):
  config = f'{mesh_config.__file__}:model=mlp,recipe=lsq'
  results = run('programs', tmp_path / 'a', config, '', 'data=4,model=2', 'fsdp=8', '')
  first, *others = results
  assert 'mesh' not in first and others[-1].get('mesh') is None
  assert others[1]['mesh']['axes'] == dict(data=1, fsdp=8, sequence=1, model=1)
  for other in others:
    assert [line['step'] for line in other['lines']] == [line['step'] for line in first['lines']]
    for a, b in zip(first['lines'], other['lines']):
      assert b['loss'] == pytest.approx(a['loss'], abs=1e-5)
    assert other['frozen_equals_trained']
  assert others[-1]['lines'] == first['lines']                           # One device, from its own first two steps.


@pytest.mark.parametrize('settings, words', [
    (dict(data=4), ['data 4 x fsdp 1 x sequence 1 x model 1', 'is of 4 devices: there are 1', 'leave them all at 1']),
    (dict(model=0), ['--config.mesh.model=0', '1 or more']),
])
def test_a_mesh_of_other_devices_is_refused(settings, words):
  config = mesh_config.get_config()
  config.mesh.update(settings)
  with pytest.raises(ValueError) as error:
    mesh.make(config)
  assert all(word in str(error.value) for word in words), error.value


def test_one_device_places_nothing():
  assert mesh.make(mesh_config.get_config()) is mesh.ONE
