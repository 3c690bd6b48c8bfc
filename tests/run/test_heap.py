"""What the heap keeps is given back."""

import ctypes
import pathlib

import jax
import numpy as np
import pytest

from qat.run import heap

PAGES = pathlib.Path('/proc/self/statm')
glibc = pytest.mark.skipif(not hasattr(ctypes.CDLL(None), 'malloc_trim') or not PAGES.exists(),
                           reason="malloc_trim is glibc's, and statm Linux's")


def resident_pages():
  return int(PAGES.read_text().split()[1])


@glibc
def test_holes_between_arrays_are_given_back():
  arrays = [np.ones(4096) for _ in range(2000)]                           # 32 KiB each: from the heap, 8 pages.
  del arrays[::2]
  before = resident_pages()
  heap.release()
  assert before - resident_pages() > 0.5 * 1000 * 8


def test_compiled_programs_are_forgotten():
  traced = []
  f = jax.jit(lambda x: traced.append(1) or x + 1)
  f(1.0), f(1.0)
  assert len(traced) == 1
  heap.release()
  f(1.0)
  assert len(traced) == 2
