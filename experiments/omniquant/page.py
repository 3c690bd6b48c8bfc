"""OmniQuant's learned clipping of weights, a scale and a zero an output, on a small language model."""

from experiments import networks

PAPER = dict(name='OmniQuant', link='https://arxiv.org/abs/2308.13137', setting='Llama-2-7B on WikiText2, perplexity',
             title='OmniQuant: Omnidirectionally Calibrated Quantization for Large Language Models, ICLR 2024')
SEEDS = (0, 1, 2)
METRICS = (networks.BITS_PER_CHARACTER, networks.KL)

METHODS = {'nearest': dict(method='rtn', rule='absmax'), 'clipping': dict(method='omniquant')}
NAMES = dict(nearest='nearest', clipping='learned clipping')
PAPERS = {(3, 'clipping'): '6.03 (groups of 128)', (2, 'clipping'): '11.06 (groups of 128)'}

RUNS = {'float': dict(networks.CHARACTERS, paper='5.47')} | {
    f'{method}_w{bits}': networks.characters(f'W{bits} {NAMES[method]}', recipe=f'w{bits}a16_asym',
                                             paper=PAPERS.get((bits, method)), **METHODS[method])
    for bits in (4, 3, 2) for method in METHODS}

CLAIMS = [
    dict(says='W3: learned clipping loses 0.6 of what rounding to nearest loses, or less',
         ratio=('clipping_w3', 'nearest_w3'), within=(None, 0.6)),
    dict(says='W2: 0.6 of it, or less', ratio=('clipping_w2', 'nearest_w2'), within=(None, 0.6)),
    dict(says='W4: within 0.01 bits per character of nearest', difference=('clipping_w4', 'nearest_w4'),
         within=(-0.01, 0.01))]
