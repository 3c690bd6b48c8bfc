"""What a program costs on an NVIDIA GPU, read from its machine code: compiled ahead of time, on a machine without one.

XLA compiles for a GPU that is only described (targets/*.txtpb, from datasheets), by CUDA's ptxas. A warpgroup is one
warp on each of a processor's four schedulers, which issue one instruction a cycle: the instructions of the innermost
loop with a matrix instruction in it, the issue slots of a step, are a lower bound of its cycles for one warpgroup. They
rank variants of a kernel; waits and memory are not in them.

    python -m qat.kernels.static_gpu h200 my.module:case      # prints a Report as JSON

It takes jax with its CUDA plugin (tests/aot/gpu.txt), ptxas and nvdisasm, and no driver. Compilers may abort: hence a
process a case.
"""

import collections
import dataclasses
import importlib
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile

TARGETS = {'h200': 'sm_90a', 'b200': 'sm_100a', 'a100': 'sm_80'}
TIMEOUT_SECONDS = 180
_PYPI = {'ptxas': 'nvidia-cuda-nvcc', 'nvdisasm': 'nvidia-cuda-nvdisasm'}


@dataclasses.dataclass(frozen=True)
class Report:
  """Of one compiled program.

  Attributes:
    registers: of a thread, the most of its Pallas kernels.
    spill_bytes: stored to memory for want of registers.
    slots: instructions of the smallest loop with a matrix instruction; of all kernels', the most.
    losses: what ptxas calls a loss of performance, such as wgmma instructions that wait for each other.
    mma: {matrix instruction: how often it is in that loop}.
    temp_bytes, argument_bytes: of memory outside the kernels.
    calls: the targets of custom calls.
    error: the first line of why it did not compile, or None.
  """
  registers: int = 0
  spill_bytes: int = 0
  slots: int = 0
  losses: tuple = ()
  mma: dict = dataclasses.field(default_factory=dict)
  temp_bytes: int = 0
  argument_bytes: int = 0
  calls: tuple = ()
  error: str | None = None


def compile(case, target, keep=None):
  """The Report of a case, from a process of its own.

  Args:
    case: 'module:function', whose function returns what to compile and its arguments as jax.ShapeDtypeStructs.
    target: one of TARGETS.
    keep: a folder for PTX and SASS, of which nothing is kept otherwise.
  """
  ptxas = tool('ptxas')
  with tempfile.TemporaryDirectory() as scratch:
    folder = pathlib.Path(keep or scratch).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    environment = dict(os.environ, JAX_PLATFORMS='cpu', MOSAIC_GPU_DUMP_TO=str(folder),
                       PATH=f'{ptxas.parent}:{os.environ.get("PATH", "")}')
    try:
      done = subprocess.run([sys.executable, '-m', 'qat.kernels.static_gpu', target, case], env=environment, text=True,
                            capture_output=True, timeout=TIMEOUT_SECONDS)
    except subprocess.TimeoutExpired:
      return Report(error=f'no result in {TIMEOUT_SECONDS} s')
    if done.returncode:
      said = [line for line in done.stderr.splitlines() if line.strip()] or ['nothing was said']
      return Report(error=f'the compiler ended with {done.returncode}: {said[-1]}')
    found = json.loads(done.stdout.splitlines()[-1])
    found['calls'] = tuple(found.get('calls', ()))
    return Report(**found, **({} if found['error'] else _machine_code(folder, target)))


def tool(name):
  """The path of a CUDA program; a FileNotFoundError that says where to get it."""
  site = pathlib.Path(sysconfig.get_paths()['purelib']) / 'nvidia'
  places = [shutil.which(name), f'/usr/local/cuda/bin/{name}', *sorted(site.glob(f'*/bin/{name}'))]
  for place in places:
    if place and pathlib.Path(place).exists():
      return pathlib.Path(place)
  raise FileNotFoundError(f'{name} is neither on PATH, nor in /usr/local/cuda/bin, nor in {site}. '
                          f'pip install {_PYPI[name]}.')


