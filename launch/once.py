"""Runs a command in a folder where no other may run at the same time, and not without the process that asked for it.

    python once.py <workdir> <result or ''> <pid of the parent> <command> ...

Invariant: of all processes started so for one workdir, on one machine or on several that share the folder, one runs.
The command inherits a lock, which lasts exactly as long as the command does, whoever else was killed. Whoever comes
while it is held waits, and then runs only if the result is not there. Linux ends the command (SIGTERM, upon which qat
saves) when its parent is gone.

Standard library only, and run by its path: the machine that it runs on needs no package.
"""

import ctypes
import datetime
import fcntl
import os
import pathlib
import shlex
import signal
import socket
import sys

LOCK = 'run.lock'
TASK = 'LAUNCH_TASK'  # The number of a process of one job on many machines: each has a lock of its own.
PR_SET_PDEATHSIG = 1  # linux/prctl.h
NOT_FOUND = 127       # What shells say of a command that is not there.


def main(workdir, result, parent, *command):
  """Becomes the command, or returns an exit code."""
  die_with(int(parent))
  workdir = pathlib.Path(workdir)
  workdir.mkdir(parents=True, exist_ok=True)
  task = os.environ.get(TASK, '0')
  lock = hold(workdir / (LOCK if task == '0' else f'run.{task}.lock'))
  if result and (workdir / result).is_file():
    say(f'{workdir / result} is there: nothing to do.')
    return 0
  os.set_inheritable(lock, True)
  signal.signal(signal.SIGUSR2, signal.SIG_IGN)  # SLURM's warning to submitit, which passes it on as SIGTERM.
  # The programs beside this Python come first: `qat` without an activated environment.
  os.environ['PATH'] = os.pathsep.join([os.path.dirname(sys.executable), os.environ.get('PATH', os.defpath)])
  say(shlex.join(command))
  try:
    os.execvp(command[0], command)
  except OSError as error:
    say(f'{command[0]!r} cannot be run: {error.strerror}. Check the spelling, or install it.')
    return NOT_FOUND


def die_with(parent):
  """Asks the kernel for SIGTERM when the parent ends. Other systems than Linux have no such thing."""
  if sys.platform == 'linux':
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
  if parent and os.getppid() != parent:  # It ended before the line above.
    sys.exit(128 + signal.SIGTERM)


def hold(path):
  """The descriptor of a file that is locked for this process and those that inherit it. Waits while another has it."""
  lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
  try:
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError:
    say(f'{path} is held by a process that works here still: waiting for its end.')
    fcntl.flock(lock, fcntl.LOCK_EX)
  return lock


def say(text):
  """A line of the log that says when, where and by which process."""
  now = datetime.datetime.now().astimezone().isoformat(timespec='seconds')
  print(f'[launch {now} {socket.gethostname()} {os.getpid()}] {text}', flush=True)


if __name__ == '__main__':
  sys.exit(main(*sys.argv[1:]))
