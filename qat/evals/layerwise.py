"""Where a quantized model departs from the float one: SQNR and cosine of each layer's weights and outputs."""

import dataclasses
import math

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from qat.nn import quantized, rules, weights


@dataclasses.dataclass(frozen=True)
class Fidelity:
  """How near an array is to the one that it stands for.

  Attributes:
    sqnr_db: 10 log10(sum x^2 / sum (x - y)^2), infinite where they are equal.
    cosine: of the angle between them, as vectors.
  """
  sqnr_db: float
  cosine: float


def fidelity(x, y):
  """The Fidelity of `y` to `x`, float[*shape] each; sums are float64.

  >>> fidelity(np.array([1.0, 0.0]), np.array([1.0, 1.0]))   # 10 log10(1 / 1); 1 / sqrt(2)
  Fidelity(sqnr_db=0.0, cosine=0.7071067811865475)
  """
  x, y = (np.asarray(a, np.float64).ravel() for a in (x, y))
  if x.shape != y.shape:
    raise ValueError(f'fidelity of {y.size} numbers to {x.size}: they are the same array of two models. '
                     'Give both models the same input.')
  signal, noise, other = float(x @ x), float((x - y) @ (x - y)), float(y @ y)
  if noise == 0:
    return Fidelity(math.inf, 1.0)
  sqnr = 10 * math.log10(signal / noise) if signal else -math.inf
  return Fidelity(sqnr, float(x @ y) / math.sqrt(signal * other) if signal and other else 0.0)


def of_weights(reference, model):
  """The Fidelity of each quantized weight.

  Args:
    reference: the float model.
    model: the same, quantized or frozen.

  Returns:
    {path: Fidelity}; 'blocks/linear[2]' is the third of a stack.
  """
  floats = {site.path: site for site in rules.sites(reference) if site.name is not None}
  found = {}
  for site in rules.sites(model):
    q = quantized.of(site.module)
    weight = q and vars(q.weights).get(site.name)
    if weight:
      here = weights.decode(weight.encode(site.variable), jnp.float32)
      found |= _each(site.path, _float_matrix(floats, site.path), here, len(site.lead))
  return found


def of_outputs(reference, model, batch, apply=None):
  """The Fidelity of what each layer with a weight returns, each model computing on its own.

  Args:
    reference: the float model.
    model: the same, quantized or frozen.
    batch: what `apply` takes.
    apply: (model, batch) -> anything; `model(batch)` if not given.

  Returns:
    {path: Fidelity} of the layers that the batch reaches, in the order of `rules.sites`; 'blocks/linear[2]' is the
    third of a stack, and 'embed/attend' what a tied embedding gives as a head.
  """
  theirs, ours = outputs(reference, batch, apply), outputs(model, batch, apply)
  if set(theirs) != set(ours):
    raise ValueError(f'The layers {sorted(set(theirs) ^ set(ours))} are reached in one of the models only: they are to '
                     'be one network. Compare a model with the one that it was quantized from.')
  found = {}
  for path, (y, lead) in ours.items():
    found |= _each(path, theirs[path][0], y, lead)
  return found


def outputs(model, batch, apply=None):
  """What each layer with a weight returns: {path: (float[*lead, ...], number of axes in lead)}.

  A layer that is called more than once is seen at its last call.
  """
  apply = apply or (lambda model, batch: model(batch))
  shapes = {}
  watched = _watched(model, shapes)
  nnx.eval_shape(lambda model, batch: (apply(model, batch), None)[1], watched, batch)
  watched = _watched(model, {})
  layers = {site.path: site for site in rules.sites(watched)}
  leads = {}
  for (path, method), y in shapes.items():
    site = layers[path]
    setattr(site.module, method, Output(jnp.zeros((*site.lead, *y.shape), y.dtype)))
    leads[path if method == 'returned' else f'{path}/attend'] = (site.module, method, len(site.lead))

  @nnx.jit
  def run(model, batch):
    apply(model, batch)

  run(watched, batch)
  return {path: (vars(module)[method].get_value(), lead) for path, (module, method, lead) in leads.items()}


class Output(nnx.Variable):
  """What a layer returned."""


def _watched(model, shapes):
  """A copy of `model` in evaluation mode whose layers keep what they return."""
  model = nnx.clone(model)
  model.eval()
  for site in rules.sites(model):
    if site.kind not in ('Param', 'Attention'):
      site.module.__class__ = _keeping(type(site.module), site.path, shapes)
  return model


def _keeping(cls, path, shapes):
  """A subclass of a layer's class that notes the shapes of what it returns, and keeps it where there is an Output."""

  def kept(layer, method, y):
    shapes[path, method] = jax.ShapeDtypeStruct(y.shape, y.dtype)
    if method in vars(layer):
      vars(layer)[method].set_value(y)
    return y

  class Keeping(cls):

    def __call__(self, *args, **kwargs):
      return kept(self, 'returned', super().__call__(*args, **kwargs))

  if issubclass(cls, nnx.Embed):
    Keeping.attend = lambda self, *args, **kwargs: kept(self, 'attended', cls.attend(self, *args, **kwargs))
  return Keeping


def _float_matrix(floats, path):
  """The float weight of a path, [*lead, in, out]."""
  if path not in floats or isinstance(floats[path].variable, weights.Codes):
    what = 'is frozen' if path in floats else 'is not there'
    raise ValueError(f"Layer '{path}' {what} in the float model. Give the model that was quantized first, then the "
                     'quantized one.')
  return floats[path].layout.to_matrix(floats[path].variable.get_value())


def _each(path, x, y, lead):
  """{path: Fidelity}, one for each index of the `lead` first axes."""
  x, y = np.asarray(x), np.asarray(y)
  name = lambda index: path + ''.join(f'[{i}]' for i in index)
  return {name(index): fidelity(x[index], y[index]) for index in np.ndindex(y.shape[:lead])}
