"""The rooms of qat/ import each other only along the arrows drawn in docs/architecture.md."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[1]

# Each room may import itself and the rooms on its line.
MAY_IMPORT = {
    'core': '',
    'models': '',
    'quantizers': 'core',
    'kernels': 'core',
    'nn': 'core quantizers kernels',
    'ptq': 'core quantizers nn',
    'evals': 'core nn',
    'export': 'core nn models',
    'run': 'core models quantizers kernels nn ptq evals export',
}


def imported_modules(source):
  """Dotted names, of which the last may be a module or something in one."""
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, ast.Import):
      yield from (a.name for a in node.names)
    elif isinstance(node, ast.ImportFrom):
      dots = '.' * node.level
      yield from (f'{dots}{node.module or ""}.{a.name}' for a in node.names)


def imported_rooms(source):
  return {n.split('.')[1] for n in imported_modules(source) if n.startswith('qat.')}


@pytest.mark.parametrize('path', sorted((ROOT / 'qat').glob('*/**/*.py')),
                         ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_follow_the_arrows(path):
  room = path.relative_to(ROOT / 'qat').parts[0]
  wrong = imported_rooms(path.read_text()) - {room, *MAY_IMPORT[room].split()}
  assert not wrong, f'qat/{room} may import [{MAY_IMPORT[room]}] of qat, not {sorted(wrong)}'


def test_imports_are_absolute():
  """Or the test above would not see them."""
  for path in (ROOT / 'qat').rglob('*.py'):
    assert not [n for n in imported_modules(path.read_text()) if n.startswith('.')], path


def test_configs_and_launchers_speak_to_qat_by_the_command_line():
  for path in [*(ROOT / 'configs').rglob('*.py'), *(ROOT / 'launch').rglob('*.py')]:
    assert not [n for n in imported_modules(path.read_text()) if n.split('.')[0] == 'qat'], path


def test_the_reader_of_imports_sees_every_form():
  source = 'import qat.run.train\nfrom qat import nn\nfrom qat.core import formats\nimport jax'
  assert imported_rooms(source) == {'run', 'nn', 'core'}
