"""SIGTERM and Ctrl-C: finish the step, save, leave."""

import signal


class Stop:
  """True once the first of the signals has come; a second one kills as usual."""

  SIGNALS = (signal.SIGTERM, signal.SIGINT)

  def __init__(self):
    self.asked = None

  def __enter__(self):
    self.before = {s: signal.signal(s, self._hear) for s in self.SIGNALS}
    return self

  def __exit__(self, *_):
    for s, handler in self.before.items():
      signal.signal(s, handler)

  def __bool__(self):
    return self.asked is not None

  def _hear(self, number, _):
    self.asked = signal.Signals(number)
    for s, handler in self.before.items():
      signal.signal(s, handler)
