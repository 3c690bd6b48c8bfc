"""QuIP: incoherence processing before 2-bit rounding, on a small language model."""

from experiments import networks

PAPER = dict(name='QuIP', title='QuIP: 2-Bit Quantization of Large Language Models With Guarantees, NeurIPS 2023',
             link='https://arxiv.org/abs/2307.13304', setting='Llama-2-70B on WikiText2, perplexity')
SEEDS = (0, 1, 2, 3, 4)
METRICS = (networks.BITS_PER_CHARACTER, networks.KL)

METHODS = {
    'nearest': dict(method='rtn', rule='absmax'), 'ldlq': dict(method='ldlq', rule='absmax', act_order=False),
    'nearest_incoherent': dict(method='rtn', rule='absmax', transform='incoherence'),
    'quip': dict(method='ldlq', rule='absmax', act_order=False, transform='incoherence')}
NAMES = dict(nearest='nearest', ldlq='LDLQ', nearest_incoherent='nearest, incoherent',
             quip='LDLQ, incoherent (QuIP)')
PAPERS = {(2, 'ldlq'): '109.8', (2, 'quip'): '5.57'}

RUNS = {'float': dict(networks.CHARACTERS, paper='3.12')} | {
    f'{method}_w{bits}': networks.characters(f'W{bits} {NAMES[method]}', recipe=f'w{bits}a16_asym',
                                             paper=PAPERS.get((bits, method)), **METHODS[method])
    for bits in (2,) for method in METHODS}

CLAIMS = [
    dict(says='W2: incoherence lessens the loss of LDLQ 1.5 times or more', ratio=('ldlq_w2', 'quip_w2'),
         within=(1.5, None)),
    dict(says='W2: incoherence lessens the loss of rounding to nearest', ratio=('nearest_w2', 'nearest_incoherent_w2'),
         within=(1, None)),
    dict(says='W2: LDLQ and incoherence together lose half of what rounding to nearest loses, or less',
         ratio=('nearest_w2', 'quip_w2'), within=(2, None)),
    dict(says='W2: incoherence lessens the KL of LDLQ', metric='mean_kl', ratio=('ldlq_w2', 'quip_w2'),
         within=(1, None))]
