"""EfficientQAT's ablation of what trains, block by block and end to end, in 2 bits, on a small language model."""

from experiments import networks

PAPER = dict(name='EfficientQAT', link='https://arxiv.org/abs/2407.11062',
             setting='Llama-2-7B, groups of 64, mean perplexity',
             title='EfficientQAT: Efficient Quantization-Aware Training for Large Language Models, 2024')
SEEDS = (0, 1, 2)
METRICS = (networks.BITS_PER_CHARACTER, networks.KL)

BLOCK_AP = dict(method='efficientqat', steps=400, rate=1e-3, weight_rate=1e-4, batch_size=8)
NEAREST = dict(method='rtn', rule='absmax')
RUNS = {'float': networks.CHARACTERS} | {
    name: networks.characters(f'W2, groups of 32: {row}', recipe='w2a16_g32_asym', paper=paper, **options)
    for name, row, paper, options in (
        ('nearest', 'nearest', '453', NEAREST),
        ('clipping', 'clipping (OmniQuant)', '11.28', dict(method='omniquant')),
        ('rounding', 'rounding, steps and zeros (AutoRound)', '9.17', dict(method='autoround')),
        ('weights', 'weights, steps and zeros (Block-AP)', '8.53', BLOCK_AP),
        ('end', 'nearest, steps end to end (E2E-QP)', '9.33', dict(NEAREST, transform='scales')),
        ('both', 'Block-AP, E2E-QP', '7.68', dict(BLOCK_AP, transform='scales')))}

CLAIMS = [
    dict(says='Block-AP loses less than learned clipping', ratio=('clipping', 'weights'), within=(1, None)),
    dict(says='Block-AP loses less than learned rounding', ratio=('rounding', 'weights'), within=(1, None)),
    dict(says='learned rounding loses less than learned clipping', ratio=('clipping', 'rounding'), within=(1, None)),
    dict(says='Block-AP loses half of what rounding to nearest loses, or less', ratio=('nearest', 'weights'),
         within=(2, None)),
    dict(says='Block-AP loses less than E2E-QP', ratio=('end', 'weights'), within=(1, None)),
    dict(says='both lose less than Block-AP', ratio=('weights', 'both'), within=(1, None)),
    dict(says='both lose less than E2E-QP', ratio=('end', 'both'), within=(1, None))]
