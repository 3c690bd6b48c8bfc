"""AWQ on a small language model without outliers: there should be little to gain."""

from experiments import networks

PAPER = dict(name='AWQ', link='https://arxiv.org/abs/2306.00978', setting='Llama-2-7B on WikiText2, perplexity',
             title='AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration, MLSys 2024')
SEEDS = (0, 1, 2, 3, 4)
METRICS = (networks.BITS_PER_CHARACTER, networks.KL)

METHODS = {'nearest': dict(method='rtn', rule='absmax'), 'clipped': dict(method='rtn', rule='hessian'),
           'awq': dict(method='awq', rule='absmax'), 'gptq': dict(method='gptq', rule='absmax')}
NAMES = dict(nearest='nearest', clipped='nearest, ranges searched', awq='AWQ', gptq='GPTQ')
GRIDS = {'w3a16_g64': 'W3'}
PAPERS = {('w3a16_g64', 'nearest'): '6.66', ('w3a16_g64', 'gptq'): '6.42', ('w3a16_g64', 'awq'): '6.24'}

RUNS = {'float': dict(networks.CHARACTERS, paper='5.47')} | {
    f'{method}_{grid}': networks.characters(f'{GRIDS[grid]}, groups of 64: {NAMES[method]}', recipe=f'{grid}_asym',
                                            paper=PAPERS.get((grid, method)), **METHODS[method])
    for grid in GRIDS for method in METHODS}

CLAIMS = [
    dict(says='W3: AWQ loses within 10 % of what nearest with searched ranges loses: no outliers, nothing to save',
         ratio=('awq_w3a16_g64', 'clipped_w3a16_g64'), within=(0.9, 1.1)),
    dict(says='W3: AWQ loses less than rounding to nearest', ratio=('awq_w3a16_g64', 'nearest_w3a16_g64'),
         within=(None, 1)),
    dict(says='W3: AWQ loses less than GPTQ', ratio=('awq_w3a16_g64', 'gptq_w3a16_g64'), within=(None, 1))]
