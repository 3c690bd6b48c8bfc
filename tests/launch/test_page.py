"""The parts of sweep.html, on results that are made up."""

import itertools
import json
import math

import pytest

from launch import job as values
from launch import page
from launch import study as studies


def run(folder, accuracy, width, **settings):
  """A run that has ended so."""
  workdir = folder / '-'.join(f'{k}{v}' for k, v in settings.items())
  workdir.mkdir()
  result = dict(metrics=dict(accuracy=accuracy), bits_per_weight=width)
  (workdir / 'result.json').write_text(json.dumps(result))
  job = values.Job(('qat', 'train'), str(workdir), 'result.json')
  return studies.Run({k: str(v) for k, v in settings.items()}, job, '0', {}, values.Status.FINISHED)


def scored(runs):
  return [(r, r.value('accuracy')) for r in runs]


def test_the_front_is_what_nothing_beats():
  """Against all pairs."""
  points = [(2, 0.7), (2, 0.8), (3, 0.75), (3, 0.8), (4, 0.9), (5, 0.89), (8, 0.95), (8, 0.95)]
  expected = [p for p in dict.fromkeys(points) if not any(
      (b <= p[0] and v >= p[1]) and (b, v) != p for b, v in points)]
  assert page.front(points, rising=True) == expected == [(2, 0.8), (4, 0.9), (8, 0.95)]
  falling = [(b, 1 - v) for b, v in points]
  assert page.front(falling, rising=False) == [(2, pytest.approx(0.2)), (4, pytest.approx(0.1)),
                                               (8, pytest.approx(0.05))]


def test_seeds_are_repeats_of_one_setting(tmp_path):
  runs = [run(tmp_path, 0.9 + 0.01 * s, 2.5, bits=2, seed=s) for s in range(3)]
  runs.append(run(tmp_path, 0.1, 4.5, bits=4, seed=0))
  rows = page.groups(scored(runs))
  assert [len(row) for row in rows.values()] == [3, 1]
  assert page.mean(rows[(('bits', '2'),)]) == (pytest.approx(0.91), pytest.approx(0.01))
  assert 'bits 2: accuracy 0.91 ± 0.01 over 3 runs' in page.best(scored(runs), 'accuracy')


def test_importance_goes_to_what_matters(tmp_path):
  runs = [run(tmp_path, 0.1 * b + 0.001 * s, b, bits=b, seed=s) for b, s in itertools.product((2, 3, 4, 8), range(4))]
  found = page.importances(scored(runs))
  assert found['bits'] > 0.9 and sum(found.values()) == pytest.approx(1)


def test_axes():
  assert page.place(['2', '4', '3'])[0] == [0.0, 1.0, 0.5]
  assert page.place(['1e-4', '1e-1', '1e-2'])[0] == pytest.approx([0, 1, 2 / 3])
  assert page.place(['lsq', 'pact', 'lsq'])[0] == [0.0, 1.0, 0.0]
  assert page.place(['3', '3'])[0] == [0.5, 0.5]
  assert page.place(['-1', '1'])[0] == [0, 1]


@pytest.mark.parametrize('make', [
    lambda folder: [], lambda folder: [run(folder, 0.5, 2.5, bits=2)],
    lambda folder: [run(folder, math.nan, 2.5, bits=b) for b in (2, 3)],
    lambda folder: [run(folder, 0.5, None, bits=b) for b in range(5)],
    lambda folder: [run(folder, 0.5, 2.5, method=m) for m in ('a', 'b<c')]])
def test_a_page_of_little(tmp_path, make):
  runs = make(tmp_path)
  text = page.write(tmp_path, runs, 'accuracy', 'the <command>', '1/1').read_text()
  assert '&lt;command&gt;' in text and 'b<c' not in text


def test_runs_that_failed_tell_why(tmp_path):
  failed = run(tmp_path, 0.5, 2.5, bits=2)
  failed.job.log.write_text('working\nValueError: <no> such data\n')
  failed.status, failed.code = values.Status.FAILED, 2
  assert 'failed: exit code 2. ValueError: &lt;no&gt; such data' in page.table([failed], 'accuracy')
