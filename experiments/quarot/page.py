"""QuaRot: Hadamard rotations before 4-bit weights and activations, on a small language model."""

from experiments import networks

PAPER = dict(name='QuaRot', title='QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs, NeurIPS 2024',
             link='https://arxiv.org/abs/2404.00456', setting='Llama-2-7B on WikiText2, perplexity')
SEEDS = (0, 1, 2)
METRICS = (networks.BITS_PER_CHARACTER, networks.KL)

GRIDS = {'w4a4': 'W4A4', 'w3a3': 'W3A3', 'w8a8': 'W8A8'}
METHODS = {'nearest': dict(method='rtn', rule='absmax'), 'gptq': dict(method='gptq', rule='absmax')}
NAMES = dict(nearest='nearest', gptq='GPTQ')
PAPERS = {('w4a4', 'gptq', True): '6.10'}

RUNS = {'float': dict(networks.CHARACTERS, paper='5.47')} | {
    f'{method}_{grid}' + '_rotated' * rotate: networks.characters(
        f'{GRIDS[grid]} {NAMES[method]}' + ', rotated' * rotate, recipe=grid, transform='rotate' if rotate else None,
        paper=PAPERS.get((grid, method, rotate)), **METHODS[method])
    for grid, method in (('w8a8', 'nearest'), ('w4a4', 'nearest'), ('w4a4', 'gptq'), ('w3a3', 'nearest'))
    for rotate in (False, True)}

CLAIMS = [
    dict(says='W4A4, GPTQ: rotation lessens the KL to the float network 1.8 times or more', metric='mean_kl',
         ratio=('gptq_w4a4', 'gptq_w4a4_rotated'), within=(1.8, None)),
    dict(says='W4A4, nearest: rotation halves the loss in bits per character',
         ratio=('nearest_w4a4', 'nearest_w4a4_rotated'), within=(2, None)),
    dict(says='W4A4, GPTQ: rotation halves it', ratio=('gptq_w4a4', 'gptq_w4a4_rotated'), within=(2, None)),
    dict(says='W3A3, nearest: rotation halves it', ratio=('nearest_w3a3', 'nearest_w3a3_rotated'), within=(2, None)),
    dict(says='W4A4, nearest: rotation lessens the loss at all', ratio=('nearest_w4a4', 'nearest_w4a4_rotated'),
         within=(1, None)),
    dict(says='W8A8: rotation costs no 0.001 bit', difference=('nearest_w8a8_rotated', 'nearest_w8a8'),
         within=(None, 0.001))]
