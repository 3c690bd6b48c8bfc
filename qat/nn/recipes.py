"""Named recipes: what people train and serve, as values.

`w` and `a` are the bits of weights and activations, `g` the group along the inputs. Weights are symmetric
integers with a scale an output, activations symmetric integers with a scale a token, found anew for each
batch ("dynamic"), unless a name says more. Inputs of convolutions have one scale for the tensor.
"""

import dataclasses
import difflib
import re

from qat.core import codebooks, formats, qarray, ranges, specs
from qat.nn import rules
from qat.quantizers import bitnet, dorefa, lsq, pact, static, stochastic
from qat.quantizers.ste import STE

Rule = rules.Rule
# An optional rule for these has the path '.*', which may match nothing.
CONVS = 'Conv|ConvTranspose'


def weight_and_input(weight, input=None, conv_input=None):
  """The same quantizers for every layer; convolutions may have an input quantizer of their own."""
  rest = Rule('.*', weight, input)
  return (Rule('.*', weight, conv_input, kind=CONVS), rest) if conv_input else (rest,)


def _int_weight(bits, block=specs.CHANNEL):
  return STE(specs.integer(bits, block))


def _int_input(bits, block=specs.TOKEN):
  return STE(specs.integer(bits, block, narrow=True))


def dynamic(weight_bits, input_bits, group=None, asymmetric=False):
  """Integers for weights and inputs, ranges found anew for each batch; asymmetric weights have an integer zero."""
  weight = STE(specs.affine(weight_bits, (group, 1))) if asymmetric else _int_weight(weight_bits, (group, 1))
  return weight_and_input(weight, _int_input(input_bits), _int_input(input_bits, specs.TENSOR))


def with_attention(recipe, bits):
  """`recipe`, and integers for the queries, keys, values and probabilities of attention, a scale a row."""
  return tuple(dataclasses.replace(rule, scores=_int_input(bits)) for rule in recipe)


def with_cache(recipe, bits):
  """`recipe`, and unsigned integers with a zero for the keys and values of attention, a range a token and head."""
  return tuple(dataclasses.replace(rule, cache=STE(specs.affine(bits, specs.TOKEN))) for rule in recipe)


def weight_only(bits, block=specs.CHANNEL, asymmetric=False):
  """Integer weights, float inputs; asymmetric weights have a zero in float32, as HQQ solves for."""
  zero = qarray.Spec(formats.Int(bits, signed=False), block, zero=qarray.Zero())
  return weight_and_input(STE(zero) if asymmetric else _int_weight(bits, block))


def calibrated(weight_bits, input_bits, block=specs.CHANNEL):
  """Integers for weights and inputs; the inputs' one range comes from calibration. `block` is that of weights."""
  signed, unsigned = (specs.integer(input_bits, specs.TENSOR, signed=s) for s in (True, False))
  return weight_and_input(_int_weight(weight_bits, block), static.Static(signed, unsigned=unsigned))


def learned(weight_bits, input_bits, gradient_scale=lsq.paper_gradient_scale):
  """LSQ: learned steps, one an output for weights, one for each input; unsigned where inputs are."""
  signed, unsigned = (specs.integer(input_bits, specs.TENSOR, signed=s) for s in (True, False))
  weight = lsq.LSQ(specs.integer(weight_bits, specs.CHANNEL), gradient_scale=gradient_scale)
  return weight_and_input(weight, lsq.LSQ(signed, unsigned=unsigned, gradient_scale=gradient_scale))


def dorefa_net(weight_bits, input_bits, gradient_bits=None):
  """DoReFa-Net: squashed weights, inputs in [0, 1]."""
  gradient = None if gradient_bits is None else dorefa.DoReFaGradient(gradient_bits)
  return (Rule('.*', dorefa.DoReFaWeight(weight_bits), dorefa.DoReFaInput(input_bits), gradient=gradient),)


def pact_dorefa(weight_bits, input_bits):
  """PACT for inputs that are not negative, DoReFa for weights: the pair of the PACT paper."""
  return (Rule('.*', dorefa.DoReFaWeight(weight_bits), pact.PACT(input_bits)),)


def stochastic_rounding(weight_bits, input_bits):
  """As `dynamic`, with weights rounded up or down by chance."""
  return weight_and_input(stochastic.StochasticRounding(specs.integer(weight_bits, specs.CHANNEL)),
                          _int_input(input_bits), _int_input(input_bits, specs.TENSOR))


