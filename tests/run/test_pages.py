"""Pages of experiments: what page.py may declare, what is run, and that tables are those of the result files."""

import dataclasses
import json
import pathlib

import numpy as np
import pytest

from qat.run import cli
from qat.run import pages
from qat.run import papers
from qat.run import reproduce

ROOT = pathlib.Path(__file__).parents[2]
PAGE = '''
PAPER = dict(name='Tiny', title='Tiny networks', link='https://example.org', setting='Large')
SEEDS = (0, 1, 2)
METRICS = (dict(name='accuracy', label='accuracy, %', factor=100, digits=1), dict(name='mean_kl', label='KL', digits=3))
RUNS = {
    'float': dict(row='float', program='train', config='TINY:steps=30', set={'optimizer.learning_rate': 0.02}),
    'w1': dict(row='W1', program='ptq', config='PTQ:workdir={float},method=rtn,recipe=w1a16', paper='12.3'),
    'w4': dict(row='W4', program='ptq', config='PTQ:workdir={float},method=rtn,recipe=w4a16')}
CLAIMS = [dict(says='4 bits beat 1', difference=('w4', 'w1'), within=(0, None), paper='+80'),
          dict(says='1 bit loses twice as much', ratio=('w1', 'w4'), within=(2, None)),
          dict(says='by KL as well', ratio=('w1', 'w4'), metric='mean_kl', within=(6, None))]
'''.replace('TINY', f'{ROOT}/tests/run/tiny.py').replace('PTQ', f'{ROOT}/configs/ptq.py')
README = f'# Tiny\n\nProse.\n\n{pages.BEGIN}\n{pages.END}\n\nMore prose.\n'
ACCURACY = dict(float=(0.9, 0.92, 0.94), w1=(0.5, 0.62, 0.44), w4=(0.88, 0.91, 0.9))


def folder(tmp_path, source=PAGE):
  """experiments/tiny with a page and no result."""
  path = tmp_path / 'experiments' / 'tiny'
  path.mkdir(parents=True)
  (path / 'page.py').write_text(source)
  for readme in (path / 'README.md', path.parent / 'README.md'):
    readme.write_text(README)
  return path


def result(command, accuracy, floats):
  metrics = dict(accuracy=accuracy)
  if command.program == 'ptq':
    metrics |= dict(float_accuracy=floats, mean_kl=1 - accuracy)
  return papers.kept(dict(seed=command.seed, metrics=metrics, bits_per_weight=4.25, wall_seconds=30.0, walk_seconds=1.0,
                          config=dict(pretrained='/somewhere/train_1'), device=dict(kind='cpu', count=1),
                          peak_memory_bytes=10**9), command, '/somewhere')


@pytest.fixture
def filled(tmp_path):
  """A page with invented results."""
  page = papers.load(folder(tmp_path))
  for command in page.commands():
    page.store(command, result(command, ACCURACY[command.run][command.seed], ACCURACY['float'][command.seed]))
  return page


def test_commands_are_what_a_person_types(tmp_path):
  page = papers.load(folder(tmp_path))
  floats, w1 = page.command('float', 2), page.command('w1', 2)
  assert str(floats) == (f'qat train --config {ROOT}/tests/run/tiny.py:steps=30 --workdir {floats.workdir()} '
                         '--config.optimizer.learning_rate=0.02 --config.seed=2')
  assert f'workdir={floats.workdir()},' in str(w1) and floats.workdir().startswith('runs/train_')
  assert w1.arguments('/here')[2].count('/here/train_') == 1


def test_equal_commands_share_a_workdir_and_no_others(tmp_path):
  page = papers.load(folder(tmp_path))
  renamed = dataclasses.replace(page.command('w1', 0), run='another', needs={'float': page.command('float', 0)})
  assert renamed.workdir() == page.command('w1', 0).workdir()
  assert len({command.workdir() for command in page.commands()}) == len(page.commands()) == 9
  slower = papers.load(folder(tmp_path / 'b', PAGE.replace('0.02', '0.03')))
  assert slower.command('w1', 0).workdir() != page.command('w1', 0).workdir()   # Its float network is another.


def test_a_merge_is_beside_what_it_merges(tmp_path):
  lora = "'lora': dict(row='LoRA', program='finetune', config='LORA:workdir={float}'),"
  merge = "'merged': dict(row='merged', program='merge', config='{lora}', set={'into': 'grid', 'method': 'rtn'})}"
  source = PAGE.replace('recipe=w4a16\')}', f"recipe=w4a16'),\n    {lora}\n    {merge}")
  command = papers.load(folder(tmp_path, source)).command('merged', 1)
  tuned = command.needs['lora']
  assert str(command) == f'qat merge --workdir {tuned.workdir()} --into=grid --method=rtn'
  assert command.workdir('/here') == f'{tuned.workdir("/here")}/merged/grid_rtn' and tuned.seed == 1
  with pytest.raises(ValueError, match='the flags of qat merge'):
    papers.load(folder(tmp_path / 'b', source.replace("'into'", "'inot'")))


