"""PACT on digits at 2 to 4 bits, beside DoReFa, a range from calibration and LSQ."""

from experiments import networks

PAPER = dict(name='PACT', title='PACT: Parameterized Clipping Activation for Quantized Neural Networks, 2018',
             link='https://arxiv.org/abs/1805.06085', setting='ResNet-18 on ImageNet, top-1 %')
SEEDS = (0, 1, 2, 3, 4)
METRICS = (networks.ACCURACY,)

# The paper's L2 penalty on alpha.
DECAY = {'optimizer.groups': (('.*/alpha', {'weight_decay': 0.1}),)}
METHODS = {
    'static': ('calibrated range, from floats', ',start={float}', {}), 'dorefa': ('DoReFa', '', {}),
    'pact': ('PACT', '', DECAY), 'undecayed': ('PACT, no penalty on alpha', '', {}),
    'lsq': ('LSQ, from floats', ',start={float}', {}), 'started': ('PACT, from floats', ',start={float}', DECAY)}
QUANTIZERS = dict(undecayed='pact', started='pact')
PAPERS = {('pact', 2): '64.4', ('lsq', 2): '67.6', ('pact', 3): '68.1', ('dorefa', 3): '67.5',
          ('lsq', 3): '70.2', ('pact', 4): '69.2', ('dorefa', 4): '68.1', ('lsq', 4): '71.1'}


def _run(method, bits):
  name, start, leaves = METHODS[method]
  quantizer = QUANTIZERS.get(method, method)
  about = networks.wide_digits(f'W{bits}A{bits} {name}', f'quantizer={quantizer},bits={bits}{start}', **leaves)
  return about | ({'paper': PAPERS[method, bits]} if (method, bits) in PAPERS else {})


RUNS = {'float': networks.WIDE_DIGITS} | {
    f'{method}_w{bits}': _run(method, bits) for bits in (2, 3, 4) for method in METHODS}

CLAIMS = [
    dict(says='W2A2: PACT beats a calibrated range', difference=('pact_w2', 'static_w2'), within=(0, None)),
    dict(says='W2A2, both from floats: PACT beats a calibrated range', difference=('started_w2', 'static_w2'),
         within=(0, None)),
    dict(says='W2A2: LSQ has at least the accuracy of PACT', difference=('lsq_w2', 'pact_w2'), within=(0, None),
         paper='+3.2'),
    dict(says='W2A2, both from floats: LSQ has at least the accuracy of PACT', difference=('lsq_w2', 'started_w2'),
         within=(0, None)),
    *(dict(says=f'W{bits}A{bits}: PACT has at least the accuracy of DoReFa', within=(0, None), paper=paper,
           difference=(f'pact_w{bits}', f'dorefa_w{bits}')) for bits, paper in ((2, ''), (3, '+0.6'), (4, '+1.1'))),
    dict(says='W2A2: the penalty on alpha helps', difference=('pact_w2', 'undecayed_w2'), within=(0, None)),
    dict(says='W4A4: PACT is within a point of floats', difference=('pact_w4', 'float'), within=(-1, 1))]
