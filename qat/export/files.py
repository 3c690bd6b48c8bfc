"""Files that are whole or not there."""

import os


def write(path, data):
  """Writes bytes beside `path`, and renames: whoever looks sees the old file or the whole new one."""
  beside = path.with_name(f'{path.name}.partial')
  beside.write_bytes(data)
  os.replace(beside, path)
