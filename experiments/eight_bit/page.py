"""Adam whose moments are kept in 8 bits between steps, against 32, on a small language model."""

from experiments import networks

PAPER = dict(name='8-bit optimizers', title='8-bit Optimizers via Block-wise Quantization, ICLR 2022',
             link='https://arxiv.org/abs/2110.02861', setting='1.5B language model, perplexity and GB of states')
SEEDS = (0, 1, 2)
METRICS = (networks.BITS_PER_CHARACTER, dict(name='optimizer_mib', label='state of the optimizer, MiB', digits=3))

STEPS = {'total_steps': 300, 'eval.every_steps': 300, 'checkpoint_every_steps': 300}


def _run(row, bits):
  return dict(networks.CHARACTERS, row=row, set=networks.CHARACTERS['set'] | STEPS | {'optimizer.state_bits': bits})


RUNS = {'adam32': _run('AdamW, 32 bits', 32), 'adam8': _run('AdamW, 8 bits', 8)}

# The float network of the page of GPTQ has a standard deviation of 0.024 over three seeds.
CLAIMS = [
    dict(says='8 bits end within the noise of seeds of 32', difference=('adam8', 'adam32'), within=(-0.024, 0.024)),
    dict(says='the state of the optimizer is cut by 70 % or more, to 1 / 3.34', metric='optimizer_mib',
         ratio=('adam32', 'adam8'), within=(3.34, None))]
