"""HQQ against minimum and maximum in 4, 3 and 2 bits, by group, on a small language model."""

from experiments import networks

PAPER = dict(name='HQQ', title='Half-Quadratic Quantization of Large Machine Learning Models, 2023',
             link='https://mobiusml.github.io/hqq_blog/', setting='Llama-2-7B, mean of 11 tasks, %')
SEEDS = (0, 1, 2)
METRICS = (networks.BITS_PER_CHARACTER, networks.KL)

GRIDS = {'w4a16_g64': 'W4, groups of 64', 'w3a16_g64': 'W3, groups of 64', 'w2a16_g32': 'W2, groups of 32',
         'w4a16': 'W4, an output'}
METHODS = {'minmax': dict(method='rtn', rule='absmax'), 'hqq': dict(method='hqq')}
NAMES = dict(minmax='minimum and maximum', hqq='HQQ')
PAPERS = {('w4a16', 'minmax'): '55.49', ('w4a16', 'hqq'): '46.05'}

RUNS = {'float': dict(networks.CHARACTERS, paper='57.98')} | {
    f'{method}_{grid}': networks.characters(f'{GRIDS[grid]}: {NAMES[method]}', recipe=f'{grid}_asym',
                                            paper=PAPERS.get((grid, method)), **METHODS[method])
    for grid in GRIDS for method in METHODS}

CLAIMS = [
    dict(says=f'{GRIDS[grid]}: HQQ has less KL than minimum and maximum', metric='mean_kl',
         ratio=(f'minmax_{grid}', f'hqq_{grid}'), within=(1, None)) for grid in GRIDS]
