"""Tasks: a published network, what it is calibrated on, and how it is scored. `config.task` names one.

A task is a function of the config that returns a Task.
"""

from collections.abc import Callable
import dataclasses
import functools

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from qat.evals import accuracy
from qat.evals import agreement
from qat.evals import perplexity
from qat.evals import retrieval as retrievals
from qat.nn import batch_norm
from qat.nn import calls
from qat.ptq import links
from qat.ptq import running
from qat.ptq import stages
from qat.run import build
from qat.run import config as configs
from qat.run import corpus
from qat.run import photos
from qat.run import published
from qat.run import scorer
from qat.run import sentences
from qat.run import text_sets
from qat.run import union
from qat.run import verses


@dataclasses.dataclass(frozen=True)
class Task:
  """What `qat ptq` works on.

  Attributes:
    model: in floats.
    batches: list of tuples of arrays, for calibration: what the model is called with.
    evaluate: (frozen model) -> {name: number}; the float model's number of the same is 'float_<name>'.
    about: {name: words}: the protocol and the base, printed beside the numbers.
    links: what tracing cannot see of the network's structure; see qat/ptq/links.py.
    loss: (model, batch) -> f32[], the mean over a batch of what the network was trained for; None if there is none.
  """
  model: nnx.Module
  batches: list
  evaluate: Callable
  about: dict
  links: tuple = ()
  loss: Callable | None = None

  def examples(self):
    """The calibration batches, cut into batches of one example."""
    return [tuple(a[i:i + 1] for a in batch) for batch in self.batches for i in range(len(batch[0]))]


def next_token(model, batch):
  """The loss of each token but the first: f32[]."""
  tokens, = batch
  return _cross_entropy(model(tokens)[:, :-1], tokens[:, 1:])


def own_class(model, batch):
  """The loss of the classes that the model itself thinks likeliest, where there are no labels: f32[]."""
  logits = model(*batch)
  return _cross_entropy(logits, jax.lax.stop_gradient(jnp.argmax(logits, axis=-1)))


def _cross_entropy(logits, labels):
  log_p = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
  return -jnp.mean(jnp.take_along_axis(log_p, labels[..., None], axis=-1))


def call(model, batch):
  return model(*batch)


def language_model(config):
  """Perplexity of a published decoder on the address of 2021, calibrated on earlier addresses (qat/run/union.py)."""
  network = _decoder(config)
  c, e = config.calibration, config.eval
  return _on_text(
      network, config, union.calibration(network.tokenizer, config.seed, count=c.sequences, length=c.length),
      union.evaluation(network.tokenizer, count=e.sequences, length=e.length),
      ('the State of the Union of 2021', f'{c.sequences} x {c.length} tokens of the addresses of 1990 to 2020'))


def corpora(config):
  """Perplexity of a published decoder on WikiText, calibrated on C4 (qat/run/text_sets.py), as GPTQ's code has it.

  That is the whole of a split in windows, and sequences at random places of documents. Difference: no token begins
  the first window.
  """
  network = _decoder(config)
  c, e = config.calibration, config.eval
  read = lambda part: text_sets.tokens(text_sets.named(part.name), part.split, part.data_dir, network.tokenizer,
                                       variant=part.variant, files=part.files)
  text = np.concatenate([part.tokens for part in read(e)]).astype(np.int32)
  whole = len(text) // e.length
  count = min(e.sequences or whole, whole)
  return _on_text(
      network, config, corpus.drawn(read(c), c.sequences, c.length, config.seed),
      text[:count * e.length].reshape(count, e.length),
      (f'{e.name} {e.variant}, {e.split}', f'{c.sequences} x {c.length} tokens of {c.name} {c.variant}, {c.split}'))


def _decoder(config):
  """The Published that texts are read by."""
  network = published.load(config.pretrained, config.dtype)
  if network.tokenizer is None:
    raise ValueError(f'pretrained {config.pretrained!r} has no tokenizer beside its weights: texts cannot be read. '
                     'Put a tokenizer.json beside them.')
  return network


def _on_text(network, config, sequences, tokens, said):
  """The Task of a decoder; `said` are the text of `tokens` and that of the `sequences` for calibration, in words."""
  protocol, floats = perplexity.Protocol(said[0], *tokens.shape, tokens.shape[1]), network.model
  return Task(
      model=floats, batches=split(config.calibration.batch_size, sequences),
      evaluate=lambda model: numbers(agreement.on_text(
          *(streamed(m, tokens[:1]) for m in (floats, model)), tokens, protocol)),
      about=dict(base=network.facts['base'], perplexity=str(protocol), calibration=f'{said[1]}, seed {config.seed}'),
      links=(links.GATED, links.heads(floats.config.head_dim)), loss=next_token)


