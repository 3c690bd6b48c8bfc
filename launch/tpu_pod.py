"""Jobs on Cloud TPU pod slices: the same command on every host of a slice, by gcloud.

    python -m launch.tpu_pod --option pods=v5e-a,v5e-b --option zone=us-west4-a [--dry_run] 'qat train ...'
https://cloud.google.com/sdk/gcloud/reference/compute/tpus/tpu-vm/ssh

Each worker of the launcher is one slice, so there are as many workers as pods. The hosts find each other through JAX's
own runtime, which QAT_COORDINATOR=auto tells `qat train` and `qat finetune` to ask. Workdirs must be on what they share
(a Filestore or bucket mounted at the same path). On each host the command waits for the one before it to leave the
chips.
"""

import dataclasses
import shlex
import shutil
import sys

from launch import cli
from launch import local
from launch import pool

OPTIONS = ('pods', 'zone', 'project', 'folder')
FOLDER = '~/qat'                  # Where the repository is on each host.
TOGETHER = 'QAT_COORDINATOR=auto'  # JAX asks Cloud TPU for the other hosts.
HOST_LOCK = '/tmp/launch.lock'    # One process at a time has the chips of a host.


def launch(commands, resources, dry_run=False):
  """{Job: Ending}. Runs commands (str, words or Jobs) on pod slices, or prints the command for each host."""
  return pool.launch(TpuPod, commands, resources, dry_run)


def ssh(job, pod, options):
  """gcloud's words that run a job on all hosts of a pod."""
  folder = options.get('folder', FOLDER)
  remote = f'cd {folder} && . .venv/bin/activate && exec env {TOGETHER} flock {HOST_LOCK} {job}'
  where = [f'--{name}={options[name]}' for name in ('zone', 'project') if name in options]
  return ['gcloud', 'compute', 'tpus', 'tpu-vm', 'ssh', pod, *where, '--worker=all', f'--command={remote}']


class TpuPod(local.Local):
  """Processes of gcloud, one a pod."""

  OPTIONS = OPTIONS

  def __init__(self, resources):
    pods = resources.options.get('pods')
    if not pods:
      raise ValueError('Option pods is not given: there is nothing to run on. Add --option pods=<name>,<name>, as '
                       '`gcloud compute tpus tpu-vm list` prints them.')
    self.pods = pods.split(',') if isinstance(pods, str) else list(pods)
    if resources.workers > len(self.pods):
      raise ValueError(f'workers={resources.workers}: of {len(self.pods)} pods each runs one job at a time. '
                       f'Use --workers {len(self.pods)}, or name more pods.')
    super().__init__(dataclasses.replace(resources, gpus=0))

  def start(self, job):
    if shutil.which('gcloud') is None:
      raise ImportError("launch.tpu_pod needs the program 'gcloud', which is not installed. Install the Google Cloud "
                        'CLI, or use --launcher local on the TPU VM itself.')
    return super().start(job)

  def words(self, job, worker):
    return ssh(job, self.pods[worker], self.resources.options)

  def describe(self, jobs):
    return '\n'.join(shlex.join(ssh(job, self.pods[i % len(self.pods)], self.resources.options))
                     for i, job in enumerate(jobs))


if __name__ == '__main__':
  sys.exit(cli.main(launch, __doc__))
