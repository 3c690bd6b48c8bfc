"""Names resolve by getattr."""

import optax
import pytest

from qat.run import names


def test_a_wrong_name_says_what_is_near():
  with pytest.raises(ValueError, match="optimizer.name 'adamww': optax has no 'adamww'. Did you mean 'adamw'"):
    names.resolve(optax, 'adamww', 'optimizer.name')


def test_private_names_are_not_reachable():
  with pytest.raises(ValueError, match='has no'):
    names.resolve(optax, '__loader__', 'optimizer.name')
