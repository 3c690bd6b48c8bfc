"""Timed tiles are found by what they were timed for, and by nothing else."""

import jax
import jax.numpy as jnp

from qat.core import qarray, specs
from qat.kernels import matmul, matmul_tpu, tuned


def weight(k=256, n=128, spec=None):
  return matmul.prepare(qarray.encode(jnp.ones((k, n)), spec or specs.integer(4, (128, 1))), 'tpu')


def test_a_row_serves_its_bucket_of_rows_its_shape_and_its_device(tmp_path):
  x, p = jnp.ones((9, 256), jnp.bfloat16), weight()
  tiles = dict(rows=16, outputs=128, inputs=256)
  tuned.store(tuned.key(x, p) | dict(tiles=tiles, microseconds=1.0), 'TPU v6 lite', tmp_path)
  find = lambda x, p, device='TPU v6 lite': tuned.find(x, p, matmul_tpu.Tiles, device, tmp_path)
  assert find(x, p) == find(x[:1].repeat(16, 0), p) == matmul_tpu.Tiles(**tiles)
  assert find(x[:8], p) is None and find(x.astype(jnp.float32), p) is None
  assert find(x, p, 'TPU v5 lite') is None and find(x, weight(spec=specs.integer(4, (64, 1)))) is None
  assert (tmp_path / 'tpu_v6_lite.json').is_file()


def test_a_new_row_takes_the_place_of_the_old(tmp_path):
  x, p = jnp.ones((9, 256), jnp.bfloat16), weight()
  for outputs in (128, 256):
    row = tuned.key(x, p) | dict(tiles=dict(rows=16, outputs=outputs, inputs=256))
    tuned.store(row, 'TPU v6 lite', tmp_path)
  assert tuned.find(x, p, matmul_tpu.Tiles, 'TPU v6 lite', tmp_path).outputs == 256


def test_tiles_are_given_to_the_kernel_that_they_were_timed_for(tmp_path, monkeypatch):
  x, p = jnp.ones((9, 256), jnp.bfloat16), weight()
  tiles = dict(rows=16, outputs=128, inputs=256)
  tuned.store(tuned.key(x, p) | dict(tiles=tiles), jax.devices()[0].device_kind, tmp_path)
  monkeypatch.setattr(tuned.find, '__defaults__', (None, tmp_path))
  grid = str(jax.make_jaxpr(lambda x: matmul.matmul(x, p, implementation=matmul.Kernel('tpu', interpret=True)))(x))
  assert 'grid=(1, 1, 1)' in grid


def test_candidates_fit():
  p = jax.eval_shape(lambda: weight(4096, 4096))
  for rows in (1, 16, 512):
    found = matmul_tpu.candidates(rows, p)
    assert len(found) == len(set(found)) > 3
    assert all(4096 % t.inputs == 0 and t.inputs % 1024 == 0 for t in found)