def _machine_code(folder, target):
  """What ptxas says of the dumped PTX, and what its SASS shows."""
  found = dict(registers=0, spill_bytes=0, slots=0, losses=(), mma={})
  for ptx in sorted(folder.glob('**/*.ptx')):
    cubin = ptx.with_suffix('.cubin')
    said = subprocess.run([tool('ptxas'), '-v', f'-arch={TARGETS[target]}', ptx, '-o', cubin], check=True, text=True,
                          capture_output=True).stderr
    sass = subprocess.run([tool('nvdisasm'), '-c', cubin], check=True, text=True, capture_output=True).stdout
    ptx.with_suffix('.sass').write_text(sass)
    most = lambda pattern: max((int(n) for n in re.findall(pattern, said)), default=0)
    found['registers'] = max(found['registers'], most(r'Used (\d+) registers'))
    found['spill_bytes'] += most(r'(\d+) bytes spill stores')
    found['losses'] += tuple(line.strip() for line in said.splitlines() if 'Performance Loss' in line)
    loop = innermost_loop(sass)
    if len(loop) > found['slots']:
      mma = collections.Counter(op for op in loop if 'MMA' in op)
      found.update(slots=len(loop), mma=dict(mma))
  return found


def innermost_loop(sass):
  """The instructions of the smallest loop that holds a matrix instruction: a list of opcodes, empty if there is none.

  >>> innermost_loop('.L_x_1:\\n /*0000*/ HGMMA.64x8x16.F32.BF16 R4, R8 ;\\n /*0010*/ @P0 BRA `(.L_x_1) ;')
  ['HGMMA.64x8x16.F32.BF16', 'BRA']
  """
  labels, opcodes, loops = {}, [], []
  for line in sass.splitlines():
    if label := re.match(r'\s*(\.L_x_\d+):', line):
      labels[label.group(1)] = len(opcodes)
    # An address, a predicate and the opcode.
    elif op := re.match(r'\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P[T\d]+\s+)?([A-Z][\w.]*)', line):
      opcodes.append(op.group(1))
      to = re.search(r'`\((\.L_x_\d+)\)', line)
      if op.group(1).startswith('BRA') and to and to.group(1) in labels:
        loops.append(opcodes[labels[to.group(1)]:])
  return min((loop for loop in loops if any('MMA' in op for op in loop)), key=len, default=[])


def lower(f, arguments, target):
  """`f` lowered for a GPU that is not here, with arguments as jax.ShapeDtypeStructs."""
  import jax
  from jax.experimental import topologies
  import numpy as np

  config = (pathlib.Path(__file__).parent / 'targets' / f'{target}.txtpb').read_text()
  topology = topologies.get_topology_desc(platform='cuda', topology_name='', target_config=config, topology='1x1x1')
  mesh = jax.sharding.Mesh(np.array(topology.devices[:1]), ('device',))
  place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  arguments = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place), arguments)
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    return jax.jit(f).lower(*arguments)


def main(target, case):
  """Compiles a case in this process, and prints what of its Report does not come from machine code."""
  module, name = case.split(':')
  try:
    f, arguments = getattr(importlib.import_module(module), name)()
    compiled = lower(f, arguments, target).compile()
  except Exception as e:  # Mosaic raises many kinds.
    print(json.dumps(dict(error=f'{type(e).__name__}: {str(e).strip().splitlines()[0]}')))
    return
  memory = compiled.memory_analysis()
  calls = sorted(set(re.findall(r'custom_call_target="([^"]+)"', compiled.as_text())))
  print(json.dumps(dict(temp_bytes=memory.temp_size_in_bytes, argument_bytes=memory.argument_size_in_bytes,
                        calls=calls, error=None)))


if __name__ == '__main__':
  main(*sys.argv[1:])
