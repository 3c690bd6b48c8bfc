"""What `qat merge` left is a network again: read in another process, scored, fine-tuned further, exported, refused."""

import dataclasses
import json
import pathlib
import shutil
import subprocess
import sys
import types

from flax import nnx
import jax.numpy as jnp
import numpy as np
import pytest

from qat.export import bitsandbytes
from qat.models import decoder
from qat.models import rope
from qat.models.pretrained import families
from qat.nn import recipes
from qat.nn import transform
from qat.nn import weights
from qat.run import checkpoint
from qat.run import cli
from qat.run import config as configs
from qat.run import evaluate
from qat.run import memory_plan
from qat.run import merge
from qat.run import merged
from qat.run import published
from qat.run import tasks
from tests.run import tiny_finetune

ROOT = pathlib.Path(__file__).parents[2]
LOGITS = nnx.jit(lambda model: model(jnp.arange(24)[None]))
READ = """
import sys
from flax import nnx
import jax.numpy as jnp
import numpy as np
from qat.run import published
network = published.load(sys.argv[1])
np.save(sys.argv[2], nnx.jit(lambda model: model(jnp.arange(24)[None]))(network.model))
print(network.tokenizer.encode('It was').ids)
"""


def finetune(folder, workdir, arg, *argv, net='net'):
  source = f'{ROOT}/tests/run/tiny_finetune.py:folder={folder}/{net},train={folder}/text.txt,steps=4,{arg}'
  return cli.main(['finetune', f'--config={source}', f'--workdir={workdir}', *argv])


@pytest.fixture(scope='module')
def there(tmp_path_factory):
  """A folder with a network, texts, what `qat finetune` made of them beside codes of NF4, and that merged."""
  folder = tmp_path_factory.mktemp('tiny')
  tiny_finetune.network(folder / 'net')
  (folder / 'text.txt').write_text(tiny_finetune.TEXT * 20)
  assert finetune(folder, folder / 'run', 'base=nf4_dq') == 0
  assert cli.main(['merge', f'--workdir={folder}/run', '--into=grid', '--method', 'rtn']) == 0
  return folder


@pytest.fixture
def copy(there, tmp_path):
  """A copy of the merged folder, and of the network that it came from."""
  shutil.copytree(there / 'net', tmp_path / 'net')
  found = shutil.copytree(there / 'run' / 'merged' / 'grid_rtn', tmp_path / 'grid_rtn')
  about = json.loads((found / 'config.json').read_text()) | dict(pretrained=str(tmp_path / 'net'))
  (found / 'config.json').write_text(json.dumps(about))
  return found


def paragraph(capfd):
  said = capfd.readouterr().err.strip()
  assert len(said.splitlines()) == 1 and 'Traceback' not in said, said
  return said


def test_another_process_reads_the_bits_that_were_measured(there, tmp_path):
  run, adapted = merge.trained(there / 'run')
  measured = merge.to_grid(run, adapted, 'rtn', 16)
  argv = [sys.executable, '-c', READ, f'{there}/run/merged/grid_rtn', f'{tmp_path}/y.npy']
  out = subprocess.run(argv, capture_output=True, text=True, check=True, cwd=ROOT).stdout
  np.testing.assert_array_equal(np.load(tmp_path / 'y.npy'), LOGITS(measured))
  assert json.loads(out) == tiny_finetune.tokenizer().encode('It was').ids
  assert np.abs(LOGITS(measured) - LOGITS(published.load(there / 'net').model)).max() > 0.1


def test_it_is_of_codes_and_scores_as_it_did(there, capfd):
  folder = there / 'run' / 'merged' / 'grid_rtn'
  network, result = published.load(folder), json.loads((folder / 'result.json').read_text())
  assert weights.any_codes(network.model) and not nnx.to_flat_state(nnx.state(network.model, nnx.LoRAParam)).leaves
  assert network.facts['base'] == f'{there}/net, on float32, fine-tuned and merged into grid by rtn'
  *_, scores = evaluate.evaluation(configs.load(folder), folder)
  assert scores == {name: result['metrics'][name] for name in scores} and 'loss' in scores
  assert cli.main(['evaluate', f'--workdir={folder}']) == 0
  assert f'{scores["loss"]:.5g}' in capfd.readouterr().out


@pytest.mark.parametrize('into, arg, argv', [
    ('zeros', 'base=w3a16_g32,rank=2', ['--config.adapter.group=32']),
    ('float', 'base=w3a16_g32', []),
    ('float', r'base=w4a8_g32,rules=blocks/\d/ffn/.*', [])])             # Codes stay in attention.
