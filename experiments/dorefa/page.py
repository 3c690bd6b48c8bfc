"""DoReFa-Net on digits: few bits for weights and inputs, and for gradients."""

from experiments import networks

PAPER = dict(name='DoReFa-Net', link='https://arxiv.org/abs/1606.06160', setting='AlexNet on ImageNet, top-1 error %',
             title='DoReFa-Net: Training Low Bitwidth Convolutional Neural Networks with Low Bitwidth Gradients, 2016')
SEEDS = (0, 1, 2, 3, 4)
METRICS = (networks.ACCURACY,)

ROWS = {'w8a8': 'W8A8', 'w4a4': 'W4A4', 'w2a2': 'W2A2', 'w1a2': 'W1A2', 'w1a2g8': 'W1A2, gradients of 8 bits',
        'w1a2g6': 'W1A2, gradients of 6 bits', 'w1a2g4': 'W1A2, gradients of 4 bits',
        'w1a2g2': 'W1A2, gradients of 2 bits'}
PAPERS = dict(w1a2='46.6', w1a2g6='46.8', w1a2g4='54.0')

# The first and the last layer stay in floats, as in the paper.
RUNS = {'float': dict(networks.WIDE_DIGITS, paper='40.3')} | {
    name: networks.wide_digits(row, f'recipe={name}_dorefa,first_last=0')
    | ({'paper': PAPERS[name]} if name in PAPERS else {}) for name, row in ROWS.items()}

CLAIMS = [
    dict(says='W2A2: within a point of floats', difference=('w2a2', 'float'), within=(-1, 1)),
    dict(says='W1A2: within 6.3 points', difference=('w1a2', 'float'), within=(-6.3, 6.3), paper='-6.3'),
    dict(says='gradients of 8 bits cost less than half a point', difference=('w1a2g8', 'w1a2'), within=(-0.5, 0.5)),
    dict(says='gradients of 6 bits cost less than half a point', difference=('w1a2g6', 'w1a2'), within=(-0.5, 0.5),
         paper='-0.2'),
    dict(says='4 bits of gradients lose to 6', difference=('w1a2g4', 'w1a2g6'), within=(None, 0), paper='-7.2'),
    dict(says='2 bits of gradients lose to 6', difference=('w1a2g2', 'w1a2g6'), within=(None, 0))]
