"""What must be known of a family of models to read a folder of it, and how its config.json is read.

A family is a value (Family); `families.FAMILIES` lists them by `model_type`. To add one: a table of names, and a
function from config.json to the network, in a file of its own; then one line in families.py.
"""

import collections.abc
import dataclasses


@dataclasses.dataclass(frozen=True)
class Family:
  """Networks whose tensors have the same names.

  Attributes:
    make_config: Settings -> the sizes and the form of the network.
    make_model: (what make_config gave, dtype) -> nnx.Module; it is traced and never run.
    table: list[names.Name], a row for every variable that the networks may have.
    prefix: of tensors' names, which files have or have not; the table has it not.
    ignored: regular expressions of names without `prefix`; tensors that need not be used.
  """

  make_config: collections.abc.Callable
  make_model: collections.abc.Callable
  table: list
  prefix: str = ''
  ignored: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Settings:
  """A config.json that says where it is when something is wrong with it."""

  values: dict
  where: object

  def get(self, key, default=None):
    """The value of a key; the default stands for null as well, as it does there."""
    value = self.values.get(key)
    return default if value is None else value

  def size(self, key, default=None):
    """A positive integer, which must be there unless there is a default."""
    value = self.get(key, default)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
      raise ValueError(f'{self.where}: {key} is {value!r}, and should be a positive integer. '
                       'The file is not whole, or of another family: get it anew.')
    return value

  def number(self, key, default=None):
    """A float, which must be there unless there is a default."""
    value = self.get(key, default)
    if not isinstance(value, (int, float)) or isinstance(value, bool):
      raise ValueError(f'{self.where}: {key} is {value!r}, and should be a number. '
                       'The file is not whole, or of another family: get it anew.')
    return float(value)

  def require(self, **forms):
    """Refuses a config that asks for another form than the one that is built; keys that are absent or null agree."""
    for key, expected in forms.items():
      if (value := self.get(key, expected)) != expected:
        raise ValueError(f'{self.where}: {key} is {value!r}, and networks of model_type {self.get("model_type")!r} are '
                         f'built with {expected!r} only. Take another checkpoint.')