def standard(spec, rule=qarray.absmax, inputs=True):
  """A grid of core/specs.py for weights, and for inputs along their last axis."""
  return weight_and_input(STE(specs.kernel(spec), rule), STE(spec, rule) if inputs else None)


def fp8():
  """E4M3: a scale an output, and a scale a token."""
  make = lambda block: STE(qarray.Spec(formats.FP8_E4M3, block))
  return weight_and_input(make(specs.CHANNEL), make(specs.TOKEN), make(specs.TENSOR))


def ternary():
  """BitNet b1.58."""
  return weight_and_input(bitnet.weight(), bitnet.input())


RECIPES = {
    'w8a8': lambda: dynamic(8, 8), 'w4a8': lambda: dynamic(4, 8), 'w4a4': lambda: dynamic(4, 4),
    'w2a2': lambda: dynamic(2, 2),
    'w4a8_g32': lambda: dynamic(4, 8, 32), 'w4a8_g64': lambda: dynamic(4, 8, 64),
    'w4a8_g128': lambda: dynamic(4, 8, 128),
    'w8a16': lambda: weight_only(8), 'w4a16': lambda: weight_only(4), 'w3a16': lambda: weight_only(3),
    'w2a16': lambda: weight_only(2),
    'w4a16_g32': lambda: weight_only(4, (32, 1)), 'w4a16_g64': lambda: weight_only(4, (64, 1)),
    'w4a16_g128': lambda: weight_only(4, (128, 1)), 'w3a16_g64': lambda: weight_only(3, (64, 1)),
    'w2a16_g64': lambda: weight_only(2, (64, 1)),
    'w8a8_static': lambda: calibrated(8, 8), 'w4a8_static': lambda: calibrated(4, 8),
    'w4a4_static': lambda: calibrated(4, 4), 'w2a2_static': lambda: calibrated(2, 2),
    'w8a8_lsq': lambda: learned(8, 8), 'w4a4_lsq': lambda: learned(4, 4), 'w3a3_lsq': lambda: learned(3, 3),
    'w2a2_lsq': lambda: learned(2, 2),
    'w4a4_dorefa': lambda: dorefa_net(4, 4), 'w2a2_dorefa': lambda: dorefa_net(2, 2),
    'w1a2g6_dorefa': lambda: dorefa_net(1, 2, 6),
    'w4a4_pact': lambda: pact_dorefa(4, 4), 'w2a2_pact': lambda: pact_dorefa(2, 2),
    'w8a8_attention': lambda: with_attention(dynamic(8, 8), 8),
    'w4a8_attention': lambda: with_attention(dynamic(4, 8), 8),
    'w4a8_stochastic': lambda: stochastic_rounding(4, 8),
    'bitnet': ternary, 'fp8': fp8,
    'mxfp8': lambda: standard(specs.MXFP8, ranges.ocp_floor), 'mxfp6': lambda: standard(specs.MXFP6, ranges.ocp_floor),
    'mxfp4': lambda: standard(specs.MXFP4, ranges.ocp_floor),
    'mxint8': lambda: standard(specs.MXINT8, ranges.ocp_floor),
    'nvfp4': lambda: standard(specs.NVFP4),
    'nf4': lambda: standard(specs.NF4, inputs=False),
    'nf3': lambda: standard(dataclasses.replace(specs.NF4, format=codebooks.NF3), inputs=False),
    'nf2': lambda: standard(dataclasses.replace(specs.NF4, format=codebooks.NF2), inputs=False),
    'nf4_dq': lambda: standard(specs.NF4_DQ, ranges.centered, inputs=False),
    'fp4_bnb': lambda: standard(specs.FP4_BNB, inputs=False),
    'q4_0': lambda: standard(specs.Q4_0, ranges.signed_extreme, inputs=False),
    'q4_1': lambda: standard(specs.Q4_1, inputs=False), 'q8_0': lambda: standard(specs.Q8_0, inputs=False),
    'float': None,
}

# Families that take bits: learned(2, 2) is 'w2a2_lsq'.
QUANTIZERS = {'ste': dynamic, 'static': calibrated, 'lsq': learned, 'dorefa': dorefa_net, 'pact': pact_dorefa,
              'stochastic': stochastic_rounding,
              'lsq_by_numbers': lambda weight_bits, input_bits: learned(weight_bits, input_bits, lsq.by_numbers),
              'lsq_unscaled': lambda weight_bits, input_bits: learned(weight_bits, input_bits, lsq.unscaled)}


