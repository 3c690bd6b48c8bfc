"""HAWQ: layers of different bits by their sensitivity, against all of the same, on a small language model."""

from experiments import networks

PAPER = dict(name='HAWQ-V3', title='HAWQ-V3: Dyadic Neural Network Quantization, ICML 2021',
             link='https://arxiv.org/abs/2011.10680', setting='ResNet-18 on ImageNet, top-1 %')
SEEDS = (0, 1, 2)
METRICS = (networks.BITS_PER_CHARACTER, networks.KL)

# As much as 3 bits, a scale and a zero an output take in each layer.
BUDGET = dict(candidates=('w2a16_asym', 'w3a16_asym', 'w4a16_asym'), bits_per_weight=3.4231)
NEAREST = dict(method='rtn', rule='absmax')
SENSITIVITIES = dict(hessian='the Hessian trace', fisher='the Fisher matrix', kl='KL', output='output noise')

RUNS = {'float': dict(networks.CHARACTERS, paper='71.47'),
        'all_w4': networks.characters('W4 throughout', recipe='w4a16_asym', paper='68.45', **NEAREST),
        'all_w3': networks.characters('W3 throughout', recipe='w3a16_asym', **NEAREST)} | {
    name: networks.characters(f'W2, W3 and W4 by {row}', recipe='w3a16_asym', search=dict(BUDGET, sensitivity=name),
                              **NEAREST)
    for name, row in SENSITIVITIES.items()}

CLAIMS = [
    dict(says=f'by {row}: less KL than W3 throughout, at equal bits', ratio=('all_w3', name), metric='mean_kl',
         within=(1, None))
    for name, row in SENSITIVITIES.items()]
