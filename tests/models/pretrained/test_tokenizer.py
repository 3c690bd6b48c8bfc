"""Against merges and pieces made by hand."""

import json

import pytest
import tokenizers

from qat.models.pretrained import tokenizer

# GPT-2's 256 symbols for bytes: those that print stand for themselves, the others for what comes after them.
PRINTED = [*range(33, 127), *range(161, 173), *range(174, 256)]
BYTES = {b: chr(b) for b in PRINTED} | {
    b: chr(256 + i) for i, b in enumerate(b for b in range(256) if b not in PRINTED)}
SPECIAL = ['<|begin|>', '<|user|>']


def metadata(pre='gpt-2', merges=('t h', 'th e', 'Ġ the', '1 2'), **more):
  """The metadata of a file whose tokens are bytes, what the merges make, and two special ones."""
  tokens = [*SPECIAL, *BYTES.values(), *(merge.replace(' ', '') for merge in merges)]
  values = {'model': 'gpt2', 'pre': pre, 'tokens': tokens, 'merges': list(merges), 'bos_token_id': 0,
            'token_type': [tokenizer.CONTROL, tokenizer.USER_DEFINED] + [1] * (len(tokens) - 2)} | more
  return lambda key, default=None: values.get(key.removeprefix('tokenizer.ggml.'), default)


def read(**more):
  return tokenizer.from_gguf(metadata(**more), 'tiny.gguf')


def pieces(pre, text):
  return [piece for piece, _ in tokenizer.PRE[pre].split().pre_tokenize_str(text)]


def test_merges_in_order_of_the_list():
  assert read().encode('the the').tokens == ['the', 'Ġthe']
  assert read(merges=('h e', 't h', 'th e', 'Ġ t')).encode('the the').tokens == ['t', 'he', 'Ġt', 'he']


@pytest.mark.parametrize('pre', tokenizer.PRE)
@pytest.mark.parametrize('text', ["Hello, world's  end\n\n\t12345 é 中文 🙂", ' leading', '', 'a\r\nb', '<|user|>hi'])
def test_texts_come_back(pre, text):
  there = read(pre=pre)
  assert there.decode(there.encode(text).ids, skip_special_tokens=False) == text


def test_special_tokens_are_one_token_and_hidden_if_they_control():
  there = read()
  ids = there.encode('<|begin|>the<|user|>').ids
  assert ids == [0, there.token_to_id('the'), 1]
  assert there.decode(ids) == 'the<|user|>'


@pytest.mark.parametrize('pre, expected', [
    ('gpt-2', ["It", "'s", 'Ġ2024', ',', 'Ġok', '?!', 'Ġ', 'Ġx']),
    ('smollm', ["It", "'s", 'Ġ', '2', '0', '2', '4', ',', 'Ġok', '?!', 'Ġ', 'Ġx']),
    ('llama-bpe', ["It", "'s", 'Ġ', '202', '4', ',', 'Ġok', '?!', 'Ġ', 'Ġx']),
    ('qwen2', ["It", "'s", 'Ġ', '2', '0', '2', '4', ',', 'Ġok', '?!', 'Ġ', 'Ġx']),
])
def test_pieces_of_each_pre_tokenizer(pre, expected):
  assert pieces(pre, "It's 2024, ok?!  x") == expected


def test_contractions_in_capitals_are_cut_by_the_newer_patterns_only():
  assert pieces('gpt-2', "IT'S") == ['IT', "'", 'S']
  assert pieces('llama-bpe', "IT'S") == pieces('qwen2', "IT'S") == ['IT', "'S"]


def test_qwen_composes_characters_first():
  assert read(pre='qwen2').encode('e\u0301').ids == read(pre='gpt-2').encode('é').ids
  assert read(pre='gpt-2').encode('e\u0301').ids != read(pre='gpt-2').encode('é').ids


def test_llama_takes_whole_words_that_no_merge_makes():
  """'xyz' is a token that its merges do not reach."""
  plain = metadata()
  tokens = [*plain('tokenizer.ggml.tokens'), 'xyz']
  kinds = [*plain('tokenizer.ggml.token_type'), 1]
  assert read(pre='llama-bpe', tokens=tokens, token_type=kinds).encode('xyz').tokens == ['xyz']
  assert read(pre='gpt-2', tokens=tokens, token_type=kinds).encode('xyz').tokens == ['x', 'y', 'z']


def test_a_beginning_where_the_model_was_trained_with_one():
  assert read(add_bos_token=True).encode('the').tokens == ['<|begin|>', 'the']
  assert read(add_bos_token=True).encode('the', add_special_tokens=False).tokens == ['the']
  assert read().encode('the').tokens == ['the']


@pytest.mark.parametrize('more, message', [
    (dict(model='llama'), "its tokenizer is 'llama' with pre-tokenizer 'gpt-2'; those known are gpt2 with"),
    (dict(pre='deepseek-llm'), r"pre-tokenizer 'deepseek-llm'; those known are gpt2 with \['gpt-2', 'llama-bpe'"),
    (dict(pre=None), 'pre-tokenizer None'),
    (dict(tokens=None), 'its tokenizer has 0 tokens and 4 merges'),
    (dict(merges=()), 'its tokenizer has 258 tokens and 0 merges'),
    (dict(merges=('a b', 'q')), 'tiny.gguf: its tokenizer cannot be built'),
    (dict(tokens=['a', 'b', 'ab']), 'tiny.gguf: its tokenizer cannot be built'),
    (dict(add_bos_token=True, bos_token_id=10**6), 'its texts begin with token 1000000'),
])
def test_tokenizers_of_something_else(more, message):
  with pytest.raises(ValueError, match=message):
    read(**more)


def test_from_json(tmp_path):
  there = read(pre='smollm')
  there.save(str(tmp_path / 'tokenizer.json'))
  for path in (tmp_path, tmp_path / 'tokenizer.json'):
    again = tokenizer.from_json(path)
    assert isinstance(again, tokenizers.Tokenizer)
    assert again.encode('the 12 <|begin|>').ids == there.encode('the 12 <|begin|>').ids


@pytest.mark.parametrize('text', ['', '{', '[]', json.dumps(dict(version='1.0', model=dict(type='Magic')))])
def test_from_json_of_something_else(text, tmp_path):
  (tmp_path / 'tokenizer.json').write_text(text)
  with pytest.raises(ValueError, match='tokenizer.json: it describes no tokenizer'):
    tokenizer.from_json(tmp_path)


def test_from_json_of_nothing(tmp_path):
  with pytest.raises(FileNotFoundError, match='tokenizer.json: there is no such file'):
    tokenizer.from_json(tmp_path / 'tokenizer.json')
