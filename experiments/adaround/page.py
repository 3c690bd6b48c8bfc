"""AdaRound against rounding to nearest and GPTQ, one scale a weight, every layer of an MLP on digits."""

from experiments import networks

PAPER = dict(name='AdaRound', title='Up or Down? Adaptive Rounding for Post-Training Quantization, ICML 2020',
             link='https://arxiv.org/abs/2004.10568', setting='ResNet-18 on ImageNet, top-1 %')
SEEDS = tuple(range(20))
METRICS = (networks.ACCURACY,)

METHODS = {
    'nearest': dict(method='rtn', rule='search'),
    'gptq': dict(method='gptq', rule='search', examples=1024),
    'adaround': dict(method='adaround', steps=10_000, batch_size=32, examples=1024)}
NAMES = dict(nearest='nearest', gptq='GPTQ', adaround='AdaRound')
PAPERS = {('nearest', 4): '23.99', ('adaround', 4): '68.71'}

RUNS = {'float': dict(networks.DIGITS, paper='69.68')} | {
    f'{name}_w{bits}': networks.digits(f'W{bits} {NAMES[name]}', recipe=f'w{bits}a16_tensor',
                                       paper=PAPERS.get((name, bits)), **options)
    for bits in (2, 3, 4) for name, options in METHODS.items()}

CLAIMS = [
    dict(says='W2: AdaRound beats nearest', difference=('adaround_w2', 'nearest_w2'), within=(0, None)),
    dict(says='W2: AdaRound gains 8 points or more on nearest', difference=('adaround_w2', 'nearest_w2'),
         within=(8, None)),
    dict(says='W3: AdaRound beats nearest', difference=('adaround_w3', 'nearest_w3'), within=(0, None)),
    dict(says='W3: AdaRound gains 1.5 points or more on nearest', difference=('adaround_w3', 'nearest_w3'),
         within=(1.5, None)),
    dict(says='W4: AdaRound is within half a point of the float network', difference=('adaround_w4', 'float'),
         within=(-0.5, 0.5), paper='-0.97'),
    dict(says='W2: AdaRound beats GPTQ', difference=('adaround_w2', 'gptq_w2'), within=(0, None))]
