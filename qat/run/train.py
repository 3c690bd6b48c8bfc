"""Trains a network, in floats or quantized, and goes on from where it was stopped.

    qat train --config configs/<file>.py[:arg] --workdir <dir> [--config.<leaf>=<value>]
    qat train --plan --config configs/<file>.py[:arg]

Leaves in workdir: config.json, metrics.jsonl, tensorboard/, checkpoints/, result.json, report.html.
The same command goes on with a run that was stopped, to the same bytes.
"""

import sys
import time

from qat.run import build
from qat.run import checkpoint
from qat.run import config as configs
from qat.run import data
from qat.run import hosts
from qat.run import mesh
from qat.run import metrics
from qat.run import nonfinite
from qat.run import progress
from qat.run import provenance
from qat.run import report
from qat.run import state as states
from qat.run import stop
from qat.run import workdirs


def main(config, workdir):
  """The whole run, from its config to its report."""
  began, origin = time.monotonic(), provenance.provenance()
  # ------------------------------------------------------------------------ where
  configs.check_counts(config)
  devices = mesh.make(config)
  workdir = workdirs.begin(workdir, config)

  # ------------------------------------------------------------------------ data, model, quantizers, optimizer
  run = build.run(config, devices)
  batches = data.batches(run.train, config.data.batch_size, config.seed, rows=devices.rows(config.data.batch_size))
  placed = mesh.say(devices.facts(parameters=run.state.params, optimizer=run.state.opt_state))

  # ------------------------------------------------------------------------ train
  state, seconds_before = begin(run, batches, workdir)
  seconds = lambda: seconds_before + time.monotonic() - began
  with stop.Stop() as heard:
    stopped = hosts.Together(heard)
    state = Loop(run, workdir, batches, seconds)(state, stopped)
  if int(state.step) < config.total_steps:
    print(f'{stopped.asked.name}: saved at step {int(state.step)} of {config.total_steps}. '
          'The same command goes on from there.', flush=True)
    return

  # ------------------------------------------------------------------------ freeze, evaluate, report
  model = run.model(state)
  result = dict(config=configs.plain(config), seed=config.seed, steps=config.total_steps,
                metrics=run.scorer(model), best_step=checkpoint.best_step(workdir, run.objective.score),
                **build.facts(run, model), optimizer_bytes=states.size_bytes(state.opt_state), wall_seconds=seconds(),
                peak_memory_bytes=provenance.peak_memory_bytes(), **placed, **origin)
  model = hosts.local_model(model)
  if not hosts.is_first():
    return
  provenance.save(workdir / 'result.json', result)
  page = report.write(workdir, result, model)
  print(f'{report.line(result)}\n{page}\n{workdir / "result.json"}', flush=True)


def begin(run, batches, workdir):
  """(state, seconds spent before): new, or of the last checkpoint, to which `batches` are moved."""
  if not (restored := checkpoint.restore(workdir, run.state)):
    return run.state, 0.0
  state, about = restored
  batches.set_state(about['data'])
  print(f'Going on from step {int(state.step)} of {run.config.total_steps}.', flush=True)
  return state, about['seconds']


class Loop:
  """Steps, and what happens between them: logs, evaluations, checkpoints.

  Invariant: a checkpoint of step N holds the state, the data position and the metrics after
  exactly N steps.
  """

  def __init__(self, run, workdir, batches, seconds):
    self.run, self.workdir, self.batches, self.seconds = run, workdir, batches, seconds
    self.config = run.config
    self.step_on = states.train_step(
        run.skeleton, run.objective, run.tx, self.config.optimizer.accumulate_steps, run.memory,
        run.devices.after(run.state, run.memory))

  def __call__(self, state, stopped):
    """The state after `total_steps`, or after the step in which `stopped` became true."""
    c, step = self.config, int(state.step)
    score = self.run.objective.score
    with (checkpoint.Checkpoints(self.workdir, score, c.keep_checkpoints) as self.checkpoints,
          metrics.Metrics(self.workdir, step, c) if hosts.is_first() else metrics.Silent() as self.metrics,
          progress.bar(c.total_steps, step, c.log_every_seconds) as self.bar):
      late = None  # The last step, not looked at yet: looking waits for the device.
      while step < c.total_steps and not stopped:
        batch = self.run.devices.put(next(self.batches), c.data.batch_size)
        state, values = self.step_on(state, batch)
        step += 1
        if late:
          self.look(state, *late)
        late = (step, batch, values)
        if step % c.eval.every_steps == 0 or step % c.checkpoint_every_steps == 0:
          self.look(state, *late)
          late = None
          self.save(state, step)
      if late:
        self.look(state, *late)
        self.save(state, step)
    return state

  def look(self, state, step, batch, values):
    """Stops at numbers that are not finite; logs."""
    if not values.pop('finite'):
      nonfinite.stop(self.run.skeleton, self.run.objective, state, batch, self.workdir)
    shown = {}
    if step % self.config.log_every_steps == 0 or step == self.config.total_steps:
      shown = {name: float(v) for name, v in values.items()}
      rate = float(self.run.rate(step - 1))
      self.metrics.write(step, 'train', dict(shown, learning_rate=rate, seconds=round(self.seconds(), 3)))
    self.bar.update(step, shown)

  def save(self, state, step):
    """Evaluates if it is time, and writes a checkpoint in the background."""
    scores = None
    if step % self.config.eval.every_steps == 0 or step == self.config.total_steps:
      scores = self.run.scorer(self.run.model(state))
      self.metrics.write(step, 'test', scores)
      self.bar.say(f'step {step}  test  ' + '  '.join(f'{k} {v:.4g}' for k, v in scores.items()))
    self.metrics.sync()
    about = dict(self.run.about, data=self.batches.get_state(), seconds=self.seconds())
    self.checkpoints.save(step, state, about, scores)


if __name__ == '__main__':
  from qat.run import cli
  sys.exit(cli.main(['train', *sys.argv[1:]]))
