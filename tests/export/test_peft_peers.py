"""Hugging Face PEFT reads what we write, and we what it writes."""

from flax import nnx
import jax.numpy as jnp
import numpy as np
import pytest

from qat.export import peft as ours
from qat.models.pretrained import families
from qat.models.pretrained import folder
from qat.run import classification
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


@pytest.fixture(scope='module')
def encoder(tmp_path_factory):
  """A folder with a tiny BERT that transformers made."""
  transformers, torch = pytest.importorskip('transformers'), pytest.importorskip('torch')
  torch.manual_seed(0)
  config = transformers.BertConfig(
      vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
      max_position_embeddings=64, initializer_range=0.2, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
  path = tmp_path_factory.mktemp('encoder')
  transformers.BertModel(config, add_pooling_layer=False).save_pretrained(path)
  return path


ATTENDED = np.arange(12) < np.array([[12], [9]])


def their_classifier(path):
  """BERT with a classifier on the mean of its tokens, of length 1: what a Classifier is."""
  transformers, torch = pytest.importorskip('transformers'), pytest.importorskip('torch')

  class Classifier(transformers.BertPreTrainedModel):

    def __init__(self, config):
      super().__init__(config)
      self.bert = transformers.BertModel(config, add_pooling_layer=False)
      self.classifier = torch.nn.Linear(config.hidden_size, 3)
      self.post_init()

    def forward(self, input_ids=None, attention_mask=None, **_):
      x = self.bert(input_ids, attention_mask=attention_mask).last_hidden_state
      mean = (x * attention_mask[..., None]).sum(1) / attention_mask.sum(1, keepdim=True)
      return self.classifier(torch.nn.functional.normalize(mean, dim=-1))

  return Classifier.from_pretrained(path).eval()


def their_logits(model):
  torch = pytest.importorskip('torch')
  with torch.no_grad():
    return model(input_ids=torch.asarray(TOKENS), attention_mask=torch.asarray(ATTENDED.astype(np.int64))).numpy()


def our_classifier(path):
  return classification.Classifier(folder.Folder(path).model(), 3, 20.0, nnx.Rngs(0))


def our_logits(model):
  return model(dict(tokens=jnp.asarray(TOKENS), attended=jnp.asarray(ATTENDED)))


def test_peft_reads_our_classifier(encoder, tmp_path):
  peft = pytest.importorskip('peft')
  model = adapted(our_classifier(encoder), [r'encoder/blocks/[\w/]+'])
  rng = np.random.default_rng(0)
  for p in (model.head.kernel, model.head.bias):
    p.set_value(jnp.asarray(0.1 * rng.normal(size=p.get_value().shape), jnp.float32))
  ours.save(model, tmp_path, families.FAMILIES['bert'], base=str(encoder), head=classification.saved(model))
  loaded = peft.PeftModel.from_pretrained(their_classifier(encoder), tmp_path)
  assert isinstance(loaded, peft.PeftModelForSequenceClassification)
  np.testing.assert_allclose(their_logits(loaded), our_logits(model), atol=1e-4)
  with loaded.disable_adapter():
    assert np.abs(their_logits(loaded) - our_logits(model)).max() > 0.01


def test_ours_reads_pefts_classifier(encoder, tmp_path):
  peft, torch = pytest.importorskip('peft'), pytest.importorskip('torch')
  config = peft.LoraConfig(task_type='SEQ_CLS', r=4, lora_alpha=8, target_modules=['query', 'value', 'dense'],
                           init_lora_weights=False)
  model = peft.get_peft_model(their_classifier(encoder), config)
  torch.manual_seed(1)
  for key, x in model.named_parameters():
    if 'modules_to_save' in key:
      x.data += torch.randn_like(x)
  model.save_pretrained(tmp_path)
  plain = our_classifier(encoder)
  loaded = ours.load(plain, tmp_path, families.FAMILIES['bert'], head=classification.saved(plain))
  np.testing.assert_allclose(our_logits(loaded), their_logits(model.eval()), atol=1e-4)
  assert np.abs(their_logits(model)).max() > 0.1
