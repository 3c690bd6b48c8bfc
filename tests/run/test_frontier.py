"""The page that draws many runs: what is on it, that it stands alone, and that it refuses to mix protocols."""

import copy
import json
import math
import pathlib

import pytest

from qat.run import frontier
from tests.run import test_report

ABOUT = dict(base='float32', perplexity='a token, over 2,044 predicted tokens of text: 4 windows of 512')
RUNS = {'rtn_w4': ('rtn', 4, 29.1), 'rtn_w3': ('rtn', 3, 98.1), 'gptq_w4': ('gptq', 4, 24.5),
        'gptq_w3': ('gptq', 3, 31.5)}


def result(method, bits, value, about=ABOUT, **metrics):
  """As `qat ptq` leaves it."""
  recipe = dict(name='float', rules={'blocks/.*': f'w{bits}a16_g64'})
  return dict(config=dict(method=dict(name=method), recipe=recipe), seed=0,
              about=dict(about, calibration=f'by {method}'),
              metrics=dict(perplexity=value, perplexity_error=1.25, float_perplexity=22.27, **metrics),
              bits_per_weight=bits + 0.5)


def save(root, name, content):
  (root / name).mkdir(parents=True, exist_ok=True)
  (root / name / 'result.json').write_text(content if isinstance(content, str) else json.dumps(content))
  return root / name


@pytest.fixture
def workdirs(tmp_path):
  return [save(tmp_path, name, result(*run)) for name, run in RUNS.items()]


def test_the_page_has_every_run_and_asks_for_no_other_file(workdirs, tmp_path):
  path = frontier.write(workdirs, tmp_path / 'new' / 'folder')
  text = path.read_text()
  page = test_report.Page(text)
  assert page.links and all(link.startswith('data:image/png;base64,') for link in page.links)
  assert 'http' not in text and not {'script', 'link', 'iframe'} & set(page.tags)
  words = ' '.join(page.text)
  for word in (*RUNS, 'rtn', 'gptq', 'w4a16_g64', '98.1', '22.27', '1.25', '3.5', ABOUT['perplexity']):
    assert word in words, word
  assert 'by gptq' not in words  # Calibration is no part of the protocol.


def figure_of(points, metric, monkeypatch):
  """The axes that `drawn` makes."""
  kept = []
  monkeypatch.setattr(frontier.plots, 'png', lambda figure: kept.append(figure) or '')
  note = frontier.drawn(points, metric)
  return kept[0].axes[0], note


def points_of(workdirs, metric='perplexity'):
  return [frontier.point(w, frontier.read(w), metric) for w in workdirs]


def test_what_is_drawn(workdirs, tmp_path, monkeypatch):
  workdirs.append(save(tmp_path, 'rtn_again', result('rtn', 3, 102.1)))
  workdirs.append(save(tmp_path, 'rtn_w2', result('rtn', 2, math.inf)))
  axis, note = figure_of(points_of(workdirs), 'perplexity', monkeypatch)
  lines = {line.get_label(): line for line in axis.lines}
  assert sorted(lines['rtn'].get_xydata().tolist()) == [[3.5, 98.1], [3.5, 102.1], [4.5, 29.1]]
  assert [line.get_xydata().tolist() for line in axis.lines if line.get_label().startswith('_')] == [
      [[3.5, 31.5], [4.5, 24.5]], [[3.5, 100.1], [4.5, 29.1]]]  # Through the means.
  assert set(lines['float: 22.27'].get_ydata()) == {22.27}
  assert axis.get_yscale() == 'linear' and 'rtn_w2' in note
  huge = [*workdirs, save(tmp_path, 'w1', result('rtn', 1, 9e5))]
  assert figure_of(points_of(huge), 'perplexity', monkeypatch)[0].get_yscale() == 'log'