def test_every_way_is_read_back_to_the_bit(there, tmp_path, into, arg, argv):
  assert finetune(there, tmp_path, arg, *argv) == 0
  assert cli.main(['merge', f'--workdir={tmp_path}', f'--into={into}']) == 0
  _, adapted = merge.trained(tmp_path)
  found = published.load(tmp_path / 'merged' / into).model
  np.testing.assert_array_equal(LOGITS(found), LOGITS(merged.FORMS[into](adapted)))
  assert weights.any_codes(found) == (into == 'zeros' or 'rules' in arg)


def test_floats_of_a_network_that_turns_neighbours_are_read_as_hugging_face_orders_them(copy):
  """As those of GGUF files do."""
  shape = dataclasses.replace(published.reader(there := copy.parent / 'net').shape(),
                              rope=rope.Rope(turn=rope.interleaved))
  model = decoder.Decoder(shape, nnx.Rngs(0))
  base = types.SimpleNamespace(shape=lambda: shape)
  shutil.rmtree(checkpoint.folder(copy))
  bitsandbytes.save(decoder.halved(model), copy / merged.WEIGHTS, families.FAMILIES['llama'])
  found = merged.Merged(copy, {str(there): base}.get).model()
  assert found.config.rope.turn is rope.halves
  np.testing.assert_allclose(LOGITS(found), LOGITS(model), atol=1e-5)


def test_adapters_train_beside_merged_codes_and_merge_again(there, tmp_path):
  base = 'run/merged/grid_rtn'
  assert finetune(there, tmp_path, 'base=float', net=base) == 0
  found = json.loads((tmp_path / 'result.json').read_text())
  assert found['base_unchanged'] and 4.1 < found['bits_per_weight'] < 4.3
  assert found['metrics_before'] == pytest.approx(
      {name: json.loads((there / base / 'result.json').read_text())['metrics'][name] for name in found['metrics']},
      abs=1e-5)
  assert found['metrics']['loss'] < found['metrics_before']['loss']
  assert cli.main(['merge', f'--workdir={tmp_path}', '--into=grid', '--method', 'rtn']) == 0
  run, adapted = merge.trained(tmp_path)
  again = published.load(tmp_path / 'merged' / 'grid_rtn')
  np.testing.assert_array_equal(LOGITS(again.model), LOGITS(merge.to_grid(run, adapted, 'rtn', 16)))
  assert again.tokenizer is not None
  assert published.origin(tmp_path / 'merged' / 'grid_rtn') == there / 'net'


def test_its_memory_is_planned_as_that_of_codes(there):
  source = f'{ROOT}/tests/run/tiny_finetune.py:train={there}/text.txt'
  plans = [memory_plan.plan(configs.build(f'{source},folder={there}/{net},base={base}'))
           for net, base in (('run/merged/grid_rtn', 'float'), ('net', 'nf4_dq'))]
  assert plans[0].bytes == plans[1].bytes and plans[0].packed == plans[1].packed and plans[0].bytes['codes']


def test_it_is_exported_as_bitsandbytes_stores_it(there, tmp_path):
  model, family = published.load(there / 'run' / 'merged' / 'grid_rtn').model, families.FAMILIES['llama']
  bitsandbytes.save(model, tmp_path / 'model.safetensors', family)
  again = bitsandbytes.load(published.load(there / 'net').model, tmp_path / 'model.safetensors', family)
  np.testing.assert_array_equal(LOGITS(again), LOGITS(model))


def test_a_later_merge_takes_the_place_of_an_earlier_one(there, copy):
  run, adapted = merge.trained(there / 'run')
  result = json.loads((copy / 'result.json').read_text())
  (copy / 'notes.txt').write_text('mine')
  for name, model in (('grid_rtn', merge.to_grid(run, adapted, 'gptq', 8)), ('float', merged.FORMS['float'](adapted))):
    merge.leave(model, run.config, result | dict(into=name.partition('_')[0]), copy)
    np.testing.assert_array_equal(LOGITS(published.load(copy).model), LOGITS(model))
  assert (copy / 'notes.txt').read_text() == 'mine'


