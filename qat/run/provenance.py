"""Where a number comes from: commit, versions, device, time and memory."""

import importlib.metadata
import json
import pathlib
import platform
import resource
import subprocess
import sys

import jax

from qat.run import metrics

PACKAGES = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'grain', 'numpy')


def provenance():
  """A dict for result.json. Taken when a run begins: the files may change while it goes on."""
  device = jax.devices()[0]
  return dict(
      commit=commit(),
      versions={'python': platform.python_version(), **{p: importlib.metadata.version(p) for p in PACKAGES}},
      device=dict(kind=device.device_kind, platform=device.platform, count=jax.device_count()),
      command=' '.join([pathlib.Path(sys.argv[0]).name, *sys.argv[1:]]))


def commit():
  """The git commit of the code, with '-changed' when files differ from it; None outside git."""
  folder = pathlib.Path(__file__).parent
  git = lambda *args: subprocess.run(['git', *args], cwd=folder, capture_output=True, text=True)
  try:
    head, changed = git('rev-parse', 'HEAD'), git('status', '--porcelain', '--untracked-files=no')
  except FileNotFoundError:  # No git on this machine.
    return None
  return None if head.returncode else head.stdout.strip() + ('-changed' if changed.stdout.strip() else '')


def peak_memory_bytes():
  """The most memory held so far: of the device where it counts, else of the process."""
  stats = jax.local_devices()[0].memory_stats() or {}
  unit = 1 if sys.platform == 'darwin' else 1024  # getrusage: bytes on macOS, KiB on Linux.
  return stats.get('peak_bytes_in_use', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)


def save(path, result):
  """Writes a result file, whole or not at all."""
  metrics.write(pathlib.Path(path), json.dumps(result, indent=2) + '\n')
