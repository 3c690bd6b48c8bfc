"""A frozen layer in a program that XLA divides among four chips that are not there.

    python -m tests.aot.sharded_tpu v5e    # prints {split: {'kernels', 'collectives', 'temp_bytes'}}

One process compiles all, in the environment of qat/kernels/static_tpu.py.
"""

import json
import re
import sys
from unittest import mock

import jax
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec as P
import numpy as np

from qat.kernels import static_tpu
from tests.aot import tpu_cases

# Of x[m, k] and w[k, n].
SPLITS = {'rows': (P('d'), P()), 'outputs': (P(), P(None, 'd')), 'inputs': (P(None, 'd'), P('d')), 'none': (P(), P())}


def compiled(chip, split):
  """The program of a layer on one chip for 'none', and on four with x and w split."""
  topology = topologies.get_topology_desc(platform='tpu', topology_name=static_tpu.CHIPS[chip])
  mesh = jax.sharding.Mesh(np.array(topology.devices[:1 if split == 'none' else 4]), ('d',))
  with mock.patch.object(jax, 'default_backend', lambda: 'tpu'):
    f, operands = tpu_cases.frozen_layer(ready=lambda model: model)
    operands = [jax.tree.map(lambda a, s=s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=NamedSharding(mesh, s)), o)
                for o, s in zip(operands, SPLITS[split][::-1])]
    return jax.jit(f).lower(*operands).compile()


def main(chip):
  found = {}
  for split in SPLITS:
    program = compiled(chip, split)
    text = program.as_text()
    found[split] = dict(kernels='tpu_custom_call' in text, temp_bytes=program.memory_analysis().temp_size_in_bytes,
                        collectives=sorted(set(re.findall(r'all-(?:reduce|gather|to-all)', text))))
  print(json.dumps(found))


if __name__ == '__main__':
  main(*sys.argv[1:])
