r"""all-MiniLM-L6-v2 in 8 bits without training: static ranges, with and without SmoothQuant.

Recall of verses: each of 900 of Proverbs (King James) among those of the World English Bible. Float 94.3 %; W8A8 static
93.9 % without SmoothQuant, 93.4 % with it, whose embeddings are nearer to the float ones (cosine 0.986 against 0.980).
See docs/results/minilm/.
python -m qat.run.ptq --config configs/minilm.py:recipe=w8a8_static,alpha=0.5 --workdir /tmp/minilm
`:recipe=` any name of qat/nn/recipes.py; `:alpha=0` leaves SmoothQuant out; `:layers=` those that it smooths.
"""

from configs import defaults

# Norms feed these. After the gelu it does harm: the ranges of `down` are its own.
FED_BY_NORMS = r'blocks/\d+/(attention/[qkv]|ffn/up)'


def get_config(arg=''):
  arg = defaults.parse_arg(arg, recipe='w8a8_static', alpha=0.5, layers=FED_BY_NORMS, method='rtn', edition='numbered',
                           smoke=False)
  config = defaults.ptq('retrieval', 'minilm')
  config.calibration.update(sentences=256, batch_size=64)
  smooth = (dict(name='smooth_inputs', layers=arg.layers, alpha=arg.alpha),) if arg.alpha else ()
  config.transforms = (*defaults.transforms(arg.method), *smooth)
  config.recipe.update(name='float', rules={r'blocks/[\w/]+': arg.recipe})
  config.method = defaults.method(arg.method, arg.smoke)
  config.eval.update(pairs=900, edition=arg.edition)
  if arg.smoke:
    config.calibration.update(sentences=4, batch_size=2)
    config.eval.pairs = 8
  return config
