"""qat report <runs>: one page that says what differs and what came out."""

import json
import math
import pathlib


from qat.run import cli
from qat.run import comparison
from tests.run import test_report


def run(folder, name, accuracy, bits, seed=0, **config):
  """A workdir as a run of qat train leaves it."""
  workdir = folder / name
  workdir.mkdir(parents=True)
  config = dict(seed=seed, data=dict(name='digits', test='test'), objective='classification', log_every_steps=seed,
                recipe=dict(quantizer='lsq', weight_bits=bits, input_bits=bits), **config)
  result = dict(config=config, seed=seed, metrics=dict(accuracy=accuracy, loss=1 - accuracy),
                bits_per_weight=bits + 0.5, size_bytes=1000, wall_seconds=2.5)
  (workdir / 'result.json').write_text(json.dumps(result))
  lines = [dict(step=s, split=split, loss=1 / s, accuracy=accuracy) for s in (1, 2) for split in ('train', 'test')]
  (workdir / 'metrics.jsonl').write_text('\n'.join(map(json.dumps, lines)) + '\n')
  return workdir


def report(capfd, *paths):
  """(exit code, the page, what was said on stderr)."""
  code = cli.main(['report', *map(str, paths)])
  said = capfd.readouterr()
  return code, test_report.Page(pathlib.Path(said.out.strip()).read_text()) if code == 0 else None, said.err


def test_the_page_of_a_sweep(tmp_path, capfd):
  runs = [run(tmp_path, f'bits={b},seed={s}', 0.9 + 0.01 * b, b, s) for b in (2, 4) for s in (0, 1)]
  (tmp_path / 'sweep.csv').touch()
  (tmp_path / 'going').mkdir()
  code, page, _ = report(capfd, *runs, tmp_path / 'sweep.csv', tmp_path / 'going')
  assert code == 0 and (tmp_path / 'report.html').is_file()
  text = ' '.join(page.text)
  for words in ('4 runs', 'bits=2,seed=0', 'recipe.weight_bits', 'seed', 'Not ended: going', 'Learning curves',
                'Accuracy against bits per weight', 'Loss against bits per weight', 'How it was measured'):
    assert words in text, words
  assert 'log_every_steps' not in text and 'recipe.quantizer' not in text  # Free to change; the same in all.
  assert all(link.startswith('data:image/png;base64,') for link in page.links) and page.tags.count('img') == 3


def test_runs_that_were_measured_differently_share_no_axis(tmp_path, capfd):
  one, two = run(tmp_path, 'a', 0.9, 2), run(tmp_path, 'b', 0.8, 2)
  result = json.loads((two / 'result.json').read_text())
  result['config']['data']['test'] = 'test[:64]'
  (two / 'result.json').write_text(json.dumps(result))
  code, page, _ = report(capfd, one, two)
  assert code == 0 and 'were measured differently' in ' '.join(page.text) and page.tags.count('img') == 1


def test_what_differs():
  results = {n: dict(config=dict(a=1, b=dict(c=[1, 2], d=n))) for n in ('x', 'y')}
  assert comparison.differing(results) == {'b.d': ['x', 'y']}
  results['y']['config']['e'] = None
  assert comparison.differing(results)['e'] == ['(absent)', None]


def test_numbers_that_are_not_finite_are_in_the_table(tmp_path, capfd):
  runs = [run(tmp_path, str(b), math.nan, b) for b in (2, 4)]
  code, page, _ = report(capfd, *runs)
  assert code == 0 and page.text.count('nan') >= 2


def test_fewer_than_two_runs(tmp_path, capfd):
  code, _, err = report(capfd, run(tmp_path, 'a', 0.9, 2), tmp_path / 'none')
  assert code == 2 and 'there is nothing to compare' in err
