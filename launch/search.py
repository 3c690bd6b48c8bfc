"""What a search does next: Optuna proposes, runs answer, and what will not be among the best is cut short.

Akiba et al. Optuna, KDD 2019. https://arxiv.org/abs/1907.10902   TPE: Bergstra et al. NeurIPS 2011.
ASHA: Li et al. MLSys 2020, https://arxiv.org/abs/1810.05934   Hyperband: Li et al. JMLR 2018, https://arxiv.org/abs/1603.06560

A combination of what --set says has a search of its own, of --trials trials. Trials live in Optuna's storage, which
many machines may share; each asks for what to try next. What a machine left half done goes on, in the folder of its
config's hash, when that machine sweeps again. Pruning counts a run's evaluations: the k-th is step k.
"""

import dataclasses
import math
import socket
import time

from launch import grid
from launch import job as values
from launch import plans
from launch import study as studies

Status = values.Status
HOST, RETRIED = 'host', 'retried'
REDUCTION = 3          # ASHA's and Hyperband's eta: of three, one goes on. Li et al. use 3 or 4.
WATCH_SECONDS = 1.0


@dataclasses.dataclass(frozen=True)
class Options:
  """How to search.

  Attributes:
    trials: of each combination.
    metric: a name in the metrics of result.json and metrics.jsonl.
    sampler: 'tpe' or 'random'.
    pruner: 'none', 'asha', 'hyperband' or 'median'.
    storage: a database URL, or journal:<path>.
    shared: whether other machines may use the storage.
    seed: of the sampler.
  """
  trials: int
  metric: str
  sampler: str
  pruner: str
  storage: str
  shared: bool
  seed: int


def optuna():
  """The package."""
  try:
    import optuna  # Here: grids do without it.
  except ImportError as error:
    raise ImportError('--search needs optuna, which is not installed. Run: pip install optuna, or use --set.'
                      ) from error
  optuna.logging.set_verbosity(optuna.logging.ERROR)
  return optuna


def samplers(seed):
  o = optuna().samplers
  return dict(tpe=lambda: o.TPESampler(seed=seed), random=lambda: o.RandomSampler(seed=seed))


def pruners(evaluations):
  """Of runs that are evaluated so many times."""
  o = optuna().pruners
  return dict(none=o.NopPruner, median=o.MedianPruner,
              asha=lambda: o.SuccessiveHalvingPruner(min_resource=1, reduction_factor=REDUCTION),
              hyperband=lambda: o.HyperbandPruner(1, max(1, evaluations), REDUCTION))


def storage(url):
  """Optuna's storage of a URL."""
  o = optuna()
  try:
    if url.startswith('journal:'):
      backend = o.storages.journal.JournalFileBackend(url.removeprefix('journal:'))
      return o.storages.JournalStorage(backend)
    return o.storages.RDBStorage(url)
  except Exception as error:  # SQLAlchemy, its drivers and the network each raise kinds of their own.
    raise OSError(f'--storage {url!r} cannot be reached: {_first_line(error)}. Check the URL and that the database '
                  'runs, install its driver, or leave --storage out for SQLite in the study.') from error


def is_storage(error):
  """Whether an error is one of Optuna's or of its database's."""
  return type(error).__module__.split('.')[0] in ('optuna', 'sqlalchemy')


def evaluations(config):
  """How often a run of a config is evaluated."""
  every = (config.get('eval') or {}).get('every_steps') or config.get('total_steps') or 1
  return math.ceil(config.get('total_steps', 1) / every)


