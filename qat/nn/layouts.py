"""Where a layer's weight has its inputs and its outputs.

Quantizers see every weight as matrices w[*lead, in, out], so that one Spec means the same for all
layers: (None, 1) is a scale an output, (128, 1) groups of 128 inputs. `lead` are batch axes, and
those on which nnx.vmap or nnx.scan stacked layers.
"""

import dataclasses
import math
import string

from flax import nnx
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Layout:
  """The trailing axes of a weight, by role, as positions in its unstacked shape."""
  inputs: tuple[int, ...]
  outputs: tuple[int, ...]
  shape: tuple[int, ...]      # Unstacked.
  batch: tuple[int, ...] = ()

  def to_matrix(self, w):
    """[*stack, *shape] -> [*stack, *batch, in, out]."""
    stack = w.ndim - len(self.shape)
    if stack < 0:
      raise ValueError(f'A weight of shape {w.shape} is read where matrices of shape {self.shape} were quantized: '
                       'it is one of a stack of vectors, a gain or a bias. Leave its path in floats by a rule.')
    order = self.batch + self.inputs + self.outputs
    w = jnp.transpose(w, (*range(stack), *(stack + a for a in order)))
    return w.reshape(*w.shape[:stack + len(self.batch)], self._size(self.inputs), self._size(self.outputs))

  def from_matrix(self, m):
    """The inverse of `to_matrix`."""
    order = self.batch + self.inputs + self.outputs
    stack = m.ndim - 2 - len(self.batch)
    w = m.reshape(*m.shape[:stack], *(self.shape[a] for a in order))
    back = sorted(range(len(order)), key=order.__getitem__)
    return jnp.transpose(w, (*range(stack), *(stack + a for a in back)))

  def _size(self, axes):
    return math.prod(self.shape[a] for a in axes)


def of_kernel(inputs, outputs, shape, batch=0):
  """Batch axes first, then `inputs` axes of inputs and `outputs` of outputs."""
  axes = tuple(range(batch + inputs + outputs))
  return Layout(axes[batch:batch + inputs], axes[batch + inputs:], shape[-len(axes):], axes[:batch])


def linear(layer):
  return of_kernel(1, 1, _shape(layer, 'kernel'))


def linear_general(layer):
  batch = len(layer.batch_axis)
  return of_kernel(len(layer.axis), len(layer.out_features), _shape(layer, 'kernel'), batch)


def conv(layer):
  return of_kernel(len(layer.kernel_size) + 1, 1, _shape(layer, 'kernel'))


def conv_transpose(layer):
  spatial = tuple(range(len(layer.kernel_size)))
  i, o = (len(spatial) + 1, len(spatial)) if layer.transpose_kernel else (len(spatial), len(spatial) + 1)
  return Layout((*spatial, i), (o,), _shape(layer, 'kernel')[-len(spatial) - 2:])


def embed(layer):
  """Features are the inputs and words the outputs: of a tied head, and a scale a word either way."""
  return Layout((1,), (0,), _shape(layer, 'embedding')[-2:])


def einsum(layer):
  """By the letters: shared ones that vanish are inputs, own ones outputs, kept shared ones batch."""
  shape = tuple(layer.kernel_shape)
  (x, w), y = split_einsum(layer.einsum_str, shape)
  axes = lambda keep: tuple(a for a, letter in enumerate(w) if keep(letter))
  return Layout(axes(lambda c: c in x and c not in y), axes(lambda c: c not in x),
                shape, axes(lambda c: c in x and c in y))


def split_einsum(equation, w_shape, x_ndim=None):
  """The letters of an equation of two operands, with letters of their own for the axes of '...'.

  >>> split_einsum('...d,dh->...h', (3, 4), x_ndim=3)
  (['ABd', 'dh'], 'ABh')
  """
  operands, result = equation.replace(' ', '').split('->')
  x, w = operands.split(',')
  named = len(w.replace('...', ''))
  hidden = len(w_shape) - named if '...' in w else 0
  if '...' in x and x_ndim is not None:
    hidden = max(hidden, x_ndim - len(x.replace('...', '')))
  letters = ''.join(c for c in string.ascii_uppercase + string.ascii_lowercase if c not in equation)[:hidden]
  # Axes of '...' are aligned at the right.
  of = lambda operand, count: operand.replace('...', letters[hidden - count:])
  x_count = hidden if x_ndim is None else x_ndim - len(x.replace('...', ''))
  return [of(x, x_count), of(w, len(w_shape) - named)], of(result, hidden)


def bare(param):
  """A Param that the model multiplies by itself: [*lead, in, out]."""
  return of_kernel(1, 1, tuple(param.get_value().shape))


def _shape(layer, name):
  return tuple(vars(layer)[name].get_value().shape)  # Not layer.name, which a quantized layer would encode.


# Each layer's weight: the attribute, and its layout.
LAYERS = {
    nnx.Linear: ('kernel', linear), nnx.LinearGeneral: ('kernel', linear_general),
    nnx.Einsum: ('kernel', einsum), nnx.Conv: ('kernel', conv),
    nnx.ConvTranspose: ('kernel', conv_transpose), nnx.Embed: ('embedding', embed)}
# Layers whose Params are not weights of a product: gains and offsets, also where they are stacked.
NORMS = (nnx.LayerNorm, nnx.RMSNorm, nnx.BatchNorm, nnx.GroupNorm, nnx.InstanceNorm, nnx.WeightNorm,
         nnx.SpectralNorm)


def layer_type(module):
  """The entry of LAYERS that `module` is an instance of, or None."""
  return next((t for t in LAYERS if isinstance(module, t)), None)
