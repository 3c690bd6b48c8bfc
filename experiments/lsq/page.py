"""LSQ on digits: bits, and what scales the gradient of the step, under SGD and Adam."""

from experiments import networks

PAPER = dict(name='LSQ', title='Learned Step Size Quantization, ICLR 2020', link='https://arxiv.org/abs/1902.08153',
             setting='ResNet-18 on ImageNet, top-1 %')
SEEDS = (0, 1, 2, 3, 4)
METRICS = (networks.ACCURACY,)

SCALES = {'lsq': '1 / sqrt(N Qp)', 'lsq_by_numbers': '1 / sqrt(N)', 'lsq_unscaled': '1'}
PAPERS = {('lsq', 2): '67.6', ('lsq', 3): '70.2', ('lsq', 4): '71.1', ('lsq', 8): '71.1', ('lsq_by_numbers', 2): '67.3',
          ('lsq_unscaled', 2): 'does not converge'}


def _run(quantizer, bits, rate):
  """From the float network, under SGD at `rate`, or by Adam where there is none."""
  row = f'W{bits}A{bits}, g = {SCALES[quantizer]}, ' + (f'SGD {rate}' if rate else 'Adam')
  argument = f'quantizer={quantizer},bits={bits},start={{float}}' + (',optimizer=sgd' if rate else '')
  leaves = {'optimizer.clip_norm': 0.0} | ({'optimizer.learning_rate': rate} if rate else {})
  about = networks.wide_digits(row, argument, **leaves)
  return about | ({'paper': PAPERS[quantizer, bits]} if rate == 0.1 and (quantizer, bits) in PAPERS else {})


RUNS = {'float': dict(networks.WIDE_DIGITS, paper='70.5')} | {
    f'{quantizer}_w{bits}_{rate or "adam"}': _run(quantizer, bits, rate) for quantizer, bits, rate in (
        *(('lsq', bits, 0.1) for bits in (2, 3, 4, 8)),
        *(('lsq_by_numbers', bits, 0.1) for bits in (2, 3)),
        *(('lsq_unscaled', bits, 0.1) for bits in (2, 3)),
        *((quantizer, 2, rate) for rate in (0.01, 0.001) for quantizer in SCALES),
        *((quantizer, bits, None) for bits in (2, 3) for quantizer in ('lsq', 'lsq_unscaled')))}

CLAIMS = [
    dict(says='W2A2: within a point of floats', difference=('lsq_w2_0.1', 'float'), within=(-1, 1), paper='-2.9'),
    dict(says='W3A3: within half a point', difference=('lsq_w3_0.1', 'float'), within=(-0.5, 0.5), paper='-0.3'),
    dict(says='W4A4: within half a point', difference=('lsq_w4_0.1', 'float'), within=(-0.5, 0.5), paper='+0.6'),
    dict(says='W8A8: within half a point', difference=('lsq_w8_0.1', 'float'), within=(-0.5, 0.5), paper='+0.6'),
    *(dict(says=f'W{bits}A{bits}, SGD at 0.1: g = 1 loses 50 points or more',
           difference=(f'lsq_unscaled_w{bits}_0.1', f'lsq_w{bits}_0.1'), within=(None, -50), paper=paper)
      for bits, paper in ((2, 'does not converge'), (3, ''))),
    *(dict(says=f'W{bits}A{bits}, SGD at 0.1: g = 1 / sqrt(N) is within half a point',
           difference=(f'lsq_by_numbers_w{bits}_0.1', f'lsq_w{bits}_0.1'), within=(-0.5, 0.5), paper=paper)
      for bits, paper in ((2, '-0.3'), (3, ''))),
    dict(says='W2A2, SGD: g = 1 at 0.001 is behind the rule at 0.1',
         difference=('lsq_unscaled_w2_0.001', 'lsq_w2_0.1'), within=(None, 0), paper='-3.4'),
    *(dict(says=f'W{bits}A{bits}, Adam: g = 1 is within half a point',
           difference=(f'lsq_unscaled_w{bits}_adam', f'lsq_w{bits}_adam'), within=(-0.5, 0.5)) for bits in (2, 3))]
