"""Sensitivities: what it costs to put one layer on a coarse grid while the others stay in floats.

    hessian     mean curvature of the loss times squared error: Dong et al. HAWQ-V2: Hessian Aware trace-Weighted
                Quantization of Neural Networks, NeurIPS 2020, Eq. (8). https://arxiv.org/abs/1911.03852
    fisher      squared gradients times squared error, weight by weight: the diagonal of the empirical Fisher matrix;
                Li et al. BRECQ, ICLR 2021, Eq. (10), has it of outputs. https://arxiv.org/abs/2102.05426
    gradient    |gradient times error|: the first order
    divergence  KL(float || one layer quantized) of the outputs
    noise       the outputs' noise over their signal, 1 / SQNR

The first three need one pass over the data whatever the candidates, and see weights only. The last two run the model
for each layer and candidate, and see input quantizers as well. Each returns {path: {candidate: cost}} for
qat/ptq/allocate.py, where only the costs' ratios matter.

Differences from HAWQ-V2: all layers share one probe, whose cross terms have mean 0, so that a probe costs one
product with the Hessian and not one a layer; a negative trace, of a loss at no minimum, counts as 0.
"""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from qat.nn import calibrate, transform
from qat.ptq import allocate


def hessian(model, candidates, batches, loss, probes=16, seed=0):
  """mean(diagonal of the Hessian) ||W - Q(W)||^2 of each layer (HAWQ-V2, Eq. 8).

  Args:
    model: in floats; it is measured in evaluation mode.
    candidates: {name: recipe}.
    batches: an iterable of what `loss` takes.
    loss: (model, batch) -> f32[].
    probes: Hutchinson's random vectors a batch.
    seed: of the probes.
  """
  traces = hessian_traces(model, batches, loss, probes, seed)
  mean = {path: max(float(traces[path].mean()), 0.0) / site.variable.get_value().size
          for path, site in allocate.places(model).items()}
  return _costs(model, candidates, lambda path, error: mean[path] * jnp.sum(error ** 2))


def hessian_traces(model, batches, loss, probes=16, seed=0):
  """Estimates of the trace of the Hessian of `loss` by each layer's weight: {path: f64[batches * probes]}.

  Hutchinson. A stochastic estimator of the trace of the influence matrix, Comm. Stat. 19, 1990: the mean of v^T H v
  over random signs v is the trace.
  """
  values, state, f = _of_weights(model, loss)

  @jax.jit
  def probe(values, state, batch, key):
    keys = jax.random.split(key, len(values))
    v = {path: jax.random.rademacher(k, w.shape, w.dtype) for k, (path, w) in zip(keys, values.items())}
    _, Hv = jax.jvp(lambda values: jax.grad(f)(values, state, batch), (values,), (v,))
    return {path: jnp.sum(v[path].astype(jnp.float32) * Hv[path].astype(jnp.float32)) for path in values}

  root, found = jax.random.key(seed), []
  for i, batch in enumerate(batches):
    keys = jax.random.split(jax.random.fold_in(root, i), probes)
    found += [jax.tree.map(np.float64, probe(values, state, batch, key)) for key in keys]
  _some(found)
  return {path: np.stack([one[path] for one in found]) for path in values}


def fisher(model, candidates, batches, loss):
  """sum(E[g^2] (W - Q(W))^2) of each layer.

  Args:
    model, candidates, loss: as for `hessian`.
    batches: an iterable of what `loss` takes. Each is one draw of the gradient g: batches of one example give the
      Fisher matrix's diagonal, larger ones less than that.
  """
  squares = _mean_gradients(model, batches, loss, jnp.square)
  return _costs(model, candidates, lambda path, error: jnp.sum(squares[path] * error ** 2))


def gradient(model, candidates, batches, loss):
  """sum|E[g] (W - Q(W))| of each layer; arguments as for `hessian`."""
  means = _mean_gradients(model, batches, loss, lambda g: g)
  return _costs(model, candidates, lambda path, error: jnp.sum(jnp.abs(means[path] * error)))


def divergence(model, candidates, batches, apply=None):
  """The mean KL(float || one layer quantized) of softmax outputs, in nats.

  Args:
    model: in floats; it is measured in evaluation mode.
    candidates: {name: recipe}.
    batches: an iterable of what `apply` takes. The float model's outputs on all of them are kept.
    apply: (model, batch) -> logits float[..., c]; `model(batch)` if not given.
  """
  return _one_at_a_time(model, candidates, batches, apply, _kl)