def test_what_could_not_be_read_back_is_not_written(there, copy):
  """Codes of another grid than the base's, as a solver might choose them."""
  run, _ = merge.trained(there / 'run')
  recipe = dict(name='float', rules={r'blocks/[\w/]+': 'w4a16_g32'})
  other = transform.freeze(transform.quantize(published.load(there / 'net').model, recipes.resolve(recipe)))
  before = LOGITS(published.load(copy).model)
  with pytest.raises(ValueError, match='would not be read back. Take another --method'):
    merge.leave(other, run.config, json.loads((copy / 'result.json').read_text()), copy)
  np.testing.assert_array_equal(LOGITS(published.load(copy).model), before)


@pytest.mark.parametrize('where', ['', '/merged'])
def test_the_workdir_of_a_run_is_no_network(there, where):
  with pytest.raises(ValueError, match=r"Give one of the folders that qat merge makes .*/run/merged/grid_rtn'\]"):
    published.load(f'{there}/run{where}')


def test_a_run_that_was_not_merged_says_how_to(there, tmp_path):
  (tmp_path / 'config.json').write_text((there / 'run' / 'config.json').read_text())
  with pytest.raises(ValueError, match='There is none yet: qat merge --workdir'):
    published.load(tmp_path)


def test_what_is_merged_is_not_merged_again(there, capfd):
  assert cli.main(['merge', f'--workdir={there}/run/merged/grid_rtn']) == 2
  assert f"is merged already. Give the run that it was merged from, '{there}/run'" in paragraph(capfd)


@pytest.mark.parametrize('changes', [dict(merged={}), dict(pretrained='itself')])
def test_a_config_that_qat_merge_does_not_write(copy, changes):
  said = json.loads((copy / 'config.json').read_text()) | changes
  if said['pretrained'] == 'itself':
    said['pretrained'] = str(copy)
  (copy / 'config.json').write_text(json.dumps(said))
  with pytest.raises(ValueError, match='which qat merge does not write. Merge again'):
    published.load(copy)


def test_files_that_are_not_whole(copy):
  files = sorted((checkpoint.folder(copy) / '0' / 'state').rglob('d/*'), key=lambda p: p.stat().st_size)
  whole = files[-1].read_bytes()
  files[-1].write_bytes(whole[:len(whole) // 2])
  with pytest.raises(ValueError, match=r'it is not whole\. .* is damaged.* Merge again: qat merge\.'):
    published.load(copy)
  shutil.rmtree(checkpoint.folder(copy))
  with pytest.raises(ValueError, match=r'should hold one of model\.safetensors and checkpoints/'):
    published.load(copy)
  (copy / 'model.safetensors').write_bytes(b'cut')
  with pytest.raises(ValueError, match='no whole safetensors file'):
    published.load(copy)


def test_a_base_of_another_form_or_place(copy):
  tiny_finetune.network(copy.parent / 'net', layers=1)
  with pytest.raises(ValueError, match=r"merged from another network than pretrained .* is now\. .*'blocks/1/"):
    published.load(copy)
  tiny_finetune.network(copy.parent / 'net', layers=3)
  with pytest.raises(ValueError, match=r'it lacks .*blocks/2/.* Put that one back, or merge again'):
    published.load(copy)
  shutil.rmtree(copy.parent / 'net')
  with pytest.raises(ValueError, match='cannot be read: .* there is no such name, file or folder.* Put it back there'):
    published.load(copy)


@pytest.mark.parametrize('arg, words', [
    ('base=nf4_dq', 'holds codes, which stay as they are, and the config would put floats on a grid'),
    ('base=float,rules=', 'the config would train all weights'),
    ('base=float,init=loftq', 'and pretrained has codes alone. Give init=gaussian')])
def test_codes_take_adapters_and_nothing_else(there, tmp_path, capfd, arg, words):
  assert finetune(there, tmp_path, arg, net='run/merged/grid_rtn') == 2
  assert words in paragraph(capfd) and not checkpoint.steps(tmp_path)


def test_floats_are_put_on_a_grid_and_codes_are_not(there, tmp_path, capfd, monkeypatch):
  task = lambda config: tasks.Task(published.load(config.pretrained).model, [], len, {})
  monkeypatch.setattr(tasks, 'language_model', task)
  argv = [f'--config={ROOT}/configs/smollm2.py:smoke', f'--config.pretrained={there}/run/merged/grid_rtn']
  assert cli.main(['ptq', *argv, f'--workdir={tmp_path}']) == 2
  assert 'holds codes, and floats are put on a grid here. Give what qat merge --into float made' in paragraph(capfd)
