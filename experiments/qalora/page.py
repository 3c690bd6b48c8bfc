"""QA-LoRA: adapters that merge into the zeros of a quantized base, against LoRA's merges by rounding anew."""

from experiments import networks

PAPER = dict(name='QA-LoRA', link='https://arxiv.org/abs/2309.14717', setting='LLaMA-7B, 5-shot MMLU after Alpaca, %',
             title='QA-LoRA: Quantization-Aware Low-Rank Adaptation of Large Language Models, ICLR 2024')
SEEDS = (0, 1, 2)
METRICS = (networks.LOSS, dict(name='mean_kl', label='KL of the merge, nats', digits=5))

PAPERS = {('gptq', 4): '36.0', ('gptq', 2): '25.8', ('zeros', 4): '39.4', ('zeros', 2): '27.5'}


def _merge(row, of, paper=None, **flags):
  about = dict(row=row, program='merge', config=f'{{{of}}}', set=flags, float='lora')
  return about if paper is None else dict(about, paper=paper)


def _runs(bits):
  base = f'base=w{bits}a16_g32_asym'
  return {
      f'qlora_{bits}': networks.finetuned(f'W{bits}: LoRA beside codes', base),
      f'rtn_{bits}': _merge(f'W{bits}: merged, to nearest', f'qlora_{bits}', into='grid', method='rtn'),
      f'gptq_{bits}': _merge(f'W{bits}: merged, GPTQ', f'qlora_{bits}', PAPERS['gptq', bits], into='grid',
                             method='gptq'),
      f'qalora_{bits}': networks.finetuned(f'W{bits}: QA-LoRA', f'{base},adapter=qalora,rank=4'),
      f'zeros_{bits}': _merge(f'W{bits}: QA-LoRA, merged', f'qalora_{bits}', PAPERS['zeros', bits], into='zeros')}


RUNS = {'float': dict(networks.CHARACTERS, row='the network, on Shakespeare'),
        'lora': networks.finetuned('LoRA on floats', 'base=float')} | _runs(4) | _runs(2)

CLAIMS = [claim for bits in (4, 2) for claim in (
    dict(says=f'W{bits}: the merge of QA-LoRA changes the loss by less than 1e-4 nats',
         difference=(f'zeros_{bits}', f'qalora_{bits}'), within=(-1e-4, 1e-4)),
    dict(says=f'W{bits}: a merge of LoRA to nearest loses', difference=(f'rtn_{bits}', f'qlora_{bits}'),
         within=(0, None)),
    dict(says=f'W{bits}: one by GPTQ loses less', difference=(f'gptq_{bits}', f'rtn_{bits}'), within=(None, 0)),
    dict(says=f'W{bits}: merged, QA-LoRA is ahead of LoRA to nearest', difference=(f'zeros_{bits}', f'rtn_{bits}'),
         within=(None, 0)),
    dict(says=f'W{bits}: and of LoRA by GPTQ', difference=(f'zeros_{bits}', f'gptq_{bits}'), within=(None, 0)))]