class Search:
  """The plan of one Optuna study for each combination (launch/pool.py says what a plan is)."""

  def __init__(self, study, combinations, space, options, say):
    """Joins or makes the Optuna studies, and takes up what this machine left half done.

    Args:
      study: studies.Study.
      combinations: [settings] that every trial of a search shares.
      space: {key: grid.Between or grid.Choices}.
      options: Options.
      say: called with a line of text.
    """
    self.study, self.space, self.options, self.say = study, space, options, say
    self.host, self.watched = socket.gethostname(), 0.0
    self.live, self.pruned, self.runs, self.turn = {}, set(), [], 0  # live: {workdir: (Run, [(study, Trial)])}
    opened = storage(options.storage)
    self.searches = [(fixed, self._open(opened, fixed)) for fixed in combinations]
    for fixed, search in self.searches:
      self._take_up(fixed, search)

  def _open(self, opened, fixed):
    """The Optuna study of a combination."""
    o, options = optuna(), self.options
    name = '/'.join([self.study.folder.name, *(f'{grid.short(k)}={v}' for k, v in fixed.items())])
    config = self.study.run({**fixed, **{key: _first(values) for key, values in self.space.items()}}).config
    direction = 'maximize' if studies.rises(options.metric) else 'minimize'
    search = o.create_study(storage=opened, study_name=name, load_if_exists=True, direction=direction,
                            pruner=pruners(evaluations(config))[options.pruner]())
    search.sampler = samplers(options.seed + len(search.trials))[options.sampler]()
    return search

  def _take_up(self, fixed, search):
    """Notes the trials of before; those that failed, or that this machine left, are tried once more."""
    states, retried = optuna().trial.TrialState, list(search.user_attrs.get(RETRIED, ()))
    for trial in search.get_trials(deepcopy=False):
      left = trial.state is states.RUNNING and self.host == trial.user_attrs.get(
          HOST, None if self.options.shared else self.host)  # A kill may have come before it had a host, or parameters.
      if left:
        search.tell(trial.number, state=states.FAIL)
      if (left or trial.state is states.FAIL) and trial.number not in retried:
        retried.append(trial.number)
        search.set_user_attr(RETRIED, retried)
        if trial.params.keys() == self.space.keys():
          search.enqueue_trial(trial.params)
      elif trial.state in (states.COMPLETE, states.PRUNED):
        run = self.study.run({**fixed, **self._text(trial.params)})
        if run.digest not in {r.digest for r in self.runs}:
          self.runs.append(run)

  @property
  def total(self):
    return self.options.trials * len(self.searches)

  def count(self, search):
    """The trials that count: all but those that are tried once more."""
    states, retried = optuna().trial.TrialState, search.user_attrs.get(RETRIED, ())
    return sum(t.state is not states.WAITING and not (t.state is states.FAIL and t.number in retried)
               for t in search.get_trials(deepcopy=False))

  def take(self):
    for _ in self.searches:  # In turn.
      fixed, search = self.searches[self.turn % len(self.searches)]
      self.turn += 1
      while self.count(search) < self.options.trials:
        if job := self._ask(fixed, search):
          return job
    return None

  def _ask(self, fixed, search):
    """The job of a new trial; None when what it proposes has run, or runs."""
    trial = search.ask()
    trial.set_user_attr(HOST, self.host)
    run = self.study.run({**fixed, **self._text({key: _suggest(trial, key, values)
                                                 for key, values in self.space.items()})})
    trial.set_user_attr('workdir', run.job.workdir)
    if run.job.workdir in self.live:
      self.live[run.job.workdir][1].append((search, trial))
      return None
    self.runs = [r for r in self.runs if r.digest != run.digest] + [run]
    if run.status in (Status.FINISHED, Status.PRUNED):
      self._tell(run, search, trial)
      return None
    run.trial = trial.number
    run.begins()
    self.live[run.job.workdir] = run, [(search, trial)]
    return run.job

  def _text(self, params):
    return {key: f'{v:.6g}' if isinstance(v, float) else str(v) for key, v in params.items()}

  def ended(self, job, ending):
    run, trials = self.live.pop(job.workdir)
    cut = ending.status is Status.STOPPED and job.workdir in self.pruned
    run.ended(Status.PRUNED if cut else ending.status, ending)
    for search, trial in trials:
      self._tell(run, search, trial)
    plans.tell(run, self.say)

  def _tell(self, run, search, trial):
    """Gives Optuna a run's answer."""
    states, value = optuna().trial.TrialState, run.value(self.options.metric)
    if run.status is Status.PRUNED:
      search.tell(trial, state=states.PRUNED)
    elif run.status is Status.FINISHED and value is not None and math.isfinite(value):
      search.tell(trial, value)
    else:
      search.tell(trial, state=states.FAIL)
      if run.status is Status.FINISHED:
        self.say(f'{run.workdir.name}: --metric {self.options.metric} is {value} in its result, which has '
                 f'{sorted(run.result().get("metrics", {}))}. Its trial counts as failed.')

  def watch(self, pool):
    """Reports new evaluations, and stops what Optuna would prune."""
    if time.monotonic() - self.watched < WATCH_SECONDS:
      return
    self.watched = time.monotonic()
    for run, trials in self.live.values():
      seen = [line for line in run.lines() if line.get('split') != 'train' and self.options.metric in line]
      if not seen or run.job.workdir in self.pruned or seen[-1]['step'] >= run.config.get('total_steps', math.inf):
        continue
      trial = trials[0][1]
      told = trial.user_attrs.get('told', 0)
      for k, line in enumerate(seen[told:], told + 1):
        trial.report(line[self.options.metric], k)
      if len(seen) > told:
        trial.set_user_attr('told', len(seen))
        if trial.should_prune():
          self.pruned.add(run.job.workdir)
          pool.stop(run.job)


def _suggest(trial, key, values):
  """What Optuna proposes for a key."""
  if isinstance(values, grid.Choices):
    return trial.suggest_categorical(key, values.values)
  of = trial.suggest_int if isinstance(values.low, int) and isinstance(values.high, int) else trial.suggest_float
  return of(key, values.low, values.high, log=values.log)


def _first(values):
  return str(values.values[0] if isinstance(values, grid.Choices) else values.low)


def _first_line(error):
  return str(error).strip().splitlines()[0].rstrip('.') if str(error).strip() else type(error).__name__