def test_result_files_hold_no_path_of_the_machine_and_go_by_their_command(filled):
  text = filled.path('w4').read_text()
  assert '/somewhere' not in text and '"runs/train_1"' in text and 'peak_memory' not in text
  assert [r['seed'] for r in json.loads(text)] == [0, 1, 2]
  (filled.folder / 'page.py').write_text(PAGE.replace('steps=30', 'steps=31'))
  assert len(papers.load(filled.folder).missing()) == 9                          # All are of another command now.


def test_a_result_is_replaced_and_stays_in_order(filled):
  command = filled.command('w4', 1)
  filled.store(command, result(command, 0.123, 0.5))
  assert [r['metrics']['accuracy'] for r in filled.results()['w4']] == [0.88, 0.123, 0.9]


def test_tables(filled):
  text = pages.body(filled)
  w4, w1, floats = (100 * np.array(ACCURACY[run]) for run in ('w4', 'w1', 'float'))
  assert f'| W1 | 4.25 | {w1.mean():.1f} ± {w1.std(ddof=1):.1f} | {(w1 - floats).mean():+.1f} ± ' in text
  assert '| float | 4.25 | 92.0 ± 2.0 |  |  | 30 |  |' in text
  kl = 1 - np.array(ACCURACY['w4'])
  assert f' | {kl.mean():.3f} ± {kl.std(ddof=1):.3f} | 30 |  |' in text
  assert f'| by KL as well | {np.exp(np.log((1 - w1 / 100) / kl).mean()):.2f} times [' in text
  gap = w4 - w1
  assert f'| 4 bits beat 1 | {gap.mean():+.1f} [' in text and '| ≥ 0 | +80 | **holds** |' in text
  ratio = np.exp(np.log((floats - w1) / (floats - w4)).mean())
  assert f'| 1 bit loses twice as much | {ratio:.2f} times [' in text
  assert '9 runs, 4 minutes' in text and 'qat reproduce tiny' in text and str(filled.commands()[0]) in text


def test_a_run_may_name_the_one_it_is_compared_to(tmp_path):
  """Runs of qat finetune: their metrics before the first step, and what the optimizer takes, are metrics as well."""
  source = '''
PAPER = dict(name='T', title='T', link='https://example.org', setting='L')
SEEDS = (0, 1, 2)
METRICS = (dict(name='loss', label='loss', digits=2), dict(name='start_loss', label='before', digits=2),
           dict(name='optimizer_mib', label='MiB', digits=2))
RUNS = {'lora': dict(row='LoRA', program='finetune', config='TINY:base=float'),
        'nf4': dict(row='NF4', program='finetune', config='TINY:base=nf4', float='lora')}
CLAIMS = [dict(says='it loses little', ratio=('nf4', 'nf4'), metric='start_loss', within=(0, 2))]
'''.replace('TINY', f'{ROOT}/tests/run/tiny_finetune.py')
  page = papers.load(folder(tmp_path, source))
  loss = dict(lora=(2.0, 2.1, 2.2), nf4=(2.25, 2.35, 2.45))
  for command in page.commands():
    of = loss[command.run][command.seed]
    found = dict(seed=command.seed, metrics=dict(loss=of), metrics_before=dict(loss=2 * of), optimizer_bytes=3 * 2**20,
                 bits_per_weight=4.0, wall_seconds=1.0, device=dict(kind='cpu', count=1))
    page.store(command, papers.kept(found, command, '/somewhere'))
  assert page.results()['nf4'][1]['metrics'] == dict(
      loss=2.35, start_loss=4.7, optimizer_mib=3.0, float_loss=2.1, float_start_loss=4.2, float_optimizer_mib=3.0)
  text = pages.body(page)
  assert '| NF4 | 4.00 | 2.35 ± 0.10 | +0.25 ± 0.00 | 4.70 ± 0.20 | +0.50 ± 0.00 | 3.00 ± 0.00 |' in text
  assert '| LoRA | 4.00 | 2.10 ± 0.10 |  | 4.20 ± 0.20 |  | 3.00' in text
  (page.folder / 'page.py').write_text(source.replace("float='lora'", "float='lara'"))
  with pytest.raises(ValueError, match="reads .'lara'"):
    papers.load(page.folder)


