"""LoftQ's start against plain rounding, before the first step and after 100, on a small language model."""

from experiments import networks

PAPER = dict(name='LoftQ', title='LoftQ: LoRA-Fine-Tuning-Aware Quantization for Large Language Models, ICLR 2024',
             link='https://arxiv.org/abs/2310.08659', setting='LLaMA-2-7B fine-tuned on WikiText2, perplexity')
SEEDS = (0, 1, 2)
METRICS = (networks.LOSS, networks.START)

PAPERS = {('loftq', 4): '5.24', ('loftq', 3): '5.63', ('loftq', 2): '7.85'}

RUNS = {'float': dict(networks.CHARACTERS, row='the network, on Shakespeare'),
        'lora': networks.finetuned('LoRA on floats', 'base=float', '5.08', steps=100)} | {
    f'{init}_nf{bits}': networks.finetuned(f'NF{bits}, {name}', f'base=nf{bits},init={init}', PAPERS.get((init, bits)),
                                           steps=100)
    for bits in (2, 3, 4) for init, name in (('gaussian', 'rounded'), ('loftq', 'LoftQ'))}

CLAIMS = [
    dict(says='NF2: LoftQ halves what rounding adds to the loss before the first step',
         metric='start_loss', ratio=('gaussian_nf2', 'loftq_nf2'), within=(2, None)),
    dict(says='NF3: it lessens it', metric='start_loss', ratio=('gaussian_nf3', 'loftq_nf3'),
         within=(1, None)),
    dict(says='NF4: it changes less than a tenth of it', metric='start_loss', ratio=('gaussian_nf4', 'loftq_nf4'),
         within=(0.9, 1.1)),
    dict(says='NF2: after 100 steps LoftQ is ahead', difference=('loftq_nf2', 'gaussian_nf2'),
         within=(None, 0)),
    dict(says='NF3: likewise', difference=('loftq_nf3', 'gaussian_nf3'), within=(None, 0)),
    dict(says='NF4: within 0.01 nats of each other', difference=('loftq_nf4', 'gaussian_nf4'),
         within=(-0.01, 0.01))]
