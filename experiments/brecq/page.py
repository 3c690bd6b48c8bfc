"""AdaRound, BRECQ and QDrop with quantized inputs, every layer of an MLP on digits."""

from experiments import networks

PAPER = dict(name='BRECQ and QDrop', link='https://arxiv.org/abs/2203.05740',
             title='QDrop: Randomly Dropping Quantization for Extremely Low-bit Post-Training Quantization, ICLR 2022',
             setting='ResNet-18 on ImageNet, top-1 %')
SEEDS = tuple(range(10))
METRICS = (networks.ACCURACY, networks.KL)

GRIDS = {'w2a2': 'W2A2', 'w2a4': 'W2A4', 'w3a3': 'W3A3', 'w4a8': 'W4A8'}
LEARNED = dict(steps=2000, batch_size=32, examples=1024)
METHODS = {
    'nearest': dict(method='rtn', rule='search', examples=1024), 'adaround': dict(LEARNED, method='adaround'),
    'brecq': dict(LEARNED, method='brecq'), 'qdrop': dict(LEARNED, method='qdrop', step_rate=1e-3)}
NAMES = dict(nearest='nearest', adaround='AdaRound', brecq='BRECQ', qdrop='QDrop')
PAPERS = {('w2a4', 'adaround'): '62.31', ('w2a4', 'brecq'): '63.56', ('w2a4', 'qdrop'): '64.49',
          ('w3a3', 'adaround'): '64.18', ('w3a3', 'brecq'): '64.24', ('w3a3', 'qdrop'): '65.42',
          ('w2a2', 'qdrop'): '51.69'}

RUNS = {'float': dict(networks.DIGITS, paper='71.06')} | {
    f'{name}_{grid}': networks.digits(f'{GRIDS[grid]} {NAMES[name]}', recipe=f'{grid}_static',
                                      paper=PAPERS.get((grid, name)), **options)
    for grid in GRIDS for name, options in METHODS.items()}

CLAIMS = [
    dict(says=f'{GRIDS[grid]}: {NAMES[better]} has at least the accuracy of {NAMES[worse]}',
         difference=(f'{better}_{grid}', f'{worse}_{grid}'), within=(0, None))
    for grid in ('w2a2', 'w2a4', 'w3a3') for worse, better in (('adaround', 'brecq'), ('brecq', 'qdrop'))] + [
    dict(says='W2A2: AdaRound beats nearest', difference=('adaround_w2a2', 'nearest_w2a2'), within=(0, None)),
    dict(says='W4A8: BRECQ and AdaRound are within 0.3 points', difference=('brecq_w4a8', 'adaround_w4a8'),
         within=(-0.3, 0.3)),
    dict(says='W4A8: QDrop and AdaRound are within 0.3 points', difference=('qdrop_w4a8', 'adaround_w4a8'),
         within=(-0.3, 0.3))]
