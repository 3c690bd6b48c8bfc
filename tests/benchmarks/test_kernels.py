"""The benchmarks of kernels run, refuse what is wrong, and their page shows what was recorded."""

import json
import pathlib

import jax
import jax.numpy as jnp
import pytest

from benchmarks import autotune, kernels, kernels_page


def test_products_are_timed_and_what_was_not_says_why(tmp_path):
  lines = kernels.main(['--shapes', '128x128', '--rows', '2', '--rounds', '2', '--out', str(tmp_path / 'k.json')])
  found = json.loads((tmp_path / 'k.json').read_text())
  assert found['products'] == lines and found['roofline']['bytes_per_second'] > 0
  timed = {line['name']: line for line in lines if 'microseconds' in line}
  assert {'bfloat16', 'int4 g128, XLA', 'NF4 g64, XLA', 'W8A8, XLA', 'FP8, XLA'} <= set(timed)
  assert timed['bfloat16']['over_bfloat16'] == 1 and all(line['microseconds'] > 0 for line in timed.values())
  assert all(line['not_timed'] for line in lines if line['name'] not in timed)


def test_a_wrong_product_is_not_timed():
  x = jnp.ones((2, 128), jnp.bfloat16)
  ws = kernels.weights(128, 128, kernels.WEIGHTS['int8'])
  wrong = lambda x, w: 2 * kernels.matmul_xla.best(x, w)
  right, refused = kernels.checked({'wrong': (wrong, x, ws), 'right': (kernels.matmul_xla.best, x, ws)})
  assert set(right) == {'right'} and 'error' in refused['wrong']


def test_large_shapes_want_a_device():
  with pytest.raises(SystemExit, match='Run it on one'):
    kernels.main([])
  with pytest.raises(SystemExit, match='--static v6e'):
    autotune.main([])


def test_candidates_are_named_for_the_compiler():
  tiles = autotune.candidates('tpu', 'int4g128', 16, 4096, 4096)[1]
  name = f'int4g128_tpu_16_4096_4096_{tiles.rows}_{tiles.outputs}_{tiles.inputs}'
  product, (x, w) = getattr(autotune, name)()
  assert x.shape == (16, 4096) and w.shape == (4096, 4096)
  assert f"grid=(1, {4096 // tiles.outputs}, {4096 // tiles.inputs})" in str(jax.make_jaxpr(product)(x, w))
  report = autotune.static_tpu.Report(bundles=10)
  assert autotune.cost('tpu', tiles, report, 4096, 4096, 16) == 10 * (4096 // tiles.outputs) * (4096 // tiles.inputs)


def test_the_page_shows_what_was_recorded():
  text = kernels_page.PAGE.read_text()
  assert kernels_page.written(text) == text, 'Run: python -m benchmarks.kernels_page'
  changed = text.replace('| `float_16` | ', '| `float_16` | 1')
  assert changed != text and kernels_page.written(changed) == text


def test_every_case_has_a_budget():
  for path in (kernels_page.TPU, kernels_page.GPU):
    assert isinstance(path, pathlib.Path) and json.loads(path.read_text())
