"""The live table, and the lines where there is no terminal."""

import io

import rich.console

from launch import job as values
from launch import study as studies
from launch import table

Status = values.Status


def runs(folder, *statuses):
  made = []
  for i, status in enumerate(statuses):
    workdir = folder / str(i)
    workdir.mkdir(exist_ok=True)
    (workdir / 'metrics.jsonl').write_text('{"step": 5, "split": "test", "accuracy": 0.5}\n{"step": 6, "spl')
    made.append(studies.Run({':bits': '2', 'seed': str(i)}, values.Job(('a',), str(workdir)), '0',
                            dict(total_steps=10), status))
  return made


class Plan:
  def __init__(self, runs):
    self.runs, self.total = runs, len(runs)


def drawn(runs, width=100, **options):
  console = rich.console.Console(file=io.StringIO(), width=width)
  console.print(table.draw(runs, 'accuracy', 'title', **options))
  return console.file.getvalue()


def test_rows_say_how_runs_stand(tmp_path):
  text = drawn(runs(tmp_path, Status.FINISHED, Status.RUNNING, Status.WAITING))
  rows = [line.split() for line in text.splitlines() if 'running' in line]
  assert len(rows) == 1 and '50%' in rows[0] and '0.5' in rows[0]


def test_a_low_terminal_shows_what_matters(tmp_path):
  text = drawn(runs(tmp_path, *[Status.WAITING] * 20, Status.RUNNING, Status.FAILED), height=12)
  assert 'running' in text and 'failed' in text and '18 more rows' in text


def test_no_terminal_gets_lines(tmp_path, capfd):
  shown = table.Table('title', 'accuracy')
  with shown:
    shown.say('[bits] is no markup')
    shown.update(Plan(runs(tmp_path, Status.FINISHED, Status.RUNNING, Status.FAILED)), now=True)
  assert capfd.readouterr().out.splitlines() == ['[bits] is no markup',
                                                 '1/3 finished, 1 running, 1 failed, -:-- left']


def test_a_terminal_gets_a_table(tmp_path):
  console = rich.console.Console(file=io.StringIO(), force_terminal=True, width=100, height=40)
  with table.Table('title', 'accuracy', console) as shown:
    shown.update(Plan(runs(tmp_path, Status.FINISHED, Status.RUNNING)), now=True)
  text = console.file.getvalue()
  assert 'title: 1/2 finished' in text and 'accuracy' in text


def test_time_left():
  assert table.eta(60, 0, 5) == '-:--'
  assert table.eta(3600, 1, 2.5) == '2:30:00'
