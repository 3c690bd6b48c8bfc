"""Tiles fit, fill the processors, and cover every shape."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from qat.core import qarray, specs
from qat.kernels import matmul_gpu, tiles_gpu


def prepared(spec, k, n):
  return jax.eval_shape(lambda w: matmul_gpu.prepare(qarray.encode(w, spec)), jax.ShapeDtypeStruct((k, n), jnp.float32))


INT4, NVFP4 = specs.integer(4, (128, 1)), specs.kernel(specs.NVFP4)


@pytest.mark.parametrize('spec', [INT4, NVFP4, specs.kernel(specs.NF4), specs.integer(8, (None, 1))], ids=str)
@pytest.mark.parametrize('k, n', [(128, 128), (4096, 4096), (4096, 14336), (8192, 28672), (14336, 4096), (11008, 4096)])
def test_the_heuristic_always_fits(k, n, spec):
  p = prepared(spec, k, n)
  for m in (1, 7, 16, 33, 64, 65, 200, 256):
    tiles = tiles_gpu.heuristic(m, p)
    assert tiles_gpu.unfit(p, tiles) is None, tiles
    blocks = -(-m // tiles.rows) * (n // tiles.width) * tiles.splits
    assert blocks >= 0.75 * tiles_gpu.PROCESSORS or k < 1024, tiles


def test_few_rows_take_wide_tiles_and_splits():
  p = prepared(INT4, 4096, 4096)
  assert tiles_gpu.heuristic(16, p) == tiles_gpu.Tiles(16, 128, 128, stages=4, splits=8)
  assert tiles_gpu.heuristic(5, p).rows == 8
  assert tiles_gpu.heuristic(16, prepared(INT4, 8192, 28672)).splits == 2


def test_scales_multiply_products_up_to_64_rows():
  p = prepared(INT4, 4096, 4096)
  assert tiles_gpu.after(p, tiles_gpu.heuristic(64, p)) and not tiles_gpu.after(p, tiles_gpu.heuristic(65, p))
  p = prepared(NVFP4, 4096, 4096)                                        # 8 groups a step: too many sums for registers.
  assert tiles_gpu.after(p, tiles_gpu.heuristic(16, p)) and not tiles_gpu.after(p, tiles_gpu.heuristic(64, p))


def test_candidates_fit_and_differ():
  p = prepared(INT4, 4096, 4096)
  for m in (1, 16, 64, 128):
    found = tiles_gpu.candidates(m, p)
    assert found[0] == tiles_gpu.heuristic(m, p) and len(found) == len(set(found)) > 8
    assert not [t for t in found if tiles_gpu.unfit(p, t)]


def test_what_does_not_fit_says_why():
  p, tiles = prepared(INT4, 4096, 4096), tiles_gpu.Tiles(16, 128)
  unfit = lambda **changes: tiles_gpu.unfit(p, dataclasses.replace(tiles, **changes))
  assert unfit() is None
  assert 'shared memory' in unfit(stages=16)
  assert 'registers' in unfit(depth=512, stages=2)
  assert 'multiples of 8' in unfit(rows=20) and 'multiples of 8' in unfit(stages=0)
  assert 'do not tile' in unfit(splits=3)
  assert 'fewer steps than stages' in unfit(splits=16)
  p = prepared(specs.integer(4, (384, 1)), 384, 128)
  assert 'cross the edges' in tiles_gpu.unfit(prepared(specs.integer(4, (384, 1)), 768, 128), tiles_gpu.Tiles(
      16, depth=256, stages=1))
