"""The benchmarks of kernels run, refuse what is wrong, and their page shows what was recorded."""

import json
import pathlib
import sys

import jax
import pytest

from benchmarks import autotune, cpu_decode, kernel_peers, kernels, kernels_page, products


@pytest.fixture
def two_copies(monkeypatch):
  """Of each weight, which is all that a test needs."""
  monkeypatch.setattr(products, 'CACHE_BYTES', 0)


def test_products_are_timed_and_what_was_not_says_why(tmp_path, monkeypatch, two_copies):
  monkeypatch.setattr(kernel_peers, 'PEERS', {})
  lines = kernels.main(['--shapes', '128x128', '--rows', '2', '--rounds', '2', '--out', str(tmp_path / 'k.json')])
  found = json.loads((tmp_path / 'k.json').read_text())
  assert found['products'] == lines and found['roofline']['bytes_per_second'] > 0
  timed = {line['name']: line for line in lines if 'microseconds' in line}
  assert {'bfloat16', 'int4 g128, XLA', 'NF4 g64, XLA', 'W8A8, XLA', 'FP8, XLA'} <= set(timed)
  assert timed['bfloat16']['over_bfloat16'] == 1 and all(line['microseconds'] > 0 for line in timed.values())
  assert all(line['not_timed'] for line in lines if line['name'] not in timed)


def test_a_wrong_product_is_not_timed():
  x = products.inputs(2, 128)
  ws = products.weights(128, 128, products.WEIGHTS['int8'])[:2]
  wrong = lambda x, w: 2 * kernels.matmul_xla.best(x, w)
  right, refused = products.checked(
      {'wrong': products.Timed(wrong, x, ws), 'right': products.Timed(kernels.matmul_xla.best, x, ws)})
  assert set(right) == {'right'} and right['right']() > 0 and 'error' in refused['wrong']


def test_a_peer_that_is_not_installed_says_so(monkeypatch):
  for package in kernel_peers.PACKAGES:
    monkeypatch.setitem(sys.modules, package, None)
  found, refused = kernel_peers.candidates(2, 128, 128)
  assert not found and list(refused) == list(kernel_peers.PEERS)
  assert all("pip install '.[peers]'" in why for why in refused.values())


def test_a_peer_that_raises_or_is_wrong_says_so(monkeypatch, two_copies):
  def fails(*shape):
    raise RuntimeError(f'no kernel for {shape}\nand more')

  def wrong(rows, k, n):
    return products.Timed(lambda x, w: 2 * (x @ w), products.inputs(rows, k), products.weights(k, n, None))
  monkeypatch.setattr(kernel_peers, 'PEERS', {'torch a': fails, 'torch b': wrong})
  found, refused = kernel_peers.candidates(2, 128, 128)
  assert not found and refused['torch a'] == 'RuntimeError: no kernel for (2, 128, 128)'
  assert 'error' in refused['torch b']


# Of [256, 128]: codes and scales, with a zero in PyTorch's int4 and the table in bitsandbytes'.
BYTES = {'torch bfloat16': 2 * 2**15, 'torch int4 g128': 2**14 + 2 * 128 * 4, 'torch W8A8': 2**15 + 128 * 4,
         'tokamax int4 g128': 2**14 + 2 * 128 * 2, 'tokamax int8': 2**15 + 128 * 2,
         'bitsandbytes NF4 g64': 2**14 + 4 * 128 * 4 + 16 * 4}


@pytest.mark.peers
@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('name', kernel_peers.PEERS)
def test_peers_give_what_the_definition_gives(name, monkeypatch, two_copies):
  """On the CPU, where each has a form of its own."""
  pytest.importorskip(name.split()[0])
  named = [name] if 'tokamax' in name else ['torch bfloat16', name]
  monkeypatch.setattr(kernel_peers, 'PEERS', {key: kernel_peers.PEERS[key] for key in named})
  found, refused = kernel_peers.candidates(4, 256, 128)
  assert not refused and set(found) == set(named) and found[name]() > 0
  assert found[name].weight_bytes() == BYTES[name]


@pytest.mark.peers
@pytest.mark.filterwarnings('ignore')
def test_ours_are_timed_over_peers(monkeypatch, two_copies):
  pytest.importorskip('torch')
  monkeypatch.setattr(products, 'WEIGHTS', {})
  monkeypatch.setattr(products, 'CODES', {})
  monkeypatch.setattr(kernel_peers, 'PEERS', {'torch bfloat16': kernel_peers.PEERS['torch bfloat16']})
  lines = {line['name']: line for line in kernels.measure(2, 128, 128, 3, dict(bytes_per_second=1, flops_per_second=1))}
  assert lines['torch bfloat16']['over_bfloat16'] == 1 and lines['bfloat16']['over_peers']['torch'] > 0


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


def test_the_page_shows_peers_and_what_was_not_timed(tmp_path, monkeypatch):
  timed = dict(name='int4 g128', rows=1, k=8, n=8, microseconds=2, over_bfloat16=3, over_peers={'torch': 1.5},
               share_of_bandwidth=0.5, share_of_compute=0)
  refused = [dict(name='torch W8A8', rows=rows, k=8, n=8, not_timed='more than 16 rows') for rows in (1, 8)]
  (tmp_path / 'kernels_a.json').write_text(json.dumps(dict(device='A', jax='1', products=[timed, *refused])))
  monkeypatch.setattr(kernels_page, 'RESULTS', tmp_path)
  page = kernels_page.timed_tables()
  assert '| int4 g128 | 1 | 8 x 8 | 2.0 | 3.00 | torch 1.50 | 50 % | 0 % |' in page
  assert '| torch W8A8 | 1, 8 | more than 16 rows |' in page


def test_the_table_of_tokens_has_what_its_benchmark_times():
  found = json.loads((kernels_page.RESULTS / 'cpu_decode.json').read_text())
  forms = [cpu_decode.FLOAT, *(f'{name}, {form}' for name in cpu_decode.RECIPES for form in ('prepared', 'as it is'))]
  assert [row['model'] for row in found['rows']] == forms


def test_every_case_has_a_budget():
  for path in (kernels_page.TPU, kernels_page.GPU):
    assert isinstance(path, pathlib.Path) and json.loads(path.read_text())
