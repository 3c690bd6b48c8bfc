"""What launch/ needs of `qat train`, without its arithmetic: flags, resuming, SIGTERM, metrics.jsonl and result.json.

Complains when it is started where another process works, or where all is done.
"""

import ast
import fcntl
import json
import math
import os
import pathlib
import signal
import sys
import time

# Those of tests/launch/config.py.
DEFAULTS = dict(seed=0, total_steps=10, step_seconds=0.0, crashing_seeds=(),
                **{'recipe.weight_bits': 2, 'optimizer.learning_rate': 1e-2, 'eval.every_steps': 2})


def parsed(argv):
  """(config as a flat dict, workdir), without the packages that would take longer to import than all of this to run."""
  flags, config = dict(zip(argv, argv[1:])), dict(DEFAULTS)
  for item in flags['--config'].partition(':')[2].split(','):
    if item.startswith('bits='):
      config['recipe.weight_bits'] = int(item[5:])
  for word in argv:
    if word.startswith('--config.'):
      key, value = word.removeprefix('--config.').split('=', 1)
      config[key] = ast.literal_eval(value)
  return config, pathlib.Path(flags['--workdir'])


def accuracy(config, step):
  """Rises with steps and bits, and is best at a rate of 1e-2."""
  bits, rate = config['recipe.weight_bits'], config['optimizer.learning_rate']
  best = 1 - 2.0 ** -bits - 0.1 * abs(math.log10(rate) + 2) + 0.001 * config['seed']
  return best * step / config['total_steps']


def main(argv):
  config, workdir = parsed(argv)
  alone, state, result = (workdir / name for name in ('alone', 'state', 'result.json'))
  lock = open(alone, 'w')
  try:
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError:
    raise SystemExit(f'{workdir}: two processes at once') from None
  if result.exists():
    raise SystemExit(f'{workdir}: run after its end')
  stopped = []
  signal.signal(signal.SIGTERM, lambda *_: stopped.append(True))
  step = int(state.read_text()) if state.exists() else 0
  with open(workdir / 'metrics.jsonl', 'a') as metrics:
    while step < config['total_steps']:
      if stopped:
        print(f'SIGTERM: saved at step {step}')
        return
      time.sleep(config['step_seconds'])
      step += 1
      if config['seed'] in config['crashing_seeds'] and step == 3:
        raise SystemExit('ValueError: the batch of 9999 is larger than the data.')
      if step % config['eval.every_steps'] == 0:
        print(json.dumps(dict(step=step, split='test', accuracy=accuracy(config, step))), file=metrics, flush=True)
      state.write_text(str(step))
  with open(workdir / 'ends', 'a') as ends:
    print(os.getpid(), file=ends)
  result.write_text(json.dumps(dict(metrics=dict(accuracy=accuracy(config, step)), wall_seconds=step / 10,
                                    bits_per_weight=config['recipe.weight_bits'] + 0.5, size_bytes=1000)))


if __name__ == '__main__':
  main(sys.argv[1:])
