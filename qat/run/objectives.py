"""What is minimized, and how an evaluation is scored: one value an objective.

Config names them: `config.objective = 'classification'`.
"""

import dataclasses
import math
from collections.abc import Callable

import jax.numpy as jnp
import optax


@dataclasses.dataclass(frozen=True)
class Objective:
  """`values['loss']` is minimized; the checkpoint of the highest `score` is the best."""
  inputs: Callable  # batch -> what the model is called on
  values: Callable  # (outputs, batch) -> {name: f32[b]}, one number an example
  score: Callable   # {name: mean over the test set} -> float


def _classify(logits, batch):
  logits = logits.astype(jnp.float32)  # Softmax in bfloat16 loses the loss's second digit.
  hit = jnp.argmax(logits, axis=-1) == batch['label']
  return dict(loss=optax.softmax_cross_entropy_with_integer_labels(logits, batch['label']),
              accuracy=hit.astype(jnp.float32))


def _classify_softly(logits, batch):
  hard = _classify(logits, batch)
  return hard | dict(loss=optax.softmax_cross_entropy(logits.astype(jnp.float32), batch['targets']))


def _next_token(logits, batch):
  targets = batch['tokens'][:, 1:]
  losses = optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), targets)  # [b, t]
  hit = (jnp.argmax(logits, axis=-1) == targets).astype(jnp.float32)
  loss = losses.mean(axis=1)  # [b]
  return dict(loss=loss, bits_per_character=loss / math.log(2), accuracy=hit.mean(axis=1))


def _weighted_next_token(logits, batch):
  targets, weights = batch['tokens'][:, 1:], batch['weights']
  logits = logits[:, :-1].astype(jnp.float32)
  losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)  # [b, t - 1]
  hit = (jnp.argmax(logits, axis=-1) == targets).astype(jnp.float32)
  return dict(loss=(losses * weights).mean(axis=1), accuracy=(hit * weights).mean(axis=1))


classification = Objective(
    inputs=lambda batch: batch['image'],
    values=_classify,
    score=lambda metrics: metrics['accuracy'])

# Of qat/run/images.py, whose labels may be mixed or smoothed.
soft_classification = dataclasses.replace(classification, values=_classify_softly)

# Of qat/run/classification.py.
text_classification = dataclasses.replace(
    classification, inputs=lambda batch: {name: batch[name] for name in ('tokens', 'attended')})

language = Objective(
    inputs=lambda batch: batch['tokens'][:, :-1],
    values=_next_token,
    score=lambda metrics: -metrics['bits_per_character'])

# The same of tokens that are no characters (qat/run/text_sets.py).
next_token = dataclasses.replace(
    language,
    values=lambda logits, batch: {k: v for k, v in _next_token(logits, batch).items() if k in ('loss', 'accuracy')},
    score=lambda metrics: -metrics['loss'])

# Of qat/run/packing.py: the loss of the tokens that count, which are answers in chats. The last token is read in vain,
# so that as many tokens are read as a sequence has.
weighted_language = Objective(
    inputs=lambda batch: batch['tokens'],
    values=_weighted_next_token,
    score=lambda metrics: -metrics['loss'])