def get(name):
  """The Rules of a named recipe; none for 'float'.

  Any 'w<bits>a<bits>' or 'w<bits>a<bits>_g<group>' is one, with 16 for inputs in floats; '_asym' after it gives weights
  unsigned integers and a zero beside each scale, in float32 where inputs are floats, else an integer that the products
  of codes take. So is any 'w<bits>a<bits>_static', and any 'w<bits>a<bits>_dorefa', with 'g<bits>' for gradients before
  its '_'. 'w<bits>a16_tensor' and 'w<bits>a<bits>_static_tensor' have one scale for the whole weight. '_kv<bits>' after
  any name puts the keys and values of attention on a grid of their own.

  >>> [rule.path for rule in get('w4a16_g128')]
  ['.*']
  """
  before, _, bits = name.partition('_kv')
  if re.fullmatch('[1-8]', bits):
    return with_cache(get(before), int(bits))
  if match := re.fullmatch(r'w([1-8])a(\d+)(?:_g(\d+))?(_asym)?', name):
    weight_bits, input_bits, group = (part and int(part) for part in match.groups()[:3])
    asymmetric = match[4] is not None
    if input_bits in (16, 32):
      return weight_only(weight_bits, (group, 1), asymmetric)
    if 1 <= input_bits <= 8:
      return dynamic(weight_bits, input_bits, group, asymmetric)
  if match := re.fullmatch(r'w([1-8])a(?:16|([1-8])_static)(_tensor)?', name):
    block = specs.TENSOR if match[3] else specs.CHANNEL
    return calibrated(int(match[1]), int(match[2]), block) if match[2] else weight_only(int(match[1]), block)
  if match := re.fullmatch(r'w([1-8])a([1-8])(?:g([1-8]))?_dorefa', name):
    return dorefa_net(*(part and int(part) for part in match.groups()))
  if name not in RECIPES:
    raise ValueError(f'recipe {name!r}: there is none of that name. {_suggest(name, RECIPES)}')
  return RECIPES[name]() if RECIPES[name] else (Rule('.*'),)


def family(quantizer, weight_bits, input_bits):
  """The Rules of a quantizer at given bits: family('lsq', 2, 2) is get('w2a2_lsq')."""
  if quantizer not in QUANTIZERS:
    raise ValueError(f'quantizer {quantizer!r}: there is none of that name. {_suggest(quantizer, QUANTIZERS)}')
  return QUANTIZERS[quantizer](weight_bits, input_bits)


def at(path, recipe):
  """The Rules of `recipe`, for the layers at `path` only.

  >>> at('head', get('w8a8'))[0].path
  'head'
  """
  return tuple(dataclasses.replace(rule, path=path) for rule in recipe)


def resolve(config):
  """The Rules of a config's plain data.

  Args:
    config: {'name': 'w4a8'} or {'quantizer': 'lsq', 'weight_bits': 2, 'input_bits': 2}, and optionally
      'rules': {path: config or name}, which come first, in order: the policy for first and last layers.

  >>> [r.path for r in resolve({'name': 'w2a2_lsq', 'rules': {'head': 'w8a8', 'embed': 'float'}})]
  ['head', 'head', 'embed', '.*']
  """
  if isinstance(config, str):
    return get(config)
  config = dict(config)
  first = [rule for path, inner in dict(config.pop('rules', {})).items() for rule in at(path, resolve(inner))]
  if unknown := set(config) - {'name', 'quantizer', 'weight_bits', 'input_bits'}:
    raise ValueError(f'recipe {config}: {sorted(unknown)} mean nothing to it. '
                     "Give 'name', or 'quantizer', 'weight_bits' and 'input_bits', and optionally 'rules'.")
  if 'name' in config and len(config) > 1:
    raise ValueError(f"recipe {config}: 'name' settles everything. Drop the other keys, or drop 'name'.")
  try:
    rest = get(config['name']) if 'name' in config else family(**config)
  except TypeError as e:
    raise ValueError(f"recipe {config}: a family needs 'quantizer', 'weight_bits' and 'input_bits'. "
                     "Give all three, or a 'name'.") from e
  return (*first, *rest)


def _suggest(name, known):
  near = difflib.get_close_matches(name, known, 1)
  return (f'Did you mean {near[0]!r}? ' if near else '') + f'Known: {", ".join(known)}.'
