"""SmoothQuant under outliers that were put into a small language model: a check that it undoes them."""

from experiments import networks

PAPER = dict(name='SmoothQuant', link='https://arxiv.org/abs/2211.10438', setting='OPT-175B on WikiText2, perplexity',
             title='SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models, '
             'ICML 2023')
SEEDS = (0, 1, 2)
METRICS = (networks.BITS_PER_CHARACTER, networks.KL)

NEAREST = dict(method='rtn', rule='absmax')
STATIC, TOKEN, SMOOTH = 'w8a8_static_tensor', 'w8a8', dict(name='smooth', alpha=0.5)


def _run(row, factor, recipe=STATIC, smooth=False, paper=None):
  made = (dict(name='outliers', channels=3, factor=float(factor)),) if factor > 1 else ()
  return networks.characters(f'{row}{", SmoothQuant" * smooth}', recipe=recipe, paper=paper,
                             transforms=(*made, *(SMOOTH,) * smooth), **NEAREST)


RUNS = {'float': dict(networks.CHARACTERS, paper='10.99')} | {
    f'static_{factor}' + '_smooth' * smooth: _run(f'{row}, static', factor, smooth=smooth, paper=paper)
    for factor, row, papers in ((1, 'no outliers', (None, None)), (30, 'outliers of 30', (None, None)),
                                (100, 'outliers of 100', ('93,080', '11.17')))
    for smooth, paper in zip((False, True), papers)} | {
    'token_100': _run('outliers of 100, a scale a token', 100, TOKEN)}

CLAIMS = [
    dict(says='outliers of 100: static ranges lose 0.5 bits per character or more', difference=('static_100', 'float'),
         within=(0.5, None)),
    dict(says='a scale a token loses a fifth of that or less', ratio=('static_100', 'token_100'), within=(5, None)),
    dict(says='with SmoothQuant they are within 0.002 of floats', difference=('static_100_smooth', 'float'),
         within=(-0.002, 0.002)),
    dict(says='outliers of 30: likewise', difference=('static_30_smooth', 'float'), within=(-0.002, 0.002)),
    dict(says='no outliers: SmoothQuant changes less than 0.001', difference=('static_1_smooth', 'static_1'),
         within=(-0.001, 0.001))]
