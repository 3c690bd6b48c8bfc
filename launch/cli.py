"""The command line that all launchers share: resources as flags, commands as arguments."""

import argparse
import ast
import json
import sys

from launch import job as values
from launch import pool


def main(launch, doc, argv=None):
  """Launches the commands of a command line. Returns the exit code: 0 all finished, 1 not all, 2 wrong input."""
  parser = argparse.ArgumentParser(description=doc.splitlines()[0])
  parser.add_argument('commands', nargs='+', metavar="'qat train ...'", help='a command, as one quoted word')
  parser.add_argument('--dry_run', action='store_true', help='print what would be submitted')
  add_resources(parser)
  args = parser.parse_args(argv)
  try:
    endings = launch(args.commands, resources(args), dry_run=args.dry_run)
  except (ValueError, OSError, ImportError) as error:
    print(f'launch: {paragraph(error)}', file=sys.stderr)
    return 2
  return 0 if args.dry_run else pool.exit_code(endings, len(args.commands))


def add_resources(parser):
  """Adds a flag for each field of Resources."""
  default = values.Resources()
  parser.add_argument('--workers', type=int, default=default.workers, help='jobs at once')
  parser.add_argument('--cpus', type=int, default=default.cpus, help='of each job')
  parser.add_argument('--gpus', type=int, default=default.gpus, help='of each job')
  parser.add_argument('--memory_gb', type=float, default=default.memory_gb, help="of each job; 0: the engine's default")
  parser.add_argument('--hours', type=float, default=default.hours, help='of each job, at most')
  parser.add_argument('--restarts', type=int, default=default.restarts, help='of a job that was preempted')
  parser.add_argument('--option', action='append', default=[], metavar='NAME=VALUE',
                      help="of the engine, by its own name: partition=gpu (SLURM), accelerators=H100:1 (SkyPilot)")


def resources(args):
  """The Resources of parsed flags."""
  return values.Resources(args.workers, args.cpus, args.gpus, args.memory_gb, args.hours, args.restarts,
                          dict(map(_option, args.option)))


def _option(text):
  """('name', value) of 'name=value'; numbers, booleans and lists as Python or JSON write them."""
  name, equals, value = text.partition('=')
  if not (name and equals):
    raise ValueError(f'--option {text!r} is no NAME=VALUE. Write it as --option partition=gpu.')
  for read in (ast.literal_eval, json.loads):
    try:
      return name, read(value)
    except (ValueError, SyntaxError):
      continue
  return name, value


def paragraph(error):
  """The text of an error on one line."""
  return ' '.join(str(error).split())
