"""matmul.cc as a shared library: built where it is first called, kept, and known to XLA.

The file's name has a hash of all that decides its bytes, so that another source, compiler or jax builds another. Two
processes may build at once: each writes a file of its own and renames it.
"""

import ctypes
import functools
import hashlib
import os
import pathlib
import platform
import shutil
import subprocess
import tempfile

import jax
import jaxlib

HERE = pathlib.Path(__file__).parent
FLAGS = ('-std=c++17', '-O2', '-shared', '-fPIC', '-ffp-contract=fast', '-pthread', '-w')
CALLS = ('qat_multiply', 'qat_integer_sums')
LEVELS = ('portable', 'avx2', 'avx512')                                  # As in matmul.cc, where they are 0, 1 and 2.


class Unbuilt(Exception):
  """Why there is no library."""


def folder():
  """Where libraries are kept: $QAT_CACHE, $XDG_CACHE_HOME/qat or ~/.cache/qat, and there `kernels`."""
  shared = pathlib.Path(os.environ.get('XDG_CACHE_HOME') or pathlib.Path.home() / '.cache')
  return pathlib.Path(os.environ.get('QAT_CACHE') or shared / 'qat').expanduser() / 'kernels'


def compiler():
  """The C++ compiler: $CXX, or the first on PATH of g++, clang++ and c++."""
  named = os.environ.get('CXX')
  for name in [named] if named else ['g++', 'clang++', 'c++']:
    if path := shutil.which(name):
      return path
  missing = f'CXX={named} is not' if named else 'neither g++ nor clang++ nor c++ is'
  raise Unbuilt(f'the CPU kernels are compiled where they run, and {missing} on PATH: install one, or name it in CXX')


def build():
  """The path of the library, which is compiled unless it is there."""
  cxx = compiler()
  sources = [HERE / name for name in ('matmul.cc', 'loops.h')]
  version = subprocess.run([cxx, '--version'], capture_output=True, text=True).stdout
  facts = repr((FLAGS, version, platform.machine(), jaxlib.__version__))
  parts = [*(s.read_bytes() for s in sources), facts.encode()]
  name = hashlib.sha256(b'\0'.join(hashlib.sha256(p).digest() for p in parts)).hexdigest()[:16]
  path = folder() / f'matmul-{name}.so'
  if path.exists():
    return path
  path.parent.mkdir(parents=True, exist_ok=True)
  with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
    output = pathlib.Path(scratch) / path.name
    command = [cxx, *FLAGS, f'-isystem{jax.ffi.include_dir()}', str(sources[0]), '-o', str(output)]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
      raise Unbuilt(f'the CPU kernels do not compile: {" ".join(command)} says\n{result.stderr.strip()}')
    os.replace(output, path)
  return path


@functools.cache
def load():
  """The names of the instruction sets that this CPU has, slowest first; or an Unbuilt. Makes the calls known to XLA."""
  try:
    library = ctypes.CDLL(str(build()))
  except (Unbuilt, OSError) as error:
    return error if isinstance(error, Unbuilt) else Unbuilt(f'the CPU kernels cannot be built or loaded: {error}')
  for name in CALLS:
    jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(getattr(library, name)), platform='cpu')
  return LEVELS[:library.qat_best_level() + 1]
