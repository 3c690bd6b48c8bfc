"""The README's Python runs as it stands, block after block."""

import pathlib
import re

README = pathlib.Path(__file__).parents[1] / 'README.md'


def test_the_examples_run(capsys):
  blocks = re.findall(r'```python\n(.*?)```', README.read_text(), re.DOTALL)
  assert len(blocks) >= 2
  names = {}
  for block in blocks:
    exec(compile(block, README.name, 'exec'), names)
  assert 'layers/0' in capsys.readouterr().out
  assert len(names['recipe']) > 1
