"""AutoRound: rounding and ranges learned by signed gradients, in 4 and 2 bits, on a small language model."""

from experiments import networks

PAPER = dict(name='AutoRound', link='https://arxiv.org/abs/2309.05516',
             title='Optimize Weight Rounding via Signed Gradient Descent for the Quantization of LLMs, 2023',
             setting='Llama-2-7B in groups of 128, mean of 11 tasks, %')
SEEDS = (0, 1, 2)
METRICS = (networks.BITS_PER_CHARACTER, networks.KL)

GRIDS = {'w4a16_g32': 'W4, groups of 32', 'w2a16_g32': 'W2, groups of 32'}
METHODS = {'nearest': dict(method='rtn', rule='absmax'), 'gptq': dict(method='gptq', rule='absmax'),
           'autoround': dict(method='autoround')}
NAMES = dict(nearest='nearest', gptq='GPTQ', autoround='AutoRound')
PAPERS = {('w2a16_g32', 'nearest'): '29.94', ('w2a16_g32', 'gptq'): '35.37', ('w2a16_g32', 'autoround'): '48.64'}

RUNS = {'float': dict(networks.CHARACTERS, paper='57.98')} | {
    f'{method}_{grid}': networks.characters(f'{GRIDS[grid]}: {NAMES[method]}', recipe=f'{grid}_asym',
                                            paper=PAPERS.get((grid, method)), **METHODS[method])
    for grid in GRIDS for method in METHODS}

CLAIMS = [
    dict(says='W2 in groups of 32: AutoRound halves the KL of rounding to nearest', metric='mean_kl',
         ratio=('nearest_w2a16_g32', 'autoround_w2a16_g32'), within=(2, None)),
    dict(says='W4 in groups of 32: AutoRound has less KL than rounding to nearest', metric='mean_kl',
         ratio=('nearest_w4a16_g32', 'autoround_w4a16_g32'), within=(1, None)),
    dict(says='W2 in groups of 32: AutoRound loses half of what rounding to nearest loses, or less',
         ratio=('nearest_w2a16_g32', 'autoround_w2a16_g32'), within=(2, None)),
    dict(says='W2 in groups of 32: it loses less than GPTQ', ratio=('gptq_w2a16_g32', 'autoround_w2a16_g32'),
         within=(1, None)),
    dict(says='W4 in groups of 32: within 0.01 bits per character of nearest',
         difference=('autoround_w4a16_g32', 'nearest_w4a16_g32'), within=(-0.01, 0.01))]
