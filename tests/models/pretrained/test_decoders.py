"""Logits against the forwards of papers.py, on the tensors as they are in the files."""

import functools
import math

from flax import nnx
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from qat.models.pretrained import folder
from tests.models.pretrained import hf
from tests.models.pretrained import papers

TOKENS = np.random.default_rng(1).integers(0, hf.VOCAB, (2, 7))
forward = nnx.jit(lambda model, tokens: model(tokens))


LLAMA3 = dict(rope_type='llama3', factor=4.0, low_freq_factor=1.0, high_freq_factor=3.0,
              original_max_position_embeddings=64)
CASES = {
    'llama': (hf.LLAMA, papers.llama),
    'llama3': (
        hf.LLAMA | dict(rope_scaling=LLAMA3),
        functools.partial(papers.llama, frequencies=papers.llama3_frequencies())),
    'llama-linear': (
        hf.LLAMA | dict(rope_theta=None, rope_parameters=dict(rope_type='linear', factor=4.0, rope_theta=500.0)),
        functools.partial(papers.llama, frequencies=papers.FREQUENCIES / 4)),
    'qwen2': (hf.QWEN2, papers.llama),
    'qwen3': (hf.QWEN3, papers.llama),
    'gemma': (hf.GEMMA, functools.partial(papers.llama, unit=1.0, act=papers.gelu, embed_scale=math.sqrt(hf.WIDTH))),
    'gpt2': (hf.GPT2, papers.gpt2),
}


@pytest.mark.parametrize('name', CASES)
def test_logits_are_those_of_the_paper(name, tmp_path):
  config, oracle = CASES[name]
  weights = hf.tensors(config)
  model = folder.Folder(hf.write(tmp_path, config, weights)).model()
  expected = np.stack([oracle(weights, tokens) for tokens in TOKENS])
  assert expected.std() > 0.5
  np.testing.assert_allclose(forward(model, jnp.asarray(TOKENS)), expected, atol=2e-5 * np.abs(expected).max())


def test_every_tensor_matters(tmp_path):
  """The weights above are large enough that no part of a network hides in the tolerance."""
  weights = hf.tensors(hf.QWEN3)
  before = papers.llama(weights, TOKENS[0])
  for name, x in weights.items():
    assert np.abs(papers.llama(weights | {name: np.roll(x, 1)}, TOKENS[0]) - before).max() > 1e-2, name


@pytest.mark.parametrize('dtype', [ml_dtypes.bfloat16, np.float16])
def test_half_precision_is_read_without_loss(dtype, tmp_path):
  weights = hf.tensors(hf.LLAMA, dtype)
  there = folder.Folder(hf.write(tmp_path, hf.LLAMA, weights))
  model = there.model()
  kernel = model.blocks[1].ffn.down.kernel[...]
  assert kernel.dtype == jnp.float32
  np.testing.assert_array_equal(kernel, weights['model.layers.1.mlp.down_proj.weight'].astype(np.float32).T)
  assert there.facts() == dict(name=tmp_path.name, base=np.dtype(dtype).name, parameters=5872,
                               tensors=f'21 {"F16" if dtype is np.float16 else "BF16"}')


def test_layers_compute_in_the_dtype_asked_for(tmp_path):
  model = folder.Folder(hf.write(tmp_path, hf.LLAMA, hf.tensors(hf.LLAMA))).model('bfloat16')
  assert {p.dtype for p in jax.tree.leaves(nnx.state(model))} == {jnp.dtype('float32')}
  assert nnx.eval_shape(lambda m: m(jnp.asarray(TOKENS)), model).dtype == jnp.bfloat16


@pytest.mark.parametrize('config, wrong, message', [
    (hf.LLAMA, dict(hidden_act='relu'), "hidden_act is 'relu', and .*'llama' are built with 'silu' only"),
    (hf.LLAMA, dict(attention_bias=True), 'attention_bias is True, and mlp_bias is False'),
    (hf.LLAMA, dict(rope_scaling=dict(rope_type='yarn', factor=2.0)), "scaled by 'yarn'; the kinds known are default"),
    (hf.LLAMA, dict(rope_scaling=dict(type='linear')), "'linear' need 'factor', and there is"),
    (hf.LLAMA, dict(rope_scaling=3), 'rope_scaling is 3'),
    (hf.LLAMA, dict(hidden_size='16'), "hidden_size is '16', and should be a positive integer"),
    (hf.LLAMA, dict(hidden_size=0), 'hidden_size is 0, and should be a positive integer'),
    (hf.LLAMA, dict(num_attention_heads=None), 'num_attention_heads is None'),
    (hf.LLAMA, dict(rms_norm_eps=None), 'rms_norm_eps is None, and should be a number'),
    (hf.LLAMA, dict(num_key_value_heads=3), 'kv_heads 3 for 4 heads'),
    (hf.QWEN2, dict(use_sliding_window=True), 'use_sliding_window is True'),
    (hf.GEMMA, dict(hidden_activation='relu'), "hidden_activation is 'relu'"),
    (hf.GPT2, dict(n_head=3), 'n_head 3 does not divide n_embd 16'),
    (hf.GPT2, dict(activation_function='relu'), "activation_function is 'relu'"),
    (hf.GPT2, dict(tie_word_embeddings=False), "'head/kernel', which should be 'lm_head.weight'"),
])
def test_other_forms_are_refused(config, wrong, message, tmp_path):
  there = folder.Folder(hf.write(tmp_path, config | wrong, hf.tensors(config)))
  with pytest.raises(ValueError, match=message):
    there.model()
