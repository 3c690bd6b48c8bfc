"""quantize and freeze: a model in, a model out."""

from flax import nnx

from qat.nn import attention, quantized, rules, weights

Rule = rules.Rule


def quantize(model, recipe, compute='low_bit'):
  """A copy of `model` whose layers have the quantizers of the first rule that they match.

  The copy shares the arrays of `model`, which stays as it is. Params keep their paths and their floats;
  layers read them on their grids. A Param that two layers share is quantized once, by the rule of the first of them.

  Args:
    model: any nnx.Module.
    recipe: Rules, in order; see qat.nn.recipes for named ones.
    compute: 'low_bit', for products of codes (int8, fp8, MXFP8, NVFP4) where input and weight have them and the device
      does; or 'float', for products of decoded operands. They differ by rounding of sums. What `prepare` makes of a
      frozen model multiplies by codes whatever this was.

  Returns:
    A model of the same class. Where inputs have quantizers that need a range, call `calibrate` next.
  """
  if compute not in quantized.COMPUTE:
    raise ValueError(f'compute {compute!r}: products are of {quantized.COMPUTE}. Choose one.')
  chosen = {site.path: rule for site, rule in rules.first_matches(recipe, rules.sites(model)).items()}
  model = nnx.clone(model)
  found = {site.path: site for site in rules.sites(model)}
  shared = {}  # id of a Param -> its Weight.
  for path, rule in chosen.items():  # In the order of definition, which a copy does not keep.
    if rule is not None:
      _quantize_site(found[path], rule, shared)
      q = quantized.of(found[path].module)
      if q is not None and (rule.weight is not None or rule.input is not None):
        q.compute = compute
  return model


def _quantize_site(site, rule, shared):
  """Puts the quantizers of `rule` at one site, in place."""
  if site.kind == 'Attention':
    held = rule.scores if rule.cache is None else rule.cache
    prototypes = (rule.scores, held, held, rule.scores)
    if held is not None:
      operands = (None if p is None else _for_activation(p, site.lead) for p in prototypes)
      quantized.attach(site.module, site.path, site.lead).scores = attention.Scores(*operands)
    return
  if isinstance(site.variable, weights.Codes):
    raise ValueError(f"Layer '{site.path}' is frozen: it holds codes, and no float to put on a grid. "
                     'Quantize the model that qat.freeze was given.')
  attach = lambda: quantized.attach(site.module, site.path, site.lead)
  if rule.weight is not None:
    q = attach()
    if id(site.variable) not in shared:
      shared[id(site.variable)] = _weight(rule.weight, site)
    q.weights[site.name] = shared[id(site.variable)]
  if site.kind == 'Param':
    return
  for slot in ('input', 'output'):
    prototype = getattr(rule, slot)
    if prototype is not None:
      setattr(attach(), slot, _for_activation(prototype, site.lead))
  if rule.gradient is not None:
    attach().gradient = rule.gradient.for_input(site.lead)


def _for_activation(prototype, lead):
  """The quantizer of one operand; one that needs a range waits for calibrate."""
  return prototype.for_input(lead) if _ready(prototype) else nnx.clone(prototype)


def _ready(quantizer):
  """Whether a prototype works without calibration."""
  return quantizer.observer is None


def _weight(prototype, site):
  matrix = site.layout.to_matrix(site.variable.get_value())
  try:
    weight = weights.Weight(prototype.for_weight(matrix), site.layout, matrix.dtype)
    weights.shapes(weight, site.variable)  # A block that does not tile says so now, and names the layer.
    return weight
  except ValueError as e:
    raise ValueError(f"Layer '{site.path}', whose weight is {matrix.shape[-2]} inputs x "
                     f'{matrix.shape[-1]} outputs: {e}') from e


def freeze(model):
  """A copy of `model` that holds codes in place of floats, and nothing left to learn in its quantizers.

  The codes are those that the model was training on: outputs are equal, bit for bit.
  """
  model = nnx.clone(model)
  settle(model)
  return model


def settle(model):
  """`freeze`, in place."""
  frozen = {}  # id of a Param -> its Codes.
  for layer in quantized.layers(model).values():
    for name, weight in vars(layer)['quantizers'].weights.items():
      variable = vars(layer)[name]
      if not isinstance(variable, weights.Codes) and id(variable) not in frozen:
        frozen[id(variable)] = weights.freeze(weight, variable)
  swap(model, frozen)
  settle_activations(model)


def settle_activations(model):
  """Freezes the quantizers of activations, in place."""
  for path, layer in quantized.layers(model).items():
    q = vars(layer)['quantizers']
    q.gradient = None
    for holder, slot in activations(q):
      setattr(holder, slot, _frozen(getattr(holder, slot), path))


def hold(model, codes):
  """Puts `codes`, {site's path: QArray[*lead, in, out]}, in place of the floats, wherever these are shared."""
  swap(model, {id(site.variable): weights.Codes(codes[site.path])
                for site in rules.sites(model) if site.path in codes})


def swap(model, frozen):
  """Puts Codes, by the id of the variable, in its place, in place."""
  readers = {}
  for layer in quantized.layers(model).values():
    q = vars(layer)['quantizers']
    for name, weight in list(q.weights.items()):
      key = id(vars(layer)[name])
      if key in frozen:
        q.weights[name] = readers.setdefault(key, weights.Weight(None, weight.layout, weight.dtype))
        setattr(layer, name, frozen[key])


def activations(q):
  """(holder, attribute) of each activation's quantizer of one layer."""
  places = [(q, 'input'), (q, 'output')]
  if q.scores is not None:
    places += [(q.scores, name) for name in ('query', 'key', 'value', 'probabilities')]
  return [(holder, slot) for holder, slot in places if getattr(holder, slot) is not None]


def _frozen(quantizer, path):
  if not _ready(quantizer):
    raise ValueError(f"Layer '{path}' has a {type(quantizer).__name__} that was not calibrated: it has no range. "
                     'Call qat.calibrate(model, batches) before qat.freeze.')
  return quantizer.frozen()
