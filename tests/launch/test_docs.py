"""The commands of docs/launch.md, as far as they go without running anything."""

import pathlib
import shlex
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
PAGE = (ROOT / 'docs' / 'launch.md').read_text().replace('\\\n', ' ')
COMMANDS = [line.strip() for line in PAGE.splitlines() if line.startswith('    python -m launch.')]


def test_there_are_some():
  assert len(COMMANDS) >= 3


@pytest.mark.parametrize('command', COMMANDS)
def test_it_would_start(command, tmp_path):
  argv = [sys.executable, *shlex.split(command)[1:], '--dry_run']
  argv += ['--folder', str(tmp_path)] if 'launch.sweep' in argv else []  # It lists what has not finished.
  ended = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True)
  assert ended.returncode == 0 and 'qat train' in ended.stdout, ended.stderr
