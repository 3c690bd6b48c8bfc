"""Tokenizers of published models: from the metadata of a GGUF file, or from a tokenizer.json.

    ids = tokenizer.encode('Hello', add_special_tokens=False).ids
    text = tokenizer.decode(ids)

Byte-pair encoding is that of Sennrich et al. Neural Machine Translation of Rare Words with Subword Units, 2016.
https://arxiv.org/abs/1508.07909; over bytes, as in GPT-2. The work is done by the `tokenizers` package.
"""

import collections.abc
import dataclasses
import pathlib

import tokenizers
from tokenizers import decoders
from tokenizers import models
from tokenizers import normalizers
from tokenizers import pre_tokenizers
from tokenizers import processors

# Token types of GGUF: llama.cpp's `enum llama_token_type`.
CONTROL, USER_DEFINED = 3, 4


@dataclasses.dataclass(frozen=True)
class Pre:
  """What happens to a text before its pieces are merged.

  Attributes:
    split: () -> how the text is cut into pieces, which no token spans.
    normalizer: () -> what is done to the characters first.
    whole_words: whether a piece that is a token itself is not merged up from its bytes.
  """

  split: collections.abc.Callable
  normalizer: collections.abc.Callable = lambda: normalizers.Sequence([])
  whole_words: bool = False


def _regex(pattern):
  """Pieces are what a pattern matches."""
  return lambda: pre_tokenizers.Sequence([
      pre_tokenizers.Split(tokenizers.Regex(pattern), 'isolated'),
      pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


# The pattern of cl100k (https://github.com/openai/tiktoken), which differs in how many digits stay together.
_WORDS = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*"
          r"|\s*[\r\n]+|\s+(?!\S)|\s+")

# Names of tokenizer.ggml.pre. Each is what the tokenizer.json of the model of that name says.
PRE = {
    'gpt-2': Pre(lambda: pre_tokenizers.ByteLevel(add_prefix_space=False)),
    'smollm': Pre(lambda: pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])),
    'llama-bpe': Pre(_regex(_WORDS % '{1,3}'), whole_words=True),
    'qwen2': Pre(_regex(_WORDS % ''), normalizers.NFC),
}


def from_gguf(metadata, where):
  """The tokenizer that a GGUF file describes.

  Args:
    metadata: (key, default) -> value.
    where: the file, for errors.

  Returns:
    tokenizers.Tokenizer.
  """
  kind, pre = metadata('tokenizer.ggml.model'), metadata('tokenizer.ggml.pre')
  if kind != 'gpt2' or pre not in PRE:
    raise ValueError(
        f'{where}: its tokenizer is {kind!r} with pre-tokenizer {pre!r}; those known are gpt2 with {sorted(PRE)}. '
        'Take the tokenizer.json that the model was published with (tokenizer.from_json).')
  tokens, merges = metadata('tokenizer.ggml.tokens'), metadata('tokenizer.ggml.merges')
  if not tokens or not merges:
    raise ValueError(f'{where}: its tokenizer has {len(tokens or [])} tokens and {len(merges or [])} merges. '
                     'The file is not whole: get it anew, or take a tokenizer.json (tokenizer.from_json).')
  kinds = metadata('tokenizer.ggml.token_type') or [1] * len(tokens)
  tokenizer = tokenizers.Tokenizer(_bpe(tokens, merges, PRE[pre].whole_words, where))
  tokenizer.normalizer = PRE[pre].normalizer()
  tokenizer.pre_tokenizer = PRE[pre].split()
  tokenizer.decoder = decoders.ByteLevel()
  for special in (True, False):
    number = CONTROL if special else USER_DEFINED
    tokenizer.add_tokens([tokenizers.AddedToken(token, special=special, normalized=False)
                          for token, kind in zip(tokens, kinds) if kind == number])
  if metadata('tokenizer.ggml.add_bos_token', False):
    tokenizer.post_processor = _begin(tokens, metadata('tokenizer.ggml.bos_token_id'), where)
  return tokenizer


def _bpe(tokens, merges, whole_words, where):
  """The merging of pieces."""
  try:
    return models.BPE({token: i for i, token in enumerate(tokens)}, [tuple(merge.split(' ', 1)) for merge in merges],
                      ignore_merges=whole_words)
  except Exception as error:  # the tokenizers package raises no narrower class
    raise ValueError(f'{where}: its tokenizer cannot be built ({error}). The file is damaged: get it anew.') from error


def _begin(tokens, i, where):
  """What puts the token that begins texts before them."""
  if not isinstance(i, int) or not 0 <= i < len(tokens):
    raise ValueError(f'{where}: its texts begin with token {i}, and there are {len(tokens)} tokens. '
                     'The file is damaged: get it anew.')
  return processors.TemplateProcessing(single=[tokens[i], '$A'], special_tokens=[(tokens[i], i)])


def from_json(path):
  """The tokenizer of a tokenizer.json, or of the folder that holds one."""
  path = pathlib.Path(path)
  path = path / 'tokenizer.json' if path.is_dir() else path
  try:
    return tokenizers.Tokenizer.from_str(path.read_text(encoding='utf-8'))
  except FileNotFoundError:
    raise FileNotFoundError(f'{path}: there is no such file. Give a tokenizer.json, or the folder that holds '
                            'one.') from None
  except Exception as error:  # the tokenizers package raises no narrower class
    raise ValueError(f'{path}: it describes no tokenizer ({error}). It was cut or damaged: get it anew.') from error
