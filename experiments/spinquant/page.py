"""SpinQuant: learned rotations against random ones, 4-bit weights and inputs, on a small language model."""

from experiments import networks

PAPER = dict(name='SpinQuant', link='https://arxiv.org/abs/2405.16406',
             setting='Llama-3-8B with W4A4KV4 on WikiText2, perplexity',
             title='SpinQuant: LLM Quantization with Learned Rotations, ICLR 2025')
SEEDS = (0, 1, 2, 3, 4)
METRICS = (networks.BITS_PER_CHARACTER, networks.KL)

NEAREST = dict(method='rtn', rule='absmax', recipe='w4a4')
RANDOM = {0: dict(transform='rotate')} | {
    seed: dict(transforms=(dict(name='rotate', seed=seed),)) for seed in (1, 2, 3)}

RUNS = {'float': dict(networks.CHARACTERS, paper='6.1'),
        'nearest': networks.characters('W4A4, not rotated', **NEAREST, paper='1,000')} | {
    f'random_{seed}': networks.characters(f'W4A4, random rotation {seed}', **NEAREST, **how,
                                          paper='8.0' if seed == 0 else None)
    for seed, how in RANDOM.items()} | {
    'learned': networks.characters('W4A4, learned from rotation 0', **NEAREST, transform='spin', paper='7.3')}

CLAIMS = [
    dict(says='the learned rotation loses less than that from which it was learned', ratio=('random_0', 'learned'),
         within=(1, None)),
    *(dict(says=f'KL: the learned rotation has less than random rotation {seed}', metric='mean_kl',
           ratio=(f'random_{seed}', 'learned'), within=(1, None)) for seed in RANDOM),
    dict(says='random rotations lose less than none', ratio=('nearest', 'random_0'), within=(1, None)),
    dict(says='two random rotations are within 10 % of each other', metric='mean_kl', ratio=('random_0', 'random_1'),
         within=(0.9, 1.1))]
