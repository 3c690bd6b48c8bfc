"""Which failures are messages to the user, and how they read: one paragraph.

An error that the project's own code raises is a message: its text says what was asked,
what is there and what to do. So is an error of the operating system. Anything else is a
defect, and keeps its traceback.
"""

import errno
import pathlib
import traceback

from absl import flags

PROJECT = pathlib.Path(__file__).resolve().parents[2]
OURS = (PROJECT / 'qat', PROJECT / 'configs')


class NonFinite(ValueError):
  """Training met a number that is not finite."""


def paragraph(error):
  """The text for the user, or None when `error` is a defect."""
  if full := disk_full(error):
    return full
  if isinstance(error, (OSError, flags.Error)):
    return join(error)
  if isinstance(error, (ValueError, TypeError, NotImplementedError)) and is_ours(error):
    return join(error)
  return None


def join(error):
  """The text of an error on one line."""
  return ' '.join(str(error).split())


def disk_full(error):
  """The message for a full disk, wherever in the chain of causes it hides; else None."""
  seen = error
  while seen is not None:
    if getattr(seen, 'errno', None) == errno.ENOSPC or 'No space left on device' in str(seen):
      path = getattr(seen, 'filename', None)
      where = f' while writing {path}' if path else ''
      detail = getattr(seen, 'strerror', None) or 'no space left on device'
      return (f'The disk is full{where}: {detail}. Free some space, then run the same command again: it goes on '
              'from the last whole checkpoint.')
    seen = seen.__cause__ or seen.__context__
  return None


def is_ours(error):
  """Whether a `raise` of the project's (or of a config's) raised `error`, and not a slip such as [][1]."""
  frames = traceback.extract_tb(error.__traceback__)
  if not frames:
    return False
  raised = pathlib.Path(frames[-1].filename).resolve()
  ours = any(raised.is_relative_to(folder) for folder in OURS) or raised.parent.name == 'configs'
  return ours and (frames[-1].line or '').lstrip().startswith('raise')
