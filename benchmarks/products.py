"""Low-bit products that are timed: which, by what weights, and how; for benchmarks/kernels.py and its peers."""

import functools
import time

import jax
import jax.numpy as jnp

from qat.core import formats, qarray, specs
from qat.kernels import matmul, prepared

WEIGHTS = {
    'int4 g128': specs.integer(4, (128, 1)), 'NF4 g64': specs.kernel(specs.NF4), 'MXFP4': specs.kernel(specs.MXFP4),
    'int8': specs.integer(8, specs.CHANNEL)}
CODES = {'W8A8': (specs.integer(8, specs.TOKEN), specs.integer(8, specs.CHANNEL)),
         'FP8': tuple(qarray.Spec(formats.FP8_E4M3, block) for block in (specs.TOKEN, specs.CHANNEL))}
CACHE_BYTES = 2**28  # Weights that are read in turn take at least this much together.
MOST_ERROR = 2.0**-6  # Of a product, over the largest number in it.
CODES_ERROR = 16 * MOST_ERROR  # Where inputs are rounded too.


def weights(k, n, spec):
  """Copies of one weight, in codes (or bfloat16 where `spec` is None), made on the device."""
  def make(seed):
    w = jax.random.normal(jax.random.key(seed), (k, n), jnp.bfloat16)
    return w if spec is None else qarray.encode(w.astype(jnp.float32), spec)
  bits = 16 if spec is None else spec.format.bits
  copies = min(max(2, CACHE_BYTES * 8 // (k * n * bits)), 64)
  return [jax.jit(make)(i) for i in range(copies)]


def inputs(rows, k):
  return jax.random.normal(jax.random.key(1), (rows, k), jnp.bfloat16)


def loop(product, count):
  """A program that multiplies `count` times by each weight, every input made from the output before."""
  def run(x, ws):
    def turn(_, x):
      for w in ws:
        y = product(x, w)
        x = jnp.where(y[:1, :1] > jnp.inf, jnp.zeros_like(x), x)         # Never; the compiler does not know.
      return x
    return jax.lax.fori_loop(0, count, turn, x)
  return jax.jit(run)


def seconds(run, *args):
  start = time.perf_counter()
  jax.block_until_ready(run(*args))
  return time.perf_counter() - start


class Timed:
  """A product by each of several weights in turn, what defines it, and what it takes.

  Attributes:
    base: the name of the product that its time is a ratio to.
    w: what `ws` begins with, decoded or in codes of ours: x @ decode(w) is the definition.
  """
  base = 'bfloat16'
  run = None

  def __init__(self, product, x, ws, w=None, most_error=MOST_ERROR):
    self.product, self.x, self.ws, self.most_error = product, x, ws, most_error
    self.w = ws[0] if w is None else w

  def error(self):
    """How far the product is off what defines it, over the largest number in that."""
    w = self.w if isinstance(self.w, jax.Array) else matmul.decode(self.w, jnp.bfloat16)
    expected = jnp.dot(self.x, w, preferred_element_type=jnp.float32)
    return float(jnp.max(jnp.abs(self.first() - expected)) / jnp.max(jnp.abs(expected)))

  def first(self):
    """The product by the first weight: f32[m, n]."""
    return jax.jit(self.product)(self.x, self.ws[0]).astype(jnp.float32)

  def timer(self, count):
    """A function that multiplies `count` times by each weight, and gives the seconds that it took."""
    return functools.partial(seconds, loop(self.product, count), self.x, self.ws)

  def weight_bytes(self):
    return sum(a.size * prepared.bits(a.dtype) for a in jax.tree.leaves(self.ws[0])) / 8

  def start(self, target_seconds=0.05):
    """Compiles a loop that takes about so long."""
    once = self.timer(1)
    once()
    count = max(1, int(target_seconds / max(once(), 1e-6)))
    self.run, self.products = self.timer(count), count * len(self.ws)
    self.run()

  def __call__(self):
    """Seconds of one product."""
    if self.run is None:
      self.start()
    return self.run() / self.products


def checked(found):
  """Those that give what the definition gives, ready to be timed, and what is wrong with the others."""
  right, wrong = {}, {}
  for name, timed in found.items():
    if (error := timed.error()) < timed.most_error:
      timed.start()
      right[name] = timed
    else:
      wrong[name] = f'error {error:.3g}'
  return right, wrong
