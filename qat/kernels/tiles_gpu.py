"""How products on Hopper are cut into tiles: what fits, a guess, and candidates for a search.

A tile is `rows` of x by `columns` of the weight for each of two warpgroups, which go down K in steps of `depth`, of
which `stages` are in flight; `splits` blocks share a sum, so that all processors have work where there are few tiles.
"""

import dataclasses

from qat.kernels import unpack_gpu

DEPTH = 128                        # Weights are padded to multiples of it, in both directions.
AFTER_ROWS = 64                    # Up to here scales multiply products; beyond, weights.
WARPGROUPS, PROCESSORS = 2, 132
SHARED_BYTES = 227 * 1024          # Of a block, on sm_90.
REGISTERS = 176                    # Of the 232 that a multiplying thread may have, for the left operand and the sums.


@dataclasses.dataclass(frozen=True)
class Tiles:
  """How a product is cut.

  Attributes:
    rows: of x in a tile, a multiple of 8.
    columns: of the weight for each of the two warpgroups, a multiple of 64.
    depth: of a step along K, a multiple of 128.
    stages: steps in flight.
    splits: blocks that share a sum along K.
  """
  rows: int
  columns: int = 64
  depth: int = DEPTH
  stages: int = 6
  splits: int = 1

  width = property(lambda self: WARPGROUPS * self.columns)
  dtype_bytes = property(lambda self: 4 if self.splits > 1 else 2)       # Of the result.


def heuristic(m, p):
  """Tiles for m rows by a Prepared weight: as wide as registers hold, and enough splits to fill the processors."""
  n, k = p.arrays['codes'].shape
  rows = min(-(-m // 8) * 8, AFTER_ROWS if m <= AFTER_ROWS else 128)
  tiles, wide = Tiles(rows), Tiles(rows, 128)
  if n % wide.width == 0 and _registers(p, wide, after(p, tiles)) <= REGISTERS:
    tiles = wide
  return split(m, n, k, tiles, lambda tiles: shared_bytes(p, tiles))


def split(m, n, k, tiles, bytes_of):
  """`tiles` with enough splits to fill the processors, and as many stages as there are steps and shared memory for."""
  steps = k // tiles.depth
  wanted = 0.9 * PROCESSORS / (-(-m // tiles.rows) * (n // tiles.width))
  divisors = [s for s in range(1, max(steps // 2, 1) + 1) if steps % s == 0]
  splits = next((s for s in divisors if s >= wanted), divisors[-1])
  tiles = dataclasses.replace(tiles, splits=splits, stages=min(tiles.stages, steps // splits))
  while tiles.stages > 1 and bytes_of(tiles) > SHARED_BYTES:
    tiles = dataclasses.replace(tiles, stages=tiles.stages - 1)
  return tiles


def candidates(m, p):
  """Tiles that fit m rows: the heuristic's, then those that differ from it the least."""
  first = heuristic(m, p)
  steps = p.arrays['codes'].shape[1] // DEPTH
  splits = sorted({first.splits, *(s for s in (1, 2, 4, 8, 16) if steps % s == 0)})
  rows = {first.rows, *(r for r in (8, 16, 32, 64, 128) if m <= r < 2 * m or r < m and m > 64 and r >= 64)}
  found = [Tiles(r, c, d, stages, s) for r in sorted(rows) for c in (64, 128) for d in (128, 256)
           for stages in (4, 6, 8) for s in splits]
  differences = lambda t: sum(a != b for a, b in zip(dataclasses.astuple(t), dataclasses.astuple(first)))
  return [first, *sorted((t for t in found if t != first and unfit(p, t) is None), key=differences)]


def unfit(p, tiles):
  """Why a product by a Prepared weight cannot be cut like this, or None."""
  n, k = p.arrays['codes'].shape
  group = group_size(p)
  if why := untiled(n, k, tiles) or too_large(tiles, shared_bytes(p, tiles)):
    return why
  if group % tiles.depth and tiles.depth % group:
    return f'{tiles}: steps cross the edges of groups of {group}'
  if (count := _registers(p, tiles, after(p, tiles))) > REGISTERS:
    return f'{tiles} keep {count} registers of a thread for operands and sums, of {REGISTERS}'
  return None


def untiled(n, k, tiles):
  """Why a weight padded to k inputs and n outputs is not cut into such tiles, or None."""
  if tiles.rows % 8 or not 8 <= tiles.rows <= 256 or tiles.columns % 64 or tiles.depth % DEPTH or tiles.stages < 1:
    return f'{tiles}: rows are multiples of 8 up to 256, columns of 64 and depth of {DEPTH}'
  if n % tiles.width or k % (tiles.depth * tiles.splits):
    return (f'{tiles} do not tile a weight padded to {k} inputs and {n} outputs: they take {tiles.width} outputs, and '
            f'{tiles.depth * tiles.splits} inputs')
  if tiles.splits * tiles.stages * tiles.depth > k:
    return f'{tiles}: a split of {k} inputs has fewer steps than stages'
  return None


def too_large(tiles, size):
  """Why tiles of `size` bytes do not fit, or None."""
  return f'{tiles} take {size} bytes of shared memory, of {SHARED_BYTES}' if size > SHARED_BYTES else None


def group_size(p):
  """How many inputs share a scale, of the padded weight."""
  return p.arrays['codes'].shape[1] // p.arrays['scale'].shape[0]


def after(p, tiles):
  """Whether scales multiply products, and not weights."""
  return tiles.rows <= AFTER_ROWS and _registers(p, tiles, True) <= REGISTERS


def _registers(p, tiles, scaled_after):
  """32-bit registers of a thread that hold the left operand (bf16) and the accumulators (f32)."""
  sums = 1 + parts(p, tiles) if scaled_after else 1
  return tiles.columns * (tiles.depth // 2 + sums * tiles.rows) // 128


def parts(p, tiles):
  """Groups in a step, or 1."""
  return max(tiles.depth // group_size(p), 1)


def shared_bytes(p, tiles):
  """Of the stages and of the result."""
  bits = unpack_gpu.unpacking(p.spec.format).bits
  vectors = parts(p, tiles) * (8 * tiles.width + 4 * tiles.rows)         # Scales, offsets and sums, in f32.
  step = 2 * tiles.rows * tiles.depth + tiles.width * tiles.depth * bits // 8 + vectors
  return tiles.stages * step + tiles.dtype_bytes * tiles.width * tiles.rows + 1024
