"""QLoRA: NF4 against FP4 and INT4, with and without double quantization, LoRA and full fine-tuning."""

from experiments import networks

PAPER = dict(name='QLoRA', title='QLoRA: Efficient Finetuning of Quantized LLMs, NeurIPS 2023',
             link='https://arxiv.org/abs/2305.14314', setting='LLaMA of 7B to 65B, mean 5-shot MMLU, %')
SEEDS = (0, 1, 2)
METRICS = (networks.LOSS, networks.START, dict(name='optimizer_mib', label='state of the optimizer, MiB', digits=2))

BASES = dict(nf4='NF4', nf4_dq='NF4, double quantization', fp4_bnb='FP4', w4a16_g64='INT4, groups of 64')
PAPERS = dict(nf4_dq='53.1', fp4_bnb='52.2')

RUNS = {'float': dict(networks.CHARACTERS, row='the network, on Shakespeare'),
        'lora': networks.finetuned('LoRA on floats', 'base=float', '53.0'),
        'full': networks.finetuned('full fine-tuning', 'base=float,adapter=none',
                                   **{'optimizer.learning_rate': 3e-3})} | {
    base: networks.finetuned(name, f'base={base}', PAPERS.get(base)) for base, name in BASES.items()}

CLAIMS = [
    dict(says='NF4 adds less to the loss before the first step than FP4', metric='start_loss', ratio=('fp4_bnb', 'nf4'),
         within=(1, None)),
    dict(says='and less than INT4', metric='start_loss', ratio=('w4a16_g64', 'nf4'), within=(1, None)),
    dict(says='after 200 steps NF4 ends below FP4', difference=('nf4', 'fp4_bnb'), within=(None, 0)),
    dict(says='double quantization costs less than 0.002 nats', difference=('nf4_dq', 'nf4'), within=(-0.002, 0.002)),
    dict(says='NF4 with double quantization ends within 0.07 nats of LoRA on floats', difference=('nf4_dq', 'lora'),
         within=(None, 0.07)),
    dict(says='and within 0.01 nats', difference=('nf4_dq', 'lora'), within=(None, 0.01)),
    dict(says='LoRA on floats ends within 0.02 nats of full fine-tuning', difference=('lora', 'full'),
         within=(None, 0.02))]