def retrieval(config):
  """A published encoder finds each verse of a Bible among those of another; calibrated on another book."""
  network = published.load(config.pretrained, config.dtype)
  c, e = config.calibration, config.eval
  known, _ = verses.pairs(verses.PSALMS, c.sentences, e.edition)
  tokens, mask = sentences.encode(network.tokenizer, known)
  asked, there = verses.pairs(verses.PROVERBS, e.pairs, e.edition)
  embed = lambda model, texts: sentences.embed(model, network.tokenizer, texts)
  found = lambda model: retrievals.ranks(embed(model, asked), embed(model, there))
  floats = embed(network.model, asked)
  float_ranks = found(network.model)

  def evaluate(model):
    ranks, cosine = found(model), np.sum(embed(model, asked) * floats, axis=-1)
    return {**scores(ranks), **{f'float_{name}': value for name, value in scores(float_ranks).items()},
            'cosine_to_float': float(cosine.mean())}

  def scores(ranks):
    return dict(recall_at_1=retrievals.recall(ranks, 1).value, mrr=retrievals.mrr(ranks).value)

  return Task(
      model=network.model, batches=split(c.batch_size, tokens, mask), evaluate=evaluate,
      about=dict(base=network.facts['base'], calibration=f'{c.sentences} verses of Psalms',
                 retrieval=f'{e.pairs} verses of Proverbs, King James to World English, the {e.edition} edition'))


def photographs(config):
  """A published network for images agrees with itself in floats on photos without labels; its BatchNorms are folded."""
  network = published.load(config.pretrained, config.dtype)
  c, e = config.calibration, config.eval
  images = photos.calibration(c.images, config.seed)
  model = batch_norm.fold_batch_norm(network.model, jnp.asarray(images[:1]))
  labelled, labels = photos.imagenet()
  unlabelled = photos.held_out(e.images, config.seed + 1)
  logits = lambda model, x: np.concatenate([forward(model)(part) for part, in split(e.batch_size, x)])
  reference, float_hits = logits(model, unlabelled), accuracy.top_k(logits(model, labelled), labels)

  def evaluate(frozen):
    mine = logits(frozen, unlabelled)
    wrong = np.sum((mine - reference) ** 2, dtype=np.float64)
    return dict(numbers(agreement.agreement(reference, mine)),
                logit_sqnr_db=10 * float(np.log10(np.sum(reference ** 2, dtype=np.float64) / wrong)),
                top_1_of_20=accuracy.top_k(logits(frozen, labelled), labels).value, float_top_1_of_20=float_hits.value)

  return Task(
      model=model, batches=split(c.batch_size, images), evaluate=evaluate,
      about=dict(base=network.facts['base'], calibration=f'{c.images} crops of 21 photos, seed {config.seed}',
                 agreement=f'on {e.images} crops of 20 other photos; top 1 of these 20 labelled photos'),
      loss=own_class)


def trained(config):
  """A float network that `qat train` left: the workdir `config.pretrained`, on its own test set."""
  before = configs.load(config.pretrained)
  goal, (train, test) = build.objective(before), build.sources(before)
  model = build.pretrained(build.float_model(before), config.pretrained)
  score = scorer.Scorer(goal, test, before.eval.batch_size)
  size = min(config.calibration.examples, len(train))
  order = np.random.default_rng(config.seed).permutation(len(train))[:size]
  inputs = goal.inputs(train.take(order))
  floats = score(model)
  return Task(
      model=model, batches=split(config.calibration.batch_size, inputs),
      evaluate=lambda frozen: {**score(frozen), **{f'float_{name}': value for name, value in floats.items()},
                               'mean_kl': score.mean_kl(model, frozen)},
      about=dict(base=f'{before.model.name} of {config.pretrained}', test=f'{before.data.name} {before.data.test}',
                 calibration=f'{size} training examples, seed {config.seed}'),
      loss=next_token if before.objective in ('language', 'next_token') else own_class)


def numbers(found):
  """The numbers of an Agreement."""
  return {name: value for name, value in found.plain().items() if isinstance(value, (int, float))}


def forward(model):
  """inputs -> what the model returns in evaluation mode, compiled; its arrays are not copied."""
  model = nnx.clone(model)
  model.eval()
  graph, state = nnx.split(model)
  return lambda inputs: _forward(graph, state, inputs)


def streamed(model, inputs):
  """As `forward`, of a decoder: block by block where it is a chain of blocks, see running.streamed."""
  apply = lambda model, inputs: model(inputs)
  blocks = stages.chain(calls.trace(model, apply, inputs), model)
  return running.streamed(model, apply, blocks) if blocks else forward(model)


@functools.partial(jax.jit, static_argnums=0)
def _forward(graph, state, inputs):
  return nnx.merge(graph, state)(inputs)


def split(batch_size, *arrays):
  """[n, ...] each -> a list of tuples of `batch_size` rows."""
  count = len(arrays[0])
  if count % batch_size:
    raise ValueError(f'A batch_size of {batch_size} does not divide {count} examples. Choose a divisor, so that one '
                     'program serves all batches.')
  return [tuple(jnp.asarray(a[i:i + batch_size]) for a in arrays) for i in range(0, count, batch_size)]
