"""Products that several devices share give what one gives: kernels in jax.shard_map, XLA where it divides a program."""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

import qat
from qat.kernels import matmul_cpu, pipeline_gpu

PROGRAM = '''
import functools, json, sys
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import PartitionSpec as P
from qat.core import qarray, specs
from qat.kernels import matmul

name, devices, k, n = sys.argv[1], *map(int, sys.argv[2:])
implementation = {'xla': 'xla', 'cpu': matmul.Kernel('cpu')}.get(name) or matmul.Kernel(name, interpret=True)
mesh = jax.sharding.Mesh(np.array(jax.devices()[:devices]), ('d',))
rng = np.random.default_rng(0)
x = jnp.asarray(rng.standard_normal((8, k)), jnp.bfloat16)
q = qarray.encode(jnp.asarray(rng.standard_normal((k, n)), jnp.float32), specs.integer(4, (32, 1)))
splits = {'rows': (P('d'), P(), P('d')), 'outputs': (P(), P(None, 'd'), P(None, 'd')),
          'inputs': (P(None, 'd'), P('d'), P())}
f = functools.partial(matmul.matmul, implementation=implementation)
want = np.asarray(f(x, q), np.float32)
found = {}
for split, (of_x, of_w, of_y) in splits.items():
  def local(x, q):
    y = f(x, q)
    return jax.lax.psum(y, 'd') if split == 'inputs' else y
  run = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=(of_x, of_w), out_specs=of_y, check_vma=False))
  found[split] = float(np.abs(np.asarray(run(x, q), np.float32) - want).max() / np.abs(want).max())
print(json.dumps(found))
'''

# The gradient of a factor that all devices share, where jax.shard_map adds up what each of them finds.
SHARED = '''
import json
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import PartitionSpec as P
from qat.core import qarray, specs
from qat.kernels import matmul

mesh = jax.sharding.Mesh(np.array(jax.devices()), ('d',))
rng = np.random.default_rng(0)
x, w, b = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in [(8, 64), (64, 32), (32,)])
w = matmul.prepare(qarray.encode(w, specs.integer(4, (32, 1))))
found = {}
for name, implementation in {'best': None, 'named': matmul.Kernel('cpu')}.items():
  loss = lambda x, b: jnp.mean(jnp.sin(matmul.matmul(x, w, implementation=implementation) * b))
  shared = jax.shard_map(lambda x, b: jax.lax.pmean(loss(x, b), 'd'), mesh=mesh, in_specs=(P('d'), P()), out_specs=P())
  slopes = [jax.jit(jax.grad(f, argnums=(0, 1)))(x, b) for f in (shared, loss)]
  found[name] = [float(np.abs(a - b).max() / np.abs(b).max()) for a, b in zip(*slopes)]
print(json.dumps(found))
'''

# The product of jax.jit with operands on many devices, of which no kernel is a part.
DIVIDED = '''
import json
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from qat.core import qarray, specs
from qat.kernels import matmul

mesh = jax.sharding.Mesh(np.array(jax.devices()), ('d',))
rng = np.random.default_rng(0)
x = jnp.asarray(rng.standard_normal((2, 4, 1024)), jnp.bfloat16)
w = jnp.asarray(rng.standard_normal((1024, 512)), jnp.float32)
w = matmul.prepare(qarray.encode(w, specs.integer(8, (None, 1))))
codes = lambda x: qarray.encode(x, specs.integer(8, specs.TOKEN))
found = {}
for name, f in {'floats': matmul.matmul, 'codes': lambda x, w: matmul.matmul(codes(x), w)}.items():
  run = jax.jit(f)
  want = np.asarray(run(x, w), np.float32)
  calls = lambda x: 'call_target="qat_' in run.lower(x, w).compile().as_text()
  for split in (P(None, 'd'), P(None, None, 'd')):
    there = jax.device_put(x, NamedSharding(mesh, split))
    error = float(np.abs(np.asarray(run(there, w), np.float32) - want).max() / np.abs(want).max())
    found[f'{name} {split}'] = calls(x), calls(there), error
print(json.dumps(found))
'''


def errors(name, devices=4, k=1024, n=512):
  """split -> the largest difference from the product on one device, over the largest number in that."""
  return printed(PROGRAM, devices, name, *map(str, (devices, k, n)))


def printed(program, devices, *arguments):
  """What a program prints as JSON in a process of that many devices."""
  flags = f'--xla_force_host_platform_device_count={devices}'
  done = subprocess.run([sys.executable, '-c', program, *arguments], env={**os.environ, 'XLA_FLAGS': flags}, text=True,
                        capture_output=True, timeout=300)
  assert done.returncode == 0, done.stderr
  return json.loads(done.stdout.splitlines()[-1])


def assert_equal(errors):
  assert set(errors) == {'rows', 'outputs', 'inputs'}
  assert max(errors.values()) <= 2.0**-7, errors                         # Sums in another order, rounded to bfloat16.


@pytest.mark.parametrize('name', ['xla', 'tpu'])
def test_over_four_devices(name):
  assert_equal(errors(name))


@pytest.fixture
def compiler():
  q = jax.eval_shape(lambda w: qat.encode(w, qat.specs.integer(4, (32, 1))), jnp.ones((1024, 512)))
  if why := matmul_cpu.unsupported(jnp.ones((8, 1024), jnp.bfloat16), q):
    pytest.skip(why)


def test_of_cpus_over_four_devices(compiler):
  assert_equal(errors('cpu'))


def test_gradients_where_shard_map_adds_them_up(compiler):
  found = printed(SHARED, 4)
  assert set(found) == {'best', 'named'} and max(map(max, found.values())) < 1e-5, found


def test_what_xla_divides_has_no_kernel(compiler):
  found = printed(DIVIDED, 4)
  assert len(found) == 4
  for alone, divided, error in found.values():
    assert alone and not divided and error <= 2.0**-7


@pytest.mark.skipif(pipeline_gpu.needs_jax() is not None, reason=str(pipeline_gpu.needs_jax()))
def test_of_gpus_over_one():
  """The interpreter of GPUs has one memory for all devices, and a kernel that ends asserts that no barrier is left in
  it: it runs on one device only. tests/aot/test_gpu.py compiles the same splits for four."""
  assert_equal(errors('gpu', devices=1, k=256, n=128))