def noise(model, candidates, batches, apply=None):
  """sum (y - y_hat)^2 / sum y^2 of the outputs, the inverse of their SQNR; arguments as for `divergence`."""
  return _one_at_a_time(model, candidates, batches, apply, _noise)


def _kl(reference, outputs):
  """(sum of KL over rows, rows)."""
  log_p, log_q = (jax.nn.log_softmax(a.astype(jnp.float32), axis=-1) for a in (reference, outputs))
  p = jnp.exp(log_p)
  return jnp.sum(jnp.where(p > 0, p * (log_p - log_q), 0.0)), jnp.float32(p.size / p.shape[-1])


def _noise(reference, outputs):
  """(energy of the difference, energy of the reference)."""
  y, y_hat = reference.astype(jnp.float32), outputs.astype(jnp.float32)
  return jnp.sum((y - y_hat) ** 2), jnp.sum(y ** 2)


def _one_at_a_time(model, candidates, batches, apply, measure):
  """{path: {name: the ratio of the sums that `measure` gives}}, with one layer quantized."""
  apply, batches = apply or (lambda model, batch: model(batch)), list(batches)
  paths, model = list(allocate.places(model)), nnx.clone(model)
  model.eval()
  run = nnx.jit(lambda model, batch: apply(model, batch))
  compare = nnx.jit(lambda model, batch, reference: measure(reference, apply(model, batch)))
  references = [run(model, batch) for batch in batches]
  _some(references)
  costs = {}
  for path in paths:
    costs[path] = {}
    for name in candidates:
      one = _one_quantized(model, path, allocate.recipe({path: name}, candidates, model), batches, apply)
      sums = np.sum([np.float64(compare(one, *pair)) for pair in zip(batches, references)], axis=0)
      costs[path][name] = float(sums[0] / sums[1])
  return costs


def _one_quantized(model, path, recipe, batches, apply):
  """`model` with the layer at `path` quantized. Where that changes its weight only, in the float model's structure.

  So all of them run one compiled program; a layer whose input is quantized has a program of its own.
  """
  one = transform.quantize(model, recipe)
  if any(getattr(rule, slot) is not None for rule in recipe for slot in ('input', 'output')):
    return calibrate.calibrate(one, batches, apply)
  site = allocate.weight_sites(one)[path]
  weight, one = allocate.weight_of(site), nnx.clone(model)
  if weight:
    allocate.weight_sites(one)[path].variable.set_value(_decoded(weight, site.variable))
  return one


@nnx.jit
def _decoded(weight, variable):
  return weight.decode(variable)


def _of_weights(model, loss):
  """({path: weight}, the model's state, f): f(weights, state, batch) is the loss in evaluation mode, f32[]."""
  values = {path: site.variable.get_value() for path, site in allocate.places(model).items()}
  model = nnx.clone(model)
  model.eval()
  graph, state = nnx.split(model)

  def f(values, state, batch):
    here = nnx.merge(graph, state, copy=True)
    sites = allocate.weight_sites(here)
    for path, value in values.items():
      sites[path].variable.set_value(value)
    return loss(here, batch)

  return values, state, f


def _mean_gradients(model, batches, loss, of):
  """The mean of of(gradient) over batches: {path: f32[*shape]}."""
  values, state, f = _of_weights(model, loss)

  @jax.jit
  def add(total, values, state, batch):
    g = jax.grad(f)(values, state, batch)
    return jax.tree.map(lambda t, g: t + of(g.astype(jnp.float32)), total, g)

  total, count = jax.tree.map(lambda w: jnp.zeros(w.shape, jnp.float32), values), 0
  for batch in batches:
    total, count = add(total, values, state, batch), count + 1
  _some(range(count))
  return jax.tree.map(lambda t: t / jnp.float32(count), total)


def _costs(model, candidates, cost):
  """{path: {name: cost(path, Q(W) - W)}}; 0 where a candidate leaves the weight in floats."""
  costs = {path: {} for path in allocate.places(model)}
  for name, candidate in candidates.items():
    sites = allocate.weight_sites(transform.quantize(model, candidate))
    for path in costs:
      site, weight = sites[path], allocate.weight_of(sites[path])
      costs[path][name] = float(cost(path, _error(weight, site.variable))) if weight else 0.0
  return costs


@nnx.jit
def _error(weight, variable):
  """Q(W) - W: f32[*shape]."""
  return weight.decode(variable).astype(jnp.float32) - variable.get_value().astype(jnp.float32)


def _some(found):
  if not len(found):
    raise ValueError('A sensitivity was given no batch: costs come from the numbers in them. '
                     'Give an iterable with at least one; a generator is used up after one pass.')
