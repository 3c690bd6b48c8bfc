import numpy as np
import pytest

from qat.models.pretrained import names

TABLE = [
    names.Name('stage.{i}.layer.{j}.w', 'stages/{i}/{j}/kernel', names.transposed),
    names.Name('norm.w', 'norm/scale'),
]


@pytest.mark.parametrize('path, theirs', [
    ('stages/3/12/kernel', 'stage.3.layer.12.w'), ('norm/scale', 'norm.w')])
def test_a_path_finds_its_tensor(path, theirs):
  assert names.find(TABLE, path)[1] == theirs


@pytest.mark.parametrize('path', ['stages/3/x/kernel', 'stages/3/12/kernel/more', 'norm', 'norm/scal', 'normXscale'])
def test_other_paths_find_none(path):
  with pytest.raises(ValueError, match=f"Variable '{path}': no row of the table of names is for it"):
    names.find(TABLE, path)


def test_a_part_of_what_cannot_be_split():
  with pytest.raises(ValueError, match='equal division'):
    names.part(0, 3)(np.ones(4))
