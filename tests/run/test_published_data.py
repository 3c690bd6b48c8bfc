"""Programs run on ImageNet, CIFAR-10, C4 and WikiText as they lie on disk, and go on where they were stopped."""

import json
import pathlib
import re
import shutil

import pytest

from qat.run import checkpoint
from qat.run import cli
from tests.run import tiny_data, tiny_finetune

ROOT = pathlib.Path(__file__).parents[2]
END = '<|endoftext|>'


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """All sets in all forms."""
  root = tmp_path_factory.mktemp('published')
  tiny_data.image_folder(root / 'imagenet')
  tiny_data.cifar_batches(root / 'cifar')
  tiny_data.c4_files(root / 'c4')
  tiny_data.wikitext_parquet(root / 'wikitext')
  tiny_data.wikitext_parquet(root / 'wikitext', 'wikitext-2-raw-v1')
  tiny_data.tokenizer(root)
  tiny_finetune.network(root / 'network')
  for kind in (tiny_data.Imagenet2012, tiny_data.Cifar10, tiny_data.C4, tiny_data.Wikitext):
    tiny_data.prepare(kind, root / 'tfds')
  return root


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
  monkeypatch.setenv('QAT_CACHE', str(tmp_path_factory.getbasetemp() / 'cache'))


def run(program, config, workdir, **leaves):
  """The result of a program that must end well."""
  overrides = [f'--config.{name}={value}' for name, value in leaves.items()]
  assert cli.main([program, f'--config={ROOT}/configs/{config}', f'--workdir={workdir}', *overrides]) == 0
  return json.loads((workdir / 'result.json').read_text())


def texts(folder, form):
  """The leaves of a corpus."""
  return {'data.data_dir': folder / form, 'data.options.tokenizer': folder, 'data.options.separator': END,
          'model.vocab_size': tiny_finetune.tokenizer().get_vocab_size()}


@pytest.mark.parametrize('form', ['imagenet', pytest.param('tfds', marks=pytest.mark.slow)])
def test_imagenet_trains_by_lsq(folder, tmp_path, form):
  result = run('train', 'imagenet_resnet.py:augment=strong,smoke', tmp_path,
               **{'data.data_dir': folder / form, 'data.test': 'validation', 'model.classes': 3})
  assert result['steps'] == 2 and result['frozen_equals_trained'] and 3.9 < result['bits_per_weight'] < 5


@pytest.mark.parametrize('form', ['cifar', 'tfds'])
def test_cifar_trains(folder, tmp_path, form):
  result = run('train', 'cifar10_resnet.py:quantizer=float,smoke', tmp_path,
               **{'data.data_dir': folder / form, 'data.test': 'test'})
  assert result['steps'] == 2 and 0 <= result['metrics']['accuracy'] <= 1


@pytest.mark.parametrize('name', ['c4', 'wikitext'])
def test_corpora_train_and_files_are_as_tfds(folder, tmp_path, name):
  results = [run('train', f'bitnet_700m.py:data={name},smoke', tmp_path / form, **texts(folder, form))
             for form in (name, 'tfds')]
  assert all(r['frozen_equals_trained'] and r['steps'] == 2 for r in results)
  assert results[0]['metrics'] == results[1]['metrics'] and results[0]['metrics']['loss'] < 7


@pytest.mark.parametrize('config, leaves', [
    ('cifar10_resnet.py:quantizer=float,smoke', lambda root: {'data.data_dir': root / 'cifar', 'data.test': 'test'}),
    ('bitnet_700m.py:data=c4,smoke', lambda root: texts(root, 'c4'))], ids=['cifar10', 'c4'])
def test_a_run_goes_on_to_the_same_bytes(folder, tmp_path, config, leaves):
  """From its second step of four, as if it had been killed then: pixels and rows are drawn as they would have been."""
  straight, resumed = tmp_path / 'a', tmp_path / 'b'
  leaves = leaves(folder) | {'total_steps': 4, 'eval.every_steps': 4}
  run('train', config, straight, **leaves)
  shutil.copytree(straight, resumed)
  for path in (resumed / 'checkpoints').iterdir():
    if path.name.isdigit() and int(path.name) > 3:
      shutil.rmtree(path)
  (resumed / 'result.json').unlink()
  run('train', config, resumed, **leaves)
  assert final(straight) == final(resumed)


def final(workdir):
  """{name: bytes} of the last checkpoint."""
  return {name: checkpoint.array_of(workdir, 4, name).tobytes() for name in checkpoint.about(workdir, 4)['checksums']}


def test_a_published_decoder_is_quantized_by_the_papers_protocol(folder, tmp_path):
  result = run('ptq', 'llama2_7b.py:method=gptq,bits=3,block=32,smoke', tmp_path, **{
      'pretrained': folder / 'network', 'calibration.data_dir': folder / 'c4', 'eval.data_dir': folder / 'wikitext'})
  assert 'wikitext wikitext-2-raw-v1, test' in result['about']['perplexity']
  assert '4 x 16 tokens of c4 en, train' in result['about']['calibration']
  assert result['metrics']['perplexity'] > 1 and not result['fallbacks']


@pytest.mark.slow
def test_a_published_decoder_is_fine_tuned_on_wikitext(folder, tmp_path):
  result = run('finetune', 'llama2_7b_qlora.py:data=wikitext,rank=4,smoke', tmp_path, **{
      'pretrained': folder / 'network', 'data.options.data_dir': folder / 'wikitext', 'data.separator': END})
  assert result['steps'] == 2 and result['base_unchanged']


@pytest.mark.parametrize('leaves, words', [
    ({'model.vocab_size': 8}, r'model.vocab_size 8: the data has \d+. Give --config.model.vocab_size='),
    ({'data.options.tokenizer': ''}, 'texts are read by the tokenizer of a network'),
    ({'data.name': 'c5'}, "Dataset 'c5': it is not prepared .* as they are published: .*'c4'")])
def test_wrong_settings_are_one_paragraph(folder, tmp_path, capsys, leaves, words):
  overrides = [f'--config.{name}={value}' for name, value in (texts(folder, 'c4') | leaves).items()]
  assert cli.main(['train', f'--config={ROOT}/configs/bitnet_700m.py:smoke', f'--workdir={tmp_path}', *overrides]) == 2
  assert re.search(words, capsys.readouterr().err)


def test_weights_that_are_not_there_say_where_they_are(folder, tmp_path, capsys):
  assert cli.main(['ptq', f'--config={ROOT}/configs/llama2_7b.py', f'--workdir={tmp_path}']) == 2
  assert '`hf download meta-llama/Llama-2-7b-hf --local-dir' in capsys.readouterr().err
