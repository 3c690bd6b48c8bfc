"""Kernels inside jax.shard_map on four devices, split over rows, outputs and inputs, give what one device gives."""

import json
import os
import subprocess
import sys

PROGRAM = '''
import functools, json
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import PartitionSpec as P
from qat.core import qarray, specs
from qat.kernels import matmul

mesh = jax.sharding.Mesh(np.array(jax.devices()), ('d',))
rng = np.random.default_rng(0)
x = jnp.asarray(rng.standard_normal((8, 1024)), jnp.bfloat16)
w = jnp.asarray(rng.standard_normal((1024, 512)), jnp.float32)
q = qarray.encode(w, specs.integer(4, (32, 1)))
named = {'xla': 'xla', 'tpu': matmul.Kernel('tpu', interpret=True)}
splits = {'rows': (P('d'), P(), P('d')), 'outputs': (P(), P(None, 'd'), P(None, 'd')),
          'inputs': (P(None, 'd'), P('d'), P())}
found = {}
for name, implementation in named.items():
  f = functools.partial(matmul.matmul, implementation=implementation)
  want = np.asarray(f(x, q), np.float32)
  for split, (of_x, of_w, of_y) in splits.items():
    def local(x, q):
      y = f(x, q)
      return jax.lax.psum(y, 'd') if split == 'inputs' else y
    run = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=(of_x, of_w), out_specs=of_y, check_vma=False))
    found[f'{name}, {split}'] = float(np.abs(np.asarray(run(x, q), np.float32) - want).max() / np.abs(want).max())
print(json.dumps(found))
'''


def test_over_rows_outputs_and_inputs():
  flags = '--xla_force_host_platform_device_count=4'
  done = subprocess.run([sys.executable, '-c', PROGRAM], env={**os.environ, 'XLA_FLAGS': flags}, text=True,
                        capture_output=True, timeout=300)
  assert done.returncode == 0, done.stderr
  errors = json.loads(done.stdout.splitlines()[-1])
  assert len(errors) == 6 and max(errors.values()) <= 2.0**-7, errors    # Sums in another order, rounded to bfloat16.
