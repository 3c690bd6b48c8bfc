"""GPTQ against rounding to nearest, a scale and a zero an output, on a small language model."""

from experiments import networks

PAPER = dict(name='GPTQ', title='GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers, '
             'ICLR 2023', link='https://arxiv.org/abs/2210.17323', setting='OPT-125M on WikiText2, perplexity')
SEEDS = (0, 1, 2)
METRICS = (networks.BITS_PER_CHARACTER, networks.KL)

METHODS = {
    'nearest': dict(method='rtn', rule='absmax'),
    'gptq': dict(method='gptq', rule='absmax', act_order=False),
    'act_order': dict(method='gptq', rule='absmax', act_order=True)}
NAMES = dict(nearest='nearest', gptq='GPTQ', act_order='GPTQ, act-order')
PAPERS = {('nearest', 4): '37.28', ('gptq', 4): '31.12', ('nearest', 3): '1,300', ('gptq', 3): '53.85'}

RUNS = {'float': dict(networks.CHARACTERS, paper='27.65')} | {
    f'{name}_w{bits}': networks.characters(f'W{bits} {NAMES[name]}', recipe=f'w{bits}a16_asym',
                                           paper=PAPERS.get((name, bits)), **options)
    for bits in (4, 3, 2) for name, options in METHODS.items()}

CLAIMS = [
    dict(says='W3: GPTQ halves the KL to the float network', metric='mean_kl', ratio=('nearest_w3', 'gptq_w3'),
         within=(2, None)),
    dict(says='W2: GPTQ lessens it', metric='mean_kl', ratio=('nearest_w2', 'gptq_w2'), within=(1, None)),
    dict(says='W2: act-order lessens it further', metric='mean_kl', ratio=('gptq_w2', 'act_order_w2'),
         within=(1, None)),
    dict(says='W3: GPTQ cuts the loss in bits per character 2.5 times or more', ratio=('nearest_w3', 'gptq_w3'),
         within=(2.5, None)),
    dict(says='W2: GPTQ cuts it 2.5 times or more', ratio=('nearest_w2', 'gptq_w2'), within=(2.5, None)),
    dict(says='W3: act-order cuts it 1.1 times further', ratio=('gptq_w3', 'act_order_w3'), within=(1.1, None)),
    dict(says='W2: act-order cuts it 1.1 times further', ratio=('gptq_w2', 'act_order_w2'), within=(1.1, None))]