def test_the_index_has_a_line_a_claim(filled):
  lines = pages.index(filled.folder.parent).splitlines()
  assert lines[2].startswith('| [Tiny](tiny/README.md) | 4 bits beat 1 |') and lines[3].startswith('|  | 1 bit')
  filled.path('w4').unlink()
  assert 'not run to the end yet' in pages.index(filled.folder.parent)


def test_report_writes_between_the_marks_and_only_there(filled, capfd):
  assert cli.main(['report', str(filled.folder)]) == 0
  for path in (filled.folder / 'README.md', filled.folder.parent / 'README.md'):
    text = path.read_text()
    assert text.startswith('# Tiny\n\nProse.') and text.endswith('More prose.\n') and '4 bits beat 1' in text
    before = text
  assert cli.main(['report', str(filled.folder)]) == 0 and before == text      # Twice is once.
  pages.check(filled.folder / 'README.md', pages.body(filled))


@pytest.mark.parametrize('old, new', [('| +', '| -'), ('**holds**', '**fails**'), ('| W1 |', '| W9 |')])
def test_a_planted_number_is_found(filled, old, new):
  pages.main(filled.folder)
  readme = filled.folder / 'README.md'
  assert old in readme.read_text()
  readme.write_text(readme.read_text().replace(old, new, 1))
  with pytest.raises(ValueError, match='the result files say'):
    pages.check(readme, pages.body(filled))


def test_a_changed_result_file_is_found(filled):
  pages.main(filled.folder)
  filled.path('w4').write_text(filled.path('w4').read_text().replace('0.88', '0.87'))
  with pytest.raises(ValueError, match='Run: qat report'):
    pages.check(filled.folder / 'README.md', pages.body(papers.load(filled.folder)))


@pytest.mark.parametrize('old, new, message', [
    ("row='float'", "rwo='float'", "'rwo', which means nothing. Did you mean 'row'"),
    ("row='W4', ", '', "lacks ['row']"), (", setting='Large'", '', "PAPER lacks ['setting']"),
    ('digits=1', 'digit=1', "Did you mean 'digits'"), ("metric='mean_kl'", "metric='men_kl'", "Did you mean 'mean_kl'"),
    ("program='train'", "program='trian'", "Did you mean 'train'"),
    ('{float}', '{floats}', "reads ['floats'], and the runs before it are ['float']"),
    ("('w4', 'w1')", "('w4', 'w11')", "Did you mean 'w1'"),
    ("difference=('w4', 'w1'), ", '', 'neither difference nor ratio')])
def test_a_page_that_means_nothing(tmp_path, capfd, old, new, message):
  assert old in PAGE
  path = folder(tmp_path, PAGE.replace(old, new))
  assert cli.main(['report', str(path)]) == 2
  said = capfd.readouterr().err
  assert message in said and len(said.strip().splitlines()) == 1


def test_wrong_folders_marks_and_missing_results(tmp_path, capfd):
  path = folder(tmp_path)
  assert cli.main(['report', str(path)]) == 2
  assert 'of its 9 runs 9 have no result' in capfd.readouterr().err
  assert cli.main(['report', str(path.parent / 'tinny')]) == 2
  assert "Did you mean 'tiny'" in capfd.readouterr().err
  with pytest.raises(ValueError, match='no place for its tables'):
    pages.replaced(path / 'page.py', 'text')


def test_reproduce_runs_what_is_missing_and_writes_the_page(tmp_path, capfd):
  path, scratch = folder(tmp_path, PAGE.replace('(0, 1, 2)', '(0, 1)')), tmp_path / 'scratch'
  again = ['reproduce', 'tiny', '--scratch', str(scratch), '--experiments', str(path.parent)]
  assert cli.main(again) == 0
  assert '6 of 6 runs to do' in capfd.readouterr().out
  page = papers.load(path)
  assert page.missing() == [] and str(scratch) not in ''.join(page.path(run).read_text() for run in page.runs)
  pages.check(path / 'README.md', pages.body(page))
  assert len(list(scratch.iterdir())) == 6                                      # One float network a seed.
  before = {run: page.path(run).read_text() for run in page.runs}
  kept = json.loads(before['w1'])
  page.path('w1').write_text(json.dumps(kept[:1]))
  assert cli.main(again) == 0 and '1 of 6 runs to do' in capfd.readouterr().out
  assert {run: page.path(run).read_text() for run in page.runs} == before      # From what was left in scratch.


def test_reproduce_says_which_run_stopped(tmp_path):
  page = papers.load(folder(tmp_path))
  (tmp_path / 'scratch').mkdir()
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(cli, 'run', lambda *argv: None)  # As a run does that SIGTERM reached: it saves, and returns.
    with pytest.raises(ValueError, match='was stopped before its end'):
      reproduce.fill(page, tmp_path / 'scratch')
  assert len(page.missing()) == 9