def test_the_frontier_is_what_no_smaller_run_beats(workdirs, tmp_path):
  workdirs.append(save(tmp_path, 'worse_w5', result('rtn', 5, 24.9)))
  names = lambda points, metric: [p.name for p in frontier.best(points, metric)]
  assert names(points_of(workdirs), 'perplexity') == ['gptq_w3', 'gptq_w4']
  scores = [save(tmp_path, f's{b}', result('rtn', b, 9.0, accuracy=a)) for b, a in ((2, 0.5), (3, 0.9), (4, 0.8))]
  assert names(points_of(scores, 'accuracy'), 'accuracy') == ['s2', 's3']


def test_training_runs_and_their_float(tmp_path, monkeypatch):
  """As `qat train` leaves them."""
  results = pathlib.Path(__file__).parents[2] / 'docs' / 'results'
  workdirs = [save(tmp_path, path.stem, path.read_text()) for path in sorted(results.glob('shakespeare_*.json'))]
  assert len(workdirs) >= 3
  points = points_of(workdirs, 'bits_per_character')
  axis, _ = figure_of(points, 'bits_per_character', monkeypatch)
  base = next(p.value for p in points if p.method == 'float')
  assert [line.get_ydata()[0] for line in axis.lines if line.get_label().startswith('float')] == [base]
  assert all(x < 9 for line in axis.lines if not line.get_label().startswith('float') for x in line.get_xdata())
  assert 'Bits per character against bits per weight' in frontier.write(
      workdirs, tmp_path, 'bits_per_character').read_text()


def test_a_workdir_without_a_result(workdirs, tmp_path):
  with pytest.raises(ValueError, match=r"empty' has no result.json: its run has not ended"):
    frontier.write([*workdirs, tmp_path / 'empty'], tmp_path)
  with pytest.raises(ValueError, match='is not JSON'):
    frontier.write([*workdirs, save(tmp_path, 'broken', '{"metrics": ')], tmp_path)
  with pytest.raises(ValueError, match='given no workdir'):
    frontier.write([], tmp_path)


def test_a_metric_that_is_not_there(workdirs, tmp_path):
  with pytest.raises(ValueError, match=r"rtn_w4' has no metric 'perplexty'; it has .* Did you mean 'perplexity'"):
    frontier.write(workdirs, tmp_path, 'perplexty')
  bare = {k: v for k, v in result('rtn', 4, 30.0).items() if k != 'bits_per_weight'}
  with pytest.raises(ValueError, match="bare' has no 'bits_per_weight'"):
    frontier.write([save(tmp_path, 'bare', bare)], tmp_path)


def test_protocols_are_not_mixed(workdirs, tmp_path):
  other = dict(ABOUT, perplexity=ABOUT['perplexity'].replace('512', '256'))
  odd = save(tmp_path, 'odd', result('awq', 4, 25.0, about=other))
  with pytest.raises(ValueError, match=r"rtn_w4' and '.*odd' were measured differently.*perplexity: a token, over "
                                       r'.* of 512 there, a token, over .* of 256 here'):
    frontier.write([*workdirs, odd], tmp_path)
  trained = json.loads((pathlib.Path(__file__).parents[2] / 'docs/results/shakespeare_float.json').read_text())
  elsewhere = copy.deepcopy(trained)
  elsewhere['config']['data']['test'] = 'train'
  pair = [save(tmp_path, 'one', trained), save(tmp_path, 'two', elsewhere)]
  with pytest.raises(ValueError, match='test: "test" there, "train" here'):
    frontier.write(pair, tmp_path, 'bits_per_character')


def test_the_command_line(workdirs, tmp_path, capsys):
  assert frontier.main(['--folder', str(tmp_path), *map(str, workdirs)]) == 0
  assert capsys.readouterr().out.strip() == str(tmp_path / 'report.html')
  assert frontier.main(['--folder', str(tmp_path), str(tmp_path / 'none')]) == 2
  assert 'qat frontier: Workdir' in capsys.readouterr().err
