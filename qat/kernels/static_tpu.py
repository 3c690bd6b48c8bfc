"""What a program costs on a TPU, read from its machine code: compiled ahead of time, on a machine without one.

libtpu compiles for a chip that is only described, and dumps the final bundles: the very long instruction words, of
which a core issues one a cycle. Bundles times grid steps is a lower bound of cycles (waits inside are not counted): it
ranks variants of a kernel and says nothing of time in memory.

    python -m qat.kernels.static_tpu v5e my.module:case      # prints a Report as JSON

libtpu reads where to dump from the environment once, and may abort: hence a process a case.
"""

import dataclasses
import glob
import importlib
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile

CHIPS = {'v5e': 'v5e:2x2', 'v5p': 'v5p:2x2x1', 'v6e': 'v6e:2x2', 'tpu7x': 'tpu7x:2x2x1'}
TIMEOUT_SECONDS = 120
# Without these libtpu asks a metadata server that is not there, and locks the machine for one process.
ENVIRONMENT = dict(JAX_PLATFORMS='cpu', TPU_SKIP_MDS_QUERY='1', TPU_WORKER_HOSTNAMES='localhost', TPU_WORKER_ID='0',
                   TPU_ACCELERATOR_TYPE='v5litepod-4', TPU_STDERR_LOG_LEVEL='3', TPU_MIN_LOG_LEVEL='3',
                   ALLOW_MULTIPLE_LIBTPU_LOAD='1')


@dataclasses.dataclass(frozen=True)
class Report:
  """Of one compiled program.

  Attributes:
    bundles: of the largest kernel in it; of a Pallas kernel, those of one grid step and of what surrounds the steps.
    temp_bytes, argument_bytes: of memory outside the kernels.
    error: the first line of why it did not compile, or None.
  """
  bundles: int = 0
  temp_bytes: int = 0
  argument_bytes: int = 0
  error: str | None = None


def compile(case, chip, keep=None):
  """The Report of a case, from a process of its own.

  Args:
    case: 'module:function', whose function returns what to compile and its arguments as jax.ShapeDtypeStructs.
    chip: one of CHIPS.
    keep: a folder for the dumped machine code, of which nothing is kept otherwise.
  """
  with tempfile.TemporaryDirectory() as scratch:
    folder = keep or scratch
    flags = f'--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true'
    command = [sys.executable, '-m', 'qat.kernels.static_tpu', chip, case]
    try:
      done = subprocess.run(command, env={**os.environ, **ENVIRONMENT, 'LIBTPU_INIT_ARGS': flags}, text=True,
                            capture_output=True, timeout=TIMEOUT_SECONDS)
    except subprocess.TimeoutExpired:
      return Report(error=f'no result in {TIMEOUT_SECONDS} s')
    if done.returncode:
      said = [line for line in done.stderr.splitlines() if line.strip()] or ['nothing was said']
      return Report(error=f'libtpu ended with {done.returncode}: {said[-1]}')
    found = json.loads(done.stdout.splitlines()[-1])
    return Report(bundles=0 if found['error'] else _bundles(folder), **found)


def _bundles(folder):
  """Final bundles of the largest program of those dumped."""
  counts = [int(m.group(1)) for path in glob.glob(f'{folder}/**/*schedule-analysis_final_bundles.txt', recursive=True)
            if (m := re.search(r'total scheduled bundles:\s+(\d+)', pathlib.Path(path).read_text()))]
  return max(counts, default=0)


def main(chip, case):
  """Compiles a case for a chip in this process, and prints all of its Report but the bundles."""
  import jax
  from jax.experimental import topologies

  module, name = case.split(':')
  f, arguments = getattr(importlib.import_module(module), name)()
  topology = topologies.get_topology_desc(platform='tpu', topology_name=CHIPS[chip])
  place = jax.sharding.SingleDeviceSharding(topology.devices[0])
  arguments = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place), arguments)
  try:
    memory = jax.jit(f).lower(*arguments).compile().memory_analysis()
  except Exception as e:  # Mosaic raises many kinds.
    print(json.dumps(dict(error=f'{type(e).__name__}: {str(e).strip().splitlines()[0]}')))
    return
  print(json.dumps(dict(temp_bytes=memory.temp_size_in_bytes, argument_bytes=memory.argument_size_in_bytes,
                        error=None)))


if __name__ == '__main__':
  main(*sys.argv[1:])
