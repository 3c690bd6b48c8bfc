"""metrics.jsonl after a kill: no line twice, none lost."""

import json

from qat.run import metrics


def steps(workdir):
  return [(line['step'], line['split']) for line in metrics.read(workdir)]


def write(workdir, start, stop):
  with metrics.Metrics(workdir, start) as log:
    for step in range(start + 1, stop + 1):
      log.write(step, 'train', dict(loss=1 / step))
    log.sync()


def test_going_on_drops_what_is_later_and_then_adds_it_once(tmp_path):
  write(tmp_path, 0, 7)
  write(tmp_path, 4, 9)
  assert steps(tmp_path) == [(s, 'train') for s in range(1, 10)]


def test_a_line_cut_by_a_kill_is_dropped(tmp_path):
  write(tmp_path, 0, 3)
  path = tmp_path / 'metrics.jsonl'
  path.write_text(path.read_text()[:-9])
  assert steps(tmp_path) == [(1, 'train'), (2, 'train')]
  write(tmp_path, 2, 4)
  assert steps(tmp_path) == [(s, 'train') for s in (1, 2, 3, 4)]


def test_lines_are_json_and_tensorboard_is_beside_them(tmp_path):
  write(tmp_path, 0, 1)
  assert json.loads((tmp_path / 'metrics.jsonl').read_text()) == dict(step=1, split='train', loss=1.0)
  assert list((tmp_path / 'tensorboard').glob('events*'))


def test_a_file_is_replaced_whole(tmp_path):
  path = tmp_path / 'a.json'
  metrics.write(path, 'one')
  metrics.write(path, 'two')
  assert path.read_text() == 'two'
  assert list(tmp_path.iterdir()) == [path]
