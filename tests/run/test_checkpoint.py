"""Checkpoints come back whole, or not at all."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from qat.run import checkpoint
from qat.run import state as states


def a_state(seed):
  """A state with an optimizer, a bfloat16 array and a random key."""
  kernel = jax.random.normal(jax.random.key(seed), (3, 4))
  params = {'layers/0/kernel': kernel, 'scale': jnp.ones(3, jnp.bfloat16) * seed}
  rest = {'rngs/key': jax.random.key(seed + 100)}
  state = states.new(params, rest, optax.adam(0.1))
  return dataclasses.replace(state, step=jnp.int32(seed))


def save(workdir, steps, scores=None, keep=2):
  with checkpoint.Checkpoints(workdir, lambda m: m['accuracy'], keep) as checkpoints:
    for i, step in enumerate(steps):
      metrics = dict(accuracy=scores[i]) if scores and scores[i] is not None else None
      checkpoints.save(step, a_state(step), dict(data=dict(position=step), seconds=1.5), metrics)


def numbers(state):
  return [np.asarray(x) for x in checkpoint.to_host(state).values()]


def damage_array(folder):
  """Overwrites the middle of every file of data."""
  for path in (folder / 'state').rglob('d/*'):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xff
    path.write_bytes(content)


def remove_about(folder):
  shutil.rmtree(folder / 'about')


def truncate_about(folder):
  path = folder / 'about' / 'metadata'
  path.write_text(path.read_text()[:20])


def change_checksum(folder):
  """As when the bytes of an array change and the file around them stays whole."""
  path = folder / 'about' / 'metadata'
  about = json.loads(path.read_text())
  about['checksums']['params/scale'] += 1
  path.write_text(json.dumps(about))


def empty(folder):
  shutil.rmtree(folder)
  folder.mkdir()


def test_a_state_comes_back_with_the_same_bytes(tmp_path):
  save(tmp_path, [7])
  state, about = checkpoint.restore(tmp_path, a_state(1))
  for a, b in zip(numbers(state), numbers(a_state(7)), strict=True):
    assert a.dtype == b.dtype and a.tobytes() == b.tobytes()
  assert about['data'] == dict(position=7)
  jax.random.normal(state.rest['rngs/key'])  # It is a key again, and not its numbers.


def test_the_last_ones_and_the_best_stay(tmp_path):
  save(tmp_path, [1, 2, 3, 4, 5, 6], scores=[0.5, 0.9, None, 0.7, None, None])
  assert checkpoint.steps(tmp_path) == [2, 5, 6]
  assert checkpoint.best_step(tmp_path, lambda m: m['accuracy']) == 2


def test_nothing_to_go_on_from(tmp_path):
  assert checkpoint.restore(tmp_path, a_state(1)) is None


@pytest.mark.parametrize('damage', [damage_array, remove_about, truncate_about, change_checksum, empty])
def test_the_one_before_is_used_loudly_when_the_last_is_damaged(tmp_path, capfd, damage):
  save(tmp_path, [2, 4])
  damage(tmp_path / 'checkpoints' / '4')
  state, _ = checkpoint.restore(tmp_path, a_state(1))
  assert int(state.step) == 2
  said = capfd.readouterr().err
  assert 'WARNING: Checkpoint 4 of ' in said
  assert 'going on from the checkpoint of step 2 in place of 4' in said
  assert 'Traceback' not in said
  assert (tmp_path / 'damaged' / '4').is_dir()
  save(tmp_path, [4])  # There is room again for that step.
  assert checkpoint.steps(tmp_path) == [2, 4]


def test_all_damaged(tmp_path):
  save(tmp_path, [2, 4])
  for step in '24':
    damage_array(tmp_path / 'checkpoints' / step)
  with pytest.raises(ValueError, match=r'Every checkpoint of .* is damaged: steps \[2, 4\]'):
    checkpoint.restore(tmp_path, a_state(1))


def test_of_another_model(tmp_path):
  save(tmp_path, [2])
  smaller, larger = (states.new(a_state(1).params, a_state(1).rest, optax.sgd(0.1)) for _ in range(2))
  with pytest.raises(ValueError, match='is of another model: it has .*opt_state.* besides'):
    checkpoint.restore(tmp_path, smaller)
  larger.params['head/kernel'] = jnp.ones((3, 4))
  with pytest.raises(ValueError, match='is of another model: it lacks .*head/kernel'):
    checkpoint.read_part(tmp_path, 2, larger)
  wider = a_state(1)
  wider.params['scale'] = jnp.ones(5, jnp.bfloat16)
  with pytest.raises(ValueError, match=r'params/scale is \(3,\) there and \(5,\) here'):
    checkpoint.restore(tmp_path, wider)
  assert checkpoint.steps(tmp_path) == [2]  # A whole checkpoint is not set aside.
