"""Taps: modules that stand where a layer reads its input, and gather the Moments of what passes.

A tap gathers what the product reads: the input on its quantizer's grid, if it has one. It looks like an input
quantizer to Linear, LinearGeneral, Einsum and Embed (a tied head), and like `conv_general_dilated` to Conv, whose rows
are the patches under the kernel.
"""

import math

from flax import nnx
import jax
import jax.numpy as jnp

from qat.nn import layouts, quantized, rules
from qat.ptq.moments import Moments


class Gathered(nnx.Variable):
  """What a tap has gathered."""


class Rows(nnx.Module):
  """An input quantizer that gathers the rows it is given, [*batch, *rows, k]."""

  def __init__(self, inner, k, batch, lead, start):
    self.inner = nnx.data(inner)
    self.batch = len(batch)
    self.gathered = Gathered(start(k, (*lead, *batch)))

  def __call__(self, x):
    x = x if self.inner is None else self.inner(x)
    rows = x.reshape(*x.shape[:self.batch], -1, x.shape[-1])
    self.gathered.set_value(self.gathered.get_value().add(rows))
    return x

  def advance(self):
    if self.inner is not None:
      self.inner.advance()


class Patches(nnx.Module):
  """A `conv_general_dilated` that gathers the patches that each group of channels sees, [group, n, k]."""

  def __init__(self, original, k, groups, lead, start):
    self.original = original
    self.gathered = Gathered(start(k, (*lead, groups)))

  def __call__(self, x, kernel, strides, padding, **settings):
    dims, groups = settings['dimension_numbers'], settings.get('feature_group_count', 1)
    dilations = {name: settings[name] for name in ('lhs_dilation', 'rhs_dilation') if name in settings}
    size = kernel.shape[:-2]
    patches = jax.lax.conv_general_dilated_patches(
        x, size, strides, padding, dimension_numbers=dims, **dilations)    # [b, *spatial, channels * size]
    patches = patches.reshape(-1, groups, x.shape[-1] // groups, math.prod(size))
    rows = jnp.transpose(patches, (1, 0, 3, 2)).reshape(groups, len(patches), -1)  # k = size * channels / groups
    self.gathered.set_value(self.gathered.get_value().add(rows))
    return self.original(x, kernel, strides, padding, **settings)


def tappable(site):
  """Why the inputs of a site cannot be gathered; '' if they can."""
  kind = layouts.layer_type(site.module)
  if site.kind == 'Param':
    return 'a bare Param: what it is multiplied by is unknown'
  if kind is nnx.ConvTranspose:
    return 'a transposed convolution: its patches are not gathered'
  if kind is nnx.Conv and site.lead:
    return 'stacked convolutions: their patches are not gathered'
  if kind is nnx.Conv and site.module.mask is not None:
    return 'a masked convolution: its patches are not gathered'
  return ''


def insert(model, paths, start=Moments.zeros):
  """Puts a tap at each of the layers `paths`, in place: {path: tap}.

  `start`: (k, lead) -> what it gathers rows in, of none yet: Moments.zeros or moments.Rows.zeros.
  """
  found = {site.path: site for site in rules.sites(model) if site.name is not None}
  return {path: _insert(found[path], start) for path in paths if not tappable(found[path])}


def _insert(site, start):
  layer, layout = site.module, site.layout
  batch = tuple(layout.shape[a] for a in layout.batch)
  k = math.prod(layout.shape[a] for a in layout.inputs)
  if layouts.layer_type(layer) is nnx.Conv:
    tap = Patches(layer.conv_general_dilated, k, layer.feature_group_count, site.lead, start)
    layer.conv_general_dilated = nnx.data(tap)
    return layer.conv_general_dilated
  q = quantized.attach(layer, site.path, site.lead)
  q.input = Rows(q.input, k, batch, site.lead, start)
  return q.input


def moments(model, paths):
  """{path: what it has gathered} of the taps that `insert` put at `paths`."""
  found = {}
  for site in rules.sites(model):
    if site.name is None or site.path not in paths:
      continue
    q = quantized.of(site.module)
    places = (vars(site.module).get('conv_general_dilated'), q and q.input)
    for tap in places:
      if isinstance(tap, (Rows, Patches)):
        found[site.path] = tap.gathered.get_value()
  return found
