"""Hugging Face PEFT reads what we write, and we what it writes."""

import jax.numpy as jnp
import numpy as np
import pytest

from qat.export import peft as ours
from qat.models.pretrained import families
from qat.models.pretrained import folder
from tests.export.test_peft import adapted

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings('ignore::FutureWarning'),
              pytest.mark.filterwarnings('ignore:Setting `save_embedding_layers`')]
TOKENS = np.arange(24).reshape(2, 12) % 64
FAMILY = families.FAMILIES['llama']


@pytest.fixture(scope='module')
def base(tmp_path_factory):
  """A folder with a tiny Llama that transformers made."""
  transformers, torch = pytest.importorskip('transformers'), pytest.importorskip('torch')
  torch.manual_seed(0)
  config = transformers.LlamaConfig(
      vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
      num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.2)
  path = tmp_path_factory.mktemp('base')
  transformers.LlamaForCausalLM(config).save_pretrained(path)
  return path


def theirs(base):
  transformers = pytest.importorskip('transformers')
  return transformers.AutoModelForCausalLM.from_pretrained(base).eval()


def torch_scores(model):
  torch = pytest.importorskip('torch')
  with torch.no_grad():
    return model(torch.asarray(TOKENS)).logits.numpy()


SETTINGS = {
    'lora': {}, 'dora': dict(dora=True), 'rslora': dict(scaling=lambda alpha, r: alpha / r**0.5),
    'embedding': dict(rules=['embed', 'blocks/.*'])}


@pytest.mark.parametrize('name', SETTINGS)
def test_peft_reads_ours(base, tmp_path, name):
  peft = pytest.importorskip('peft')
  model = adapted(folder.Folder(base).model(), **(dict(rules=['blocks/.*']) | SETTINGS[name]))
  ours.save(model, tmp_path, FAMILY, base=str(base))
  loaded = peft.PeftModel.from_pretrained(theirs(base), tmp_path)
  plain = torch_scores(theirs(base))
  np.testing.assert_allclose(torch_scores(loaded), model(jnp.asarray(TOKENS)), atol=1e-4)
  assert np.abs(torch_scores(loaded) - plain).max() > 0.01


@pytest.mark.parametrize('settings', [
    {}, dict(use_dora=True), dict(use_rslora=True), dict(rank_pattern={'up_proj': 3}, alpha_pattern={'q_proj': 1}),
    dict(target_modules=['embed_tokens', 'v_proj'])], ids=['lora', 'dora', 'rslora', 'patterns', 'embedding'])
def test_ours_reads_peft(base, tmp_path, settings):
  peft, torch = pytest.importorskip('peft'), pytest.importorskip('torch')
  config = peft.LoraConfig(**(dict(r=4, lora_alpha=8, target_modules='all-linear', init_lora_weights=False) | settings))
  model = peft.get_peft_model(theirs(base), config)
  torch.manual_seed(1)
  for key, x in model.named_parameters():
    if 'lora_' in key:
      x.data += 0.05 * torch.randn_like(x)
  model.save_pretrained(tmp_path)
  loaded = ours.load(folder.Folder(base).model(), tmp_path, FAMILY)
  np.testing.assert_allclose(loaded(jnp.asarray(TOKENS)), torch_scores(model.eval()), atol=1e-4)
