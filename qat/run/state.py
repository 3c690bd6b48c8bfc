"""The state of a run as flat dicts of arrays, and the steps that move it on.

A model is taken apart once into a Skeleton (its structure) and two dicts {path: array}:
`params`, which the optimizer moves, and `rest` (ranges, statistics, random keys). Everything
else, optimizer, checkpoint, report, speaks of a parameter by its path. What never changes, such as
the codes beside which adapters train, stays with the Skeleton as `base`: no step returns it, and no
checkpoint holds it.
"""

import dataclasses

from flax import nnx
import jax
import jax.numpy as jnp
import optax

from qat.run import offload


@dataclasses.dataclass(frozen=True)
class Skeleton:
  """A model without the arrays that training changes. Invariant: join(*take_apart(model)[1:]) is the model."""
  graphdef: nnx.GraphDef
  filters: tuple      # of nnx.split: which variables are trained, which are fixed, and `...`.
  structures: tuple   # (paths, treedef) of params, base and rest.
  base: dict          # {path: array}

  def join(self, params, rest):
    """The model that holds these arrays."""
    states = [jax.tree.unflatten(treedef, [arrays[p] for p in paths])
              for (paths, treedef), arrays in zip(self.structures, (params, self.base, rest))]
    return nnx.merge(self.graphdef, *states)

  def rest_of(self, model):
    """`rest` of a model of this structure, which may have run."""
    return dict(zip(self.structures[-1][0], jax.tree.leaves(nnx.split(model, *self.filters)[-1])))


NOTHING = nnx.Nothing()


def take_apart(model, trained=nnx.Param, fixed=NOTHING):
  """(Skeleton, params {path: array}, rest {path: array}).

  Args:
    model: any nnx.Module.
    trained: a filter of nnx, for what goes to `params`.
    fixed: a filter, for what no step changes, of what is left.
  """
  filters = trained, fixed, ...
  graphdef, *states = nnx.split(model, *filters)
  flat = [jax.tree_util.tree_flatten_with_path(s) for s in states]
  paths = [tuple(_name(path) for path, _ in leaves) for leaves, _ in flat]
  params, base, rest = (dict(zip(names, (x for _, x in leaves))) for names, (leaves, _) in zip(paths, flat))
  structures = tuple((names, treedef) for names, (_, treedef) in zip(paths, flat))
  return Skeleton(graphdef, filters, structures, base), params, rest


def _name(path):
  """'layers/0/kernel' of a key path."""
  keys = [str(getattr(k, 'key', getattr(k, 'idx', getattr(k, 'name', k)))) for k in path]
  return '/'.join(k for k in keys if k != 'value')


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class TrainState:
  """All that training changes. Invariant: after a number that is not finite, nothing changes."""
  step: jax.Array       # i32[]
  params: dict          # {path: array}
  rest: dict            # {path: array}
  opt_state: tuple
  finite: jax.Array     # bool[]


def new(params, rest, tx):
  """The state before the first step."""
  # Copies: the step donates its state, and the caller may still hold the model.
  params, rest = jax.tree.map(jnp.copy, (params, rest))
  return TrainState(jnp.int32(0), params, rest, tx.init(params), jnp.bool_(True))


def size_bytes(tree):
  """Bytes of the arrays of a tree, such as the state of an optimizer."""
  return sum(x.nbytes for x in jax.tree.leaves(tree))


def train_step(skeleton, objective, tx, accumulate_steps=1, memory=None, after=None):
  """The jitted (state, batch) -> (state, metrics).

  A loss or gradient that is not finite leaves the state as it was before that step, and
  every later step does nothing: the loop may look at `finite` one step late. The select
  fuses with the update, so it costs no pass over memory.

  Args:
    skeleton, objective, tx: of the model, the loss, and the optimizer.
    accumulate_steps: parts of a batch, one of which is in memory at a time.
    memory: the kind of memory that the optimizer's state lives in between the steps (offload.py); None: the device's.
    after: shardings of the results (mesh.py); None leaves them to jax.
  """
  step = base_step(skeleton, objective, tx, accumulate_steps, memory, after)
  home = offload.to(memory)

  def step_on(state, batch):
    return step(dataclasses.replace(state, opt_state=home(state.opt_state)), skeleton.base, batch)

  return step_on


def base_step(skeleton, objective, tx, accumulate_steps=1, memory=None, after=None):
  """`train_step` as jax.jit returns it, of (state, base, batch)."""
  home, near = offload.to(memory), offload.to(memory and offload.DEVICE)

  def step(state, base, batch):
    state = dataclasses.replace(state, opt_state=near(state.opt_state))
    gradients, values, rest = gradient(
        dataclasses.replace(skeleton, base=base), objective, state, batch, accumulate_steps)
    norm = optax.tree.norm(gradients)
    updates, opt_state = tx.update(gradients, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    finite = state.finite & jnp.isfinite(values['loss']) & jnp.isfinite(norm)
    moved = TrainState(state.step + 1, params, rest, opt_state, finite)
    state = jax.tree.map(lambda a, b: jnp.where(finite, a, b), moved, dataclasses.replace(state, finite=finite))
    state = dataclasses.replace(state, opt_state=home(state.opt_state))
    return state, dict(values, gradient_norm=norm, finite=finite)

  return jax.jit(step, donate_argnums=0, **dict(out_shardings=after) if after is not None else {})


def gradient(skeleton, objective, state, batch, accumulate_steps=1):
  """(gradients {path: array}, mean values, rest) over a batch in `accumulate_steps` parts."""

  def loss(params, rest, part):
    model = skeleton.join(params, rest)
    model.train()
    values = objective.values(model(objective.inputs(part)), part)
    means = {name: v.mean() for name, v in values.items()}
    return means['loss'], (means, skeleton.rest_of(model))

  def one(rest, part):
    gradients, (means, rest) = jax.grad(loss, has_aux=True)(state.params, rest, part)
    return rest, (gradients, means)

  if accumulate_steps == 1:
    rest, (gradients, means) = one(state.rest, batch)
    return gradients, means, rest
  return _accumulate(one, state, batch, accumulate_steps)


def _accumulate(one, state, batch, accumulate_steps):
  """The mean of `one` over the parts of a batch, one part in memory at a time."""
  size = len(jax.tree.leaves(batch)[0])
  if size % accumulate_steps:
    raise ValueError(f'accumulate_steps {accumulate_steps} does not divide the batch of {size}. '
                     'Pick a divisor of data.batch_size.')
  parts = jax.tree.map(lambda x: x.reshape(accumulate_steps, -1, *x.shape[1:]), batch)
  shapes = jax.eval_shape(lambda: one(state.rest, jax.tree.map(lambda x: x[0], parts))[1])

  def add(carry, part):
    rest, total = carry
    rest, new = one(rest, part)
    return (rest, jax.tree.map(jnp.add, total, new)), None

  zero = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
  (rest, total), _ = jax.lax.scan(add, (state.rest, zero), parts)
  gradients, means = jax.tree.map(lambda x: x / accumulate_steps, total)
  return gradients, means, rest
