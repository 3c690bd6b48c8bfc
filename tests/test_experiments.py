"""Every page of experiments/ says what its result files say, has all of them, and is data."""

import ast
import json
import pathlib
import re

import pytest

from qat.run import config as configs
from qat.run import pages
from qat.run import papers

ROOT = pathlib.Path(__file__).parents[1]
EXPERIMENTS = ROOT / 'experiments'
PAGES = papers.pages(EXPERIMENTS)


@pytest.fixture(params=PAGES)
def page(request):
  return papers.load(EXPERIMENTS / request.param)


def test_there_are_pages():
  assert PAGES


def test_tables_are_those_of_the_result_files(page):
  """It also fails where a run that the page declares has no result, or one of another command."""
  pages.check(page.folder / 'README.md', pages.body(page))


def test_the_index_is_that_of_the_pages():
  pages.check(EXPERIMENTS / 'README.md', pages.index(EXPERIMENTS))


def test_there_are_three_seeds_or_more_and_no_file_that_nothing_reads(page):
  assert len(set(page.seeds)) >= 3
  assert {path.stem for path in (page.folder / 'results').glob('*.json')} == set(page.runs)
  for run in page.runs:
    assert len(json.loads(page.path(run).read_text())) == len(page.seeds), run


def test_result_files_are_of_no_machine(page):
  for run in page.runs:
    text = page.path(run).read_text()
    assert not re.search(r'"[^"]*(?:/tmp|/home|/root|/work|/Users)/', text), run
    for result in json.loads(text):
      assert result['commit'] and result['versions']['jax'] and result['device']['kind']


def test_commands_are_of_configs_that_are_there(page):
  for run in page.runs:
    command = page.command(run, page.seeds[0])
    if command.program == 'merge':                                              # Its flags are no leaves.
      assert page.runs[papers.needed(page.runs[run])[0]]['program'] == 'finetune'
      continue
    _, _, source, *_ = command.arguments()
    there = dict(configs.leaves(configs.build(f'{ROOT}/{source}')))
    for override in command.overrides:
      assert override[len('--config.'):].split('=')[0] in there, override


def test_prose_has_the_parts_of_a_page(page):
  text = (page.folder / 'README.md').read_text()
  assert text.startswith('# ') and page.paper['link'] in text and page.paper['title'].split(',')[0] in text
  assert '## Result' in text and '## Differences from the paper' in text


@pytest.mark.parametrize('path', sorted(EXPERIMENTS.rglob('*.py')), ids=lambda p: str(p.relative_to(EXPERIMENTS)))
def test_pages_are_data(path):
  names = [name for node in ast.walk(ast.parse(path.read_text())) for name in (
      [a.name for a in node.names] if isinstance(node, ast.Import) else
      [node.module] if isinstance(node, ast.ImportFrom) else [])]
  assert all(name.split('.')[0] == 'experiments' for name in names), names
