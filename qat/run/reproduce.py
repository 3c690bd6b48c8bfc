"""Runs what a paper's page in experiments/ has no result file for, and writes the page's tables again.

    qat reproduce <paper> ... [--scratch runs] [--experiments experiments]
    qat reproduce <paper> ... --scale full

One run at a time, each the command that the page prints, in a folder of `scratch` that pages share. All are in one
process, whose compiled programs serve the seeds after the first. A run that is killed goes on when the same command is
typed again, and what has a result file is not run again. `--scale full` runs nothing: it prints the commands of the
paper's own setting, the hardware that they need, and what the paper reports.
"""

import argparse
import contextlib
import json
import pathlib
import sys
import time

from qat.run import cli
from qat.run import full_scale
from qat.run import pages
from qat.run import papers


def main(argv):
  """Fills the pages of a command line, and writes them."""
  parser = argparse.ArgumentParser(prog='qat reproduce', description=__doc__.splitlines()[0])
  parser.add_argument('papers', nargs='+', metavar='paper', help='a folder of experiments/')
  parser.add_argument('--scratch', default=papers.SCRATCH, help='where the runs work')
  parser.add_argument('--experiments', default='experiments', help='the folder of the pages')
  parser.add_argument('--scale', default='small', choices=('small', 'full'), help="'full' prints the paper's setting")
  args = parser.parse_args(argv)
  if args.scale == 'full':
    print('\n\n'.join(full_scale.text(name, args.experiments) for name in args.papers))
    return
  for page in [papers.load(pathlib.Path(args.experiments) / name) for name in args.papers]:
    fill(page, pathlib.Path(args.scratch).resolve())
    pages.main(page.folder)


def fill(page, scratch):
  """Runs what has no result file, in order; `scratch` is absolute."""
  missing = page.missing()
  print(f'{page.folder}: {len(missing)} of {len(page.commands())} runs to do.', flush=True)
  for i, command in enumerate(missing):
    print(f'{i + 1}/{len(missing)}  {command}', flush=True)
    began = time.monotonic()
    result = papers.kept(run(command, scratch, root=page.folder.resolve().parents[1]), command, scratch)
    page.store(command, result)
    name = page.metric()['name']
    print(f'    {name} {result["metrics"][name]:.6g}, {time.monotonic() - began:.0f} s', flush=True)


def run(command, scratch, root):
  """The result of a Command, after those it needs; what has run in `scratch` before is not run again.

  Args:
    command: papers.Command.
    scratch: pathlib.Path, absolute.
    root: the folder that configs/ is in.
  """
  for need in command.needs.values():
    run(need, scratch, root)
  path = pathlib.Path(command.workdir(scratch), 'result.json')
  if not path.is_file():
    path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.chdir(root), open(path.parent / 'log.txt', 'a') as log, contextlib.redirect_stdout(log):
      cli.run(*command.arguments(scratch))
    if not path.is_file():
      raise ValueError(f'{command} was stopped before its end. Type qat reproduce again, and it goes on.')
  return json.loads(path.read_text())


if __name__ == '__main__':
  sys.exit(cli.main(['reproduce', *sys.argv[1:]]))
