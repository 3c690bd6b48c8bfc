"""What a page of experiments/ declares in its page.py: the runs of a paper, and the claims about them.

    PAPER = dict(name='AdaRound', title='Up or Down? ...', link='https://...', setting='ResNet-18 on ImageNet, %')
    SEEDS = (0, 1, 2)
    METRICS = (dict(name='accuracy', label='accuracy, %', factor=100, digits=2),)
    RUNS = {
        'float': dict(row='float', program='train', config='configs/digits.py:quantizer=float', set={'seed': 1}),
        'w2': dict(row='W2, nearest', program='ptq', config='configs/ptq.py:workdir={float},method=rtn,recipe=w2a16')}
    CLAIMS = [dict(says='...', difference=('w2', 'float'), within=(-1, None))]

`{float}` is the workdir of that run under the same seed. A run of qat ptq is measured beside its float network; one of
another program may name the run that it is compared to, as `float='float'`. The metrics of qat finetune before its
first step are `start_<metric>`, and what an optimizer's state takes is `optimizer_mib`. A run of qat merge has as its
`config` the run of qat finetune that it merges, '{lora}', and as `set` its flags, {'into': 'grid', 'method': 'rtn'}. A
claim has a `difference` (of a metric) or a `ratio` (of a metric's changes from the float network), what it must be
within, and may name another `metric` than the first. Runs and claims may have a `paper`: what the paper reports. A
page.py is data and imports nothing of qat.
"""

import dataclasses
import functools
import hashlib
import json
import pathlib
import runpy
import shlex
import string
import sys

from qat.run import metrics as files
from qat.run import names

PROGRAMS = ('train', 'ptq', 'finetune', 'merge')
MERGE_FLAGS = ('into', 'method', 'sequences')  # `qat merge` reads the config of the run that it merges.
PAPER_KEYS = dict(name=True, title=True, link=True, setting=True)  # Key -> whether it must be there.
METRIC_KEYS = dict(name=True, label=True, digits=True, factor=False)
SCRATCH = 'runs'  # Where commands are printed to work, and what stands in result files for wherever they did.
RUN_KEYS = dict(row=True, program=True, config=True, set=False, paper=False, float=False)
CLAIM_KEYS = dict(says=True, within=True, difference=False, ratio=False, metric=False, paper=False)
# What a result file keeps of a run's result.json.
KEPT = ('config', 'seed', 'about', 'steps', 'metrics', 'bits_per_weight', 'size_bytes', 'quantized_bytes', 'fallbacks',
        'trained_parameters', 'optimizer_bytes', 'base_unchanged', 'walk_seconds', 'wall_seconds', 'commit', 'versions',
        'device')


@dataclasses.dataclass(frozen=True)
class Command:
  """A run under a seed.

  Attributes:
    run, seed: which.
    program, config, overrides: what `qat` is called with; `config` has {name} for the workdir of each of `needs`.
    needs: {name: Command}, the runs that it reads.
  """
  run: str
  seed: int
  program: str
  config: str
  overrides: tuple
  needs: dict

  @property
  def name(self):
    return f'{self.run} of seed {self.seed}'

  @functools.cached_property
  def digest(self):
    """Of all that decides the result: equal commands of two pages share a workdir."""
    needed = {name: need.digest for name, need in self.needs.items()}
    return hashlib.sha256(json.dumps([self.program, self.config, self.overrides, needed]).encode()).hexdigest()[:10]

  def workdir(self, scratch=SCRATCH):
    """Where the result is left."""
    if self.program == 'merge':
      return f'{self._config(scratch)}/merged/{"_".join(flag.split("=")[1] for flag in self.overrides)}'
    return f'{scratch}/{self.program}_{self.digest}'

  def arguments(self, scratch=SCRATCH):
    """What follows `qat` on the command line."""
    if self.program == 'merge':
      return [self.program, '--workdir', self._config(scratch), *self.overrides]
    return [self.program, '--config', self._config(scratch), '--workdir', self.workdir(scratch), *self.overrides]

  def _config(self, scratch):
    return self.config.format(**{name: need.workdir(scratch) for name, need in self.needs.items()})

  def __str__(self):
    return shlex.join(['qat', *self.arguments()])


@dataclasses.dataclass(frozen=True)
class Page:
  """A folder of experiments/ and what its page.py declares."""
  folder: pathlib.Path
  paper: dict
  seeds: tuple
  metrics: tuple
  runs: dict
  claims: list

  def metric(self, name=None):
    """A metric by its name; the first if none is given."""
    return next(m for m in self.metrics if name in (None, m['name']))

  def command(self, run, seed):
    """The Command of a run under a seed."""
    about = self.runs[run]
    needs = {name: self.command(name, seed) for name in needed(about)}
    wanted = about.get('set', {}).items()
    overrides = (*(f'--config.{leaf}={value}' for leaf, value in wanted), f'--config.seed={seed}')
    if about['program'] == 'merge':
      overrides = tuple(f'--{flag}={value}' for flag, value in wanted)
    return Command(run, seed, about['program'], about['config'], overrides, needs)

  def commands(self):
    """All Commands, those that others need before them."""
    return [self.command(run, seed) for seed in self.seeds for run in self.runs]

  def path(self, run):
    return self.folder / 'results' / f'{run}.json'

  def stored(self, run):
    """{command: result} of the results of a run that its present commands made, in the order of the seeds."""
    path = self.path(run)
    there = {result['command']: result for result in json.loads(path.read_text())} if path.is_file() else {}
    commands = [str(self.command(run, seed)) for seed in self.seeds]
    return {command: there[command] for command in commands if command in there}

  def store(self, command, result):
    """Adds the result of a Command to the file of its run, a line a seed."""
    found = self.stored(command.run) | {str(command): result}
    ordered = [found[text] for seed in self.seeds if (text := str(self.command(command.run, seed))) in found]
    self.path(command.run).parent.mkdir(exist_ok=True)
    files.write(self.path(command.run), '[' + ',\n '.join(map(json.dumps, ordered)) + ']\n')

  def missing(self):
    """The Commands without a result."""
    stored = {run: self.stored(run) for run in self.runs}
    return [command for command in self.commands() if str(command) not in stored[command.run]]

  def results(self):
    """{run: [result, in the order of the seeds]}."""
    if missing := self.missing():
      raise ValueError(f'{self.folder}: of its {len(self.commands())} runs {len(missing)} have no result of their '
                       f'command, among them {missing[0].name}. Run: qat reproduce {self.folder.name}')
    found = {run: list(self.stored(run).values()) for run in self.runs}
    return {run: _beside(results, found.get(self.runs[run].get('float'))) for run, results in found.items()}


