"""Hopper's products inside jax.shard_map, and one that XLA divides, compiled for four GPUs that are not there.

    python -m tests.aot.sharded_gpu    # prints {split: {'calls', 'collectives', 'temp_bytes'}}, of split 'rows', ...

One process compiles all: see qat/kernels/static_gpu.py for why it is not the test's own.
"""

import json
import pathlib
import re

import jax
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec as P
import numpy as np

from qat.kernels import matmul, matmul_gpu, static_gpu
from tests.aot import gpu_cases

# Of x[m, k], w[k, n] and y[m, n].
SPLITS = {'rows': (P('device'), P(), P('device')), 'outputs': (P(), P(None, 'device'), P(None, 'device')),
          'inputs': (P(None, 'device'), P('device'), P())}
DEVICES, ROWS = 4, 64


def compiled(split):
  """The program of x @ w with its operands split: each device prepares its own part of w, and multiplies by it.

  Of 'divided' rows of x, which is not in shard_map, a prepared weight is an operand.
  """
  config = (pathlib.Path(static_gpu.__file__).parent / 'targets' / 'h200.txtpb').read_text()
  topology = topologies.get_topology_desc(platform='cuda', topology_name='', target_config=config,
                                          topology=f'1x1x{DEVICES}')
  mesh = jax.sharding.Mesh(np.array(topology.devices), ('device',))
  of_x, of_w, of_y = SPLITS.get(split, SPLITS['rows'])

  def product(x, q):
    y = matmul_gpu.matmul(x, matmul_gpu.prepare(q))
    return jax.lax.psum(y, 'device') if split == 'inputs' else y

  def placed(tree, spec):
    place = NamedSharding(mesh, spec)
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place), tree)
  w = gpu_cases.coded(gpu_cases.WEIGHTS['int4_g128'], gpu_cases.K, gpu_cases.N)
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    if split == 'divided':
      w = jax.eval_shape(matmul_gpu.prepare, w)
      return jax.jit(matmul.matmul).lower(placed(gpu_cases.floats(ROWS), of_x), placed(w, of_w)).compile()
    run = jax.jit(jax.shard_map(product, in_specs=(of_x, of_w), out_specs=of_y, check_vma=False))
    return run.lower(placed(gpu_cases.floats(ROWS), of_x), placed(w, of_w)).compile()


def main():
  found = {}
  for split in [*SPLITS, 'divided']:
    program = compiled(split)
    text = program.as_text()
    found[split] = dict(calls=sorted(set(re.findall(r'custom_call_target="([^"]+)"', text))),
                        collectives=sorted(set(re.findall(r'all-(?:reduce|gather|to-all)', text))),
                        temp_bytes=program.memory_analysis().temp_size_in_bytes)
  print(json.dumps(found))


if __name__ == '__main__':
  main()
