"""Hadamard matrices, and the rotation that they make of the last axis.

A Hadamard matrix H of order n has entries 1 and -1 and orthogonal rows, H H^T = n I. There is none unless n is 1, 2
or a multiple of 4. Those made here:

    2^k            Sylvester 1867: H_2 (x) H_2 (x) ...
    q + 1          Paley 1933, I: q a prime power, 3 modulo 4
    2 (q + 1)      Paley 1933, II: q a prime power, 1 modulo 4
    4 p            Williamson 1944: p a prime, four symmetric circulants of order p, constant on cyclotomic classes
    n m            products H_n (x) H_m of these

That is, all widths of usual networks: 576 = 36 x 16, 1536 = 12 x 128, 14336 = 28 x 512, 11008 = 172 x 64.
Construction is a short computation with integers, and no table.
"""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from qat.core import qarray

# 2^10 candidates a circulant are searched in well under a second.
MOST_CLASSES = 10


def transform(x: Float[Array, '*lead n'], signs=None) -> Float[Array, '*lead n']:
  """x diag(signs) H / sqrt(n), along the last axis: a rotation, which spreads outliers over all channels.

  The part of n that is a power of two is a fast Walsh-Hadamard transform, of log2 steps; the rest a product with a
  small matrix.

  Args:
    x: float[..., n].
    signs: [n] of 1 and -1; none if not given.

  Returns:
    [..., n], in the dtype of x. The sum is in float32.

  >>> transform(jnp.array([4.0, 0.0, 0.0, 0.0]))
  Array([2., 2., 2., 2.], dtype=float32)
  """
  n = x.shape[-1]
  m = core_order(n)
  y = x.astype(jnp.float32)
  if signs is not None:
    y = y * jnp.broadcast_to(jnp.asarray(signs, jnp.float32), y.shape)
  y = walsh(y.reshape(*x.shape[:-1], m, n // m))                         # [..., m, n / m]
  if m > 1:
    y = jnp.einsum('...ab,ac->...cb', y, jnp.asarray(matrix(m), jnp.float32), precision=jax.lax.Precision.HIGHEST)
  return qarray.cast(y.reshape(x.shape) * jnp.float32(1 / math.sqrt(n)), x.dtype)


def orthonormal(n, signs=None):
  """The matrix R of `transform(x, signs)` = x R: f32[n, n], R R^T = I."""
  H = matrix(n).astype(np.float32) / np.float32(math.sqrt(n))
  return jnp.asarray(H if signs is None else H * np.asarray(signs, np.float32)[:, None])


def randomized(key, n):
  """diag(signs) H / sqrt(n) with random signs: f32[n, n]. QuaRot's R1 and R2."""
  return orthonormal(n, jax.random.rademacher(key, (n,), jnp.float32))


def walsh(x):
  """x H along the last axis, whose length is a power of two, for Sylvester's H: f32[..., 2^k]."""
  n, half = x.shape[-1], 1
  y = x
  while half < n:                                                        # H_2n = H_2 (x) H_n.
    y = y.reshape(*x.shape[:-1], n // (2 * half), 2, half)
    y = jnp.stack([y[..., 0, :] + y[..., 1, :], y[..., 0, :] - y[..., 1, :]], axis=-2)
    half *= 2
  return y.reshape(x.shape)


@functools.lru_cache(maxsize=8)
def matrix(n):
  """A Hadamard matrix: i8[n, n]. H_m (x) Sylvester's, with the smallest m there is.

  >>> matrix(4)[3]
  array([ 1, -1, -1,  1], dtype=int8)
  """
  m = core_order(n)
  core = np.ones((1, 1), np.int8) if m == 1 else _core(m)
  H = np.kron(core, _sylvester(n // m))
  H.setflags(write=False)                                                # It is cached.
  return H


def is_constructible(n):
  """Whether `matrix(n)` exists."""
  try:
    core_order(n)
  except ValueError:
    return False
  return True


def core_order(n):
  """The smallest m = odd 2^b of a known matrix for which n / m is a power of two."""
  m = _search(n) if isinstance(n, int) and n > 0 else None
  if m is None:
    raise ValueError(f'No Hadamard matrix of order {n} is known here: it must be 1, 2 or a multiple of 4, and a '
                     'product of powers of two, of q + 1 or 2 (q + 1) for a prime power q, or of Williamson\'s 4 p. '
                     f'The nearest are {_nearest(n)}. Pad the axis to one of these, or leave it unrotated.')
  return m


@functools.cache
def _search(n):
  """`core_order`, or None."""
  odd = n // (n & -n)
  if odd == 1:
    return 1
  m = odd * 4
  while n % m == 0:
    if _construction(m) is not None:
      return m
    m *= 2
  return None


def _nearest(n):
  """The next smaller and the next larger order that can be made."""
  n = max(int(n), 1)
  below = next(m for m in range(n, 0, -1) if _search(m))
  return below, next(m for m in itertools.count(n + 1) if _search(m))


def _core(m):
  return _construction(m)()


@functools.cache
def _construction(m):
  """A function that makes a matrix of order m = odd 4 2^b, or None."""
  if _prime_power(m - 1) and (m - 1) % 4 == 3:
    return functools.partial(paley1, m - 1)
  if _prime_power(m // 2 - 1) and (m // 2 - 1) % 4 == 1:
    return functools.partial(paley2, m // 2 - 1)
  if _prime_power(m // 4) == m // 4 and _williamson_rows(m // 4) is not None:
    return functools.partial(williamson, m // 4)
  for a in range(12, math.isqrt(m) + 1, 4):
    if m % a == 0 and m // a % 4 == 0 and _construction(a) and _construction(m // a):
      return lambda: np.kron(_core(a), _core(m // a))
  return None


def _sylvester(n):
  """i8[n, n], n a power of two."""
  H = np.ones((1, 1), np.int8)
  while len(H) < n:
    H = np.kron(np.array([[1, 1], [1, -1]], np.int8), H)
  return H


def paley1(q):
  """I + S, S skew with rows [0, 1] and [-1, Q], Q[a, b] = chi(a - b): i8[q + 1, q + 1].

  Paley. On Orthogonal Matrices, 1933. q a prime power, 3 modulo 4.
  """
  S = np.zeros((q + 1, q + 1), np.int8)
  S[0, 1:], S[1:, 0], S[1:, 1:] = 1, -1, _jacobsthal(q)
  return S + np.eye(q + 1, dtype=np.int8)


def paley2(q):
  """C (x) [[1, 1], [1, -1]] + I (x) [[1, -1], [-1, -1]], C with rows [0, 1] and [1, Q]: i8[2 (q + 1), 2 (q + 1)].

  q a prime power, 1 modulo 4.
  """
  C = np.zeros((q + 1, q + 1), np.int8)
  C[0, 1:], C[1:, 0], C[1:, 1:] = 1, 1, _jacobsthal(q)
  two = lambda rows: np.array(rows, np.int8)
  return np.kron(C, two([[1, 1], [1, -1]])) + np.kron(np.eye(q + 1, dtype=np.int8), two([[1, -1], [-1, -1]]))


def williamson(p):
  """[[A, B, C, D], [-B, A, -D, C], [-C, D, A, -B], [-D, -C, B, A]] of symmetric circulants: i8[4 p, 4 p].

  Williamson. Hadamard's Determinant Theorem and the Sum of Four Squares, 1944. It is one if A^2 + B^2 + C^2 + D^2 =
  4 p I, which is to say that the squares of their spectra sum to 4 p at each frequency.
  """
  lag = (np.arange(p)[None, :] - np.arange(p)[:, None]) % p
  A, B, C, D = (row[lag] for row in _williamson_rows(p))
  return np.block([[A, B, C, D], [-B, A, -D, C], [-C, D, A, -B], [-D, -C, B, A]]).astype(np.int8)


@functools.cache
def _williamson_rows(p):
  """The first rows of the four circulants, i8[p] each, or None.

  Searched among rows that are constant on the cosets of a subgroup of Z_p* that holds -1: then they are symmetric, and
  2^classes are few. p a prime above 2.
  """
  for classes in range(1, MOST_CLASSES + 1):
    if (p - 1) % (2 * classes) == 0:
      rows = _candidates(p, classes)
      found = _four_that_sum(np.fft.fft(rows).real ** 2, 4 * p)
      if found is not None:
        return rows[list(found)]
  return None


def _candidates(p, classes):
  """The rows of 1 and -1 with a 1 in front that are constant on the classes g^i <g^classes>: i8[2^classes, p]."""
  power = [pow(_primitive_root(p), k, p) for k in range(p - 1)]
  label = np.zeros(p, int)
  label[power] = np.arange(p - 1) % classes
  rows = np.array(list(itertools.product([1, -1], repeat=classes)), np.int8)[:, label]
  rows[:, 0] = 1
  return rows


def _four_that_sum(spectra, total):
  """Four indices of f64[n, p] whose rows sum to `total` everywhere, or None: pairs are matched with pairs."""
  i, j = np.triu_indices(len(spectra))
  pairs = spectra[i] + spectra[j]
  possible = (pairs <= total + 1e-6).all(1)
  i, j, pairs = i[possible], j[possible], pairs[possible]
  key = lambda v: tuple(np.round(v, 4) + 0.0)                            # + 0.0: -0.0 is another key.
  seen = {key(v): (a, b) for a, b, v in zip(i, j, pairs)}
  for a, b, v in zip(i, j, pairs):
    if key(total - v) in seen:
      return (a, b, *seen[key(total - v)])
  return None


def _primitive_root(p):
  return next(g for g in range(2, p) if len({pow(g, k, p) for k in range(p - 1)}) == p - 1)


def _prime_power(q):
  """The prime of which q is a power, or None."""
  if q < 2:
    return None
  p = next((d for d in range(2, math.isqrt(q) + 1) if q % d == 0), q)
  while q % p == 0:
    q //= p
  return p if q == 1 else None


def _jacobsthal(q):
  """Q[a, b] = chi(a - b), 1 for squares and -1 for others of the field of q elements: i8[q, q]."""
  p = _prime_power(q)
  k = round(math.log(q, p))
  digits = np.array(list(itertools.product(range(p), repeat=k)))         # [q, k]: elements, as polynomials.
  weights = p ** np.arange(k)[::-1]
  chi = -np.ones(q, np.int8)
  chi[_squares(digits, p) @ weights] = 1
  chi[0] = 0
  return chi[((digits[:, None] - digits[None, :]) % p) @ weights]


def _squares(digits, p):
  """The square of each polynomial modulo p and modulo an irreducible one: i64[q, k] -> i64[q, k]."""
  k = digits.shape[1]
  full = np.zeros((len(digits), 2 * k - 1), int)
  for i, j in itertools.product(range(k), repeat=2):
    full[:, i + j] += digits[:, i] * digits[:, j]
  modulus = _irreducible(p, k)
  for top in range(k - 1):                                               # Highest powers first.
    full[:, top + 1:top + k + 1] -= full[:, top:top + 1] * modulus
  return full[:, k - 1:] % p


@functools.cache
def _irreducible(p, k):
  """The coefficients after the leading 1 of an irreducible polynomial of degree k modulo p: i64[k]."""
  if k == 1:
    return np.zeros(1, int)
  monic = lambda d: (np.array((1, *c)) for c in itertools.product(range(p), repeat=d))
  products = {tuple(np.convolve(a, b) % p) for d in range(1, k // 2 + 1) for a in monic(d) for b in monic(k - d)}
  return next(f for f in monic(k) if tuple(f) not in products)[1:]