def _beside(results, floats):
  """The results of a run, whose metrics have those of the run it is compared to as `float_<metric>`."""
  if floats is None:
    return results
  named = [{f'float_{name}': value for name, value in result['metrics'].items()} for result in floats]
  return [dict(result, metrics=result['metrics'] | more) for result, more in zip(results, named)]


def kept(result, command, scratch):
  """What a result file holds of a result.json: no path of this machine."""
  slim = {key: result[key] for key in KEPT if key in result}
  more = {f'start_{name}': value for name, value in result.get('metrics_before', {}).items()}
  if 'optimizer_bytes' in result:
    more['optimizer_mib'] = result['optimizer_bytes'] / 2**20
  slim['metrics'] = slim['metrics'] | more
  return json.loads(json.dumps(slim | dict(command=str(command))).replace(str(scratch), SCRATCH))


def needed(run):
  """The names of the runs that a run reads."""
  return [name for _, name, *_ in string.Formatter().parse(run['config']) if name]


def load(folder):
  """The Page of a folder."""
  folder = pathlib.Path(folder)
  path = folder / 'page.py'
  if not path.is_file():
    there = pages(folder.parent)
    raise ValueError(f'{str(folder)!r} is no page of experiments: it has no page.py. '
                     f'{names.suggest(folder.name, there) if there else "Name one such as experiments/gptq."}')
  root = str(folder.resolve().parents[1])
  if root not in sys.path:  # Pages say `from experiments import networks`.
    sys.path.insert(0, root)
  said = runpy.run_path(str(path))  # From its source: an import may find the bytecode of a page that was edited since.
  if lacking := [name for name in ('PAPER', 'SEEDS', 'METRICS', 'RUNS', 'CLAIMS') if name not in said]:
    raise ValueError(f'{path} lacks {lacking}: a page declares all five. See qat/run/papers.py.')
  page = Page(folder, said['PAPER'], tuple(said['SEEDS']), tuple(said['METRICS']), said['RUNS'], said['CLAIMS'])
  _check(page)
  return page


def pages(experiments):
  """The names of the pages there are, sorted."""
  return sorted(path.parent.name for path in pathlib.Path(experiments).glob('*/page.py'))


def _check(page):
  """Raises at keys, programs and names that mean nothing."""
  where = f'{page.folder}/page.py'
  _check_keys(f'{where}: PAPER', page.paper, PAPER_KEYS)
  for metric in page.metrics:
    _check_keys(f'{where}: metric', metric, METRIC_KEYS)
  for run, about in page.runs.items():
    _check_keys(f'{where}: run {run!r}', about, RUN_KEYS)
    if about['program'] not in PROGRAMS:
      raise ValueError(f'{where}: run {run!r} is of program {about["program"]!r}. '
                       f'{names.suggest(about["program"], PROGRAMS)}')
    if about['program'] == 'merge' and (wrong := sorted(set(about.get('set', {})) - set(MERGE_FLAGS))):
      raise ValueError(f'{where}: run {run!r} sets {wrong}, and the flags of qat merge are {MERGE_FLAGS}.')
    earlier = list(page.runs)[:list(page.runs).index(run)]
    beside = [about['float']] if 'float' in about else []
    if unknown := [name for name in (*needed(about), *beside) if name not in earlier]:
      raise ValueError(f'{where}: run {run!r} reads {unknown}, and the runs before it are {earlier}. Declare a run '
                       'after those that it reads.')
  for i, claim in enumerate(page.claims):
    _check_keys(f'{where}: claim {i}', claim, CLAIM_KEYS)
    kinds = [kind for kind in ('difference', 'ratio') if kind in claim]
    if len(kinds) != 1:
      raise ValueError(f'{where}: claim {i} has {kinds or "neither difference nor ratio"}. Give one of the two.')
    if unknown := [run for run in claim[kinds[0]] if run not in page.runs]:
      raise ValueError(f'{where}: claim {i} is about {unknown[0]!r}. {names.suggest(unknown[0], page.runs)}')
    there = [metric['name'] for metric in page.metrics]
    if claim.get('metric', there[0]) not in there:
      raise ValueError(f'{where}: claim {i} is of {claim["metric"]!r}. {names.suggest(claim["metric"], there)}')


def _check_keys(what, there, known):
  for key in there:
    if key not in known:
      raise ValueError(f'{what} has {key!r}, which means nothing. {names.suggest(key, known)}')
  if lacking := [key for key, must in known.items() if must and key not in there]:
    raise ValueError(f'{what} lacks {lacking}. Give them.')
