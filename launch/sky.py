"""Jobs on rented machines of any cloud, by SkyPilot's managed jobs. https://docs.skypilot.co

    python -m launch.sky --workers 8 --option bucket=s3://my-runs --option accelerators=H100:1 'qat train ...'

Each job is a task file, workdir/sky.yaml, and `sky jobs launch` on it. Workdirs are relative, and their first folder
(runs/) is a mount of the bucket, there and here, so that what a run leaves outlives its machine. SkyPilot itself
recovers a machine that is taken away; the command then goes on from its last checkpoint. A launcher that was killed
and starts again looks for the job that it left before it launches another.
"""

import json
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys

from launch import cli
from launch import local
from launch import pool

OPTIONS = ('accelerators', 'bucket', 'infra', 'use_spot', 'setup', 'image_id', 'instance_type')
SETUP = 'pip install --editable .'
# sky.exceptions.JobExitCode: the stream of the log broke; there is no such job; someone cancelled it.
NOT_FINISHED, NOT_FOUND, CANCELLED = 101, 102, 103
# A task file that is there tells that a job was launched and nobody has seen its end.
SCRIPT = '''\
if [ -f {file} ]; then sky jobs logs --name {name}; code=$?; else code={missing}; fi
if [ $code = {missing} ]; then cp {file}.new {file}; sky jobs launch --yes --name {name} {file}; code=$?; fi
[ $code = {unknown} ] || rm -f {file}
exit $code'''


def launch(commands, resources, dry_run=False):
  """{Job: Ending}. Runs commands (str, words or Jobs) as managed jobs, or prints their task files."""
  return pool.launch(Sky, commands, resources, dry_run)


def task(job, resources):
  """A job as SkyPilot's task: a dict, as its YAML holds it. https://docs.skypilot.co/en/latest/reference/yaml-spec.html"""
  options = dict(resources.options)
  folder = pathlib.PurePosixPath(job.workdir)
  if folder.is_absolute() or '..' in folder.parts or len(folder.parts) < 2:
    raise ValueError(f'Workdir {job.workdir!r}: SkyPilot mounts the bucket as the first folder of a relative path. '
                     'Choose one such as runs/<name>.')
  if 'bucket' not in options:
    raise ValueError('Option bucket is not given: what a run leaves would be lost with its machine. Add --option '
                     f'bucket=s3://<yours>, and mount it here as {folder.parts[0]}/ as well.')
  asked = dict(cpus=f'{resources.cpus}+', memory=f'{resources.memory_gb:g}+' if resources.memory_gb else None,
               accelerators=options.get('accelerators'), use_spot=options.get('use_spot', True),
               infra=options.get('infra'), image_id=options.get('image_id'), instance_type=options.get('instance_type'))
  return dict(
      name=name(job), workdir='.', resources={k: v for k, v in asked.items() if v is not None},
      file_mounts={f'~/sky_workdir/{folder.parts[0]}': dict(source=options['bucket'], mode='MOUNT')},
      setup=options.get('setup', SETUP), run=f'mkdir -p {shlex.quote(str(folder))} && {job}')


def name(job):
  """A job's name in the letters that clouds allow."""
  return 'qat-' + re.sub('[^a-z0-9]+', '-', job.name.lower())[-40:].strip('-')


def yaml(value, indent=''):
  """A task as YAML; scalars are written as JSON, which YAML reads.

  >>> print(yaml(dict(name='a', resources=dict(cpus='4+'))), end='')
  name: "a"
  resources:
    cpus: "4+"
  """
  lines = []
  for key, inner in value.items():
    if isinstance(inner, dict):
      lines.append(f'{indent}{key}:\n{yaml(inner, indent + "  ")}')
    else:
      lines.append(f'{indent}{key}: {json.dumps(inner)}\n')
  return ''.join(lines)


class Sky(local.Local):
  """Processes that wait for managed jobs. A handle is (Popen, worker, Job)."""

  OPTIONS = OPTIONS

  def start(self, job):
    if shutil.which('sky') is None:
      raise ImportError("launch.sky needs the program 'sky', which is not installed. Run: pip install 'skypilot[gcp]' "
                        '(or the cloud of yours), or use --launcher local.')
    folder = pathlib.Path(job.workdir)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / 'sky.yaml.new').write_text(yaml(task(job, self.resources)))
    return *super().start(job), job

  def words(self, job, worker):
    file = pathlib.Path(job.workdir, 'sky.yaml')
    script = SCRIPT.format(file=shlex.quote(str(file)), name=name(job), missing=NOT_FOUND, unknown=NOT_FINISHED)
    return 'sh', '-c', script

  def environment(self, worker):
    return None

  def code(self, handle):
    code = super().code(handle[:2])
    return -signal.SIGTERM if code in (NOT_FINISHED, CANCELLED) else code

  def stop(self, handle):
    """Cancels the job in the cloud; the process that waits for it then sees it end."""
    subprocess.run(['sky', 'jobs', 'cancel', '--yes', '--name', name(handle[2])], capture_output=True)

  def describe(self, jobs):
    return '\n'.join(f'# sky jobs launch --yes --name {name(job)} {job.workdir}/sky.yaml\n'
                     f'{yaml(task(job, self.resources))}' for job in jobs)


if __name__ == '__main__':
  sys.exit(cli.main(launch, __doc__))
