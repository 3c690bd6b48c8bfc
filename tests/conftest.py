"""What all tests share: strict arithmetic, and compilations kept between runs."""

import os
import pathlib

import jax
import pytest

MAPS, MOST_MAPS = pathlib.Path('/proc/self/maps'), 20_000  # Linux ends a process at 65,530.
# Where programs that tests start keep their compilations too, each of them: a hundred small ones take them seconds.
CACHE = os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', str(pathlib.Path(__file__).parents[1] / '.cache' / 'jax'))
CACHE_FROM_SECONDS = float(os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0'))

jax.config.update('jax_numpy_rank_promotion', 'raise')
# One compile of a small op takes longer than most tests do.
jax.config.update('jax_compilation_cache_dir', CACHE)
jax.config.update('jax_persistent_cache_min_compile_time_secs', CACHE_FROM_SECONDS)


@pytest.fixture(autouse=True)
def strict_dtypes(request):
  """Arithmetic never promotes silently. Flax's norms and optax's Adam do: nn and run are exempt."""
  strict = request.path.parent.name in ('core', 'quantizers', 'ptq', 'kernels')
  with jax.numpy_dtype_promotion('strict' if strict else 'standard'):
    yield


@pytest.fixture(autouse=True, scope='module')
def few_programs():
  """Each compiled program maps memory, of which a process has a limit: it crashes there."""
  yield
  if MAPS.exists() and len(MAPS.read_bytes().splitlines()) > MOST_MAPS:
    jax.clear_caches()
