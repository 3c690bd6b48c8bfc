"""The papers' own settings: what `qat reproduce <paper> --scale full` prints. None of it was run here."""

DATA = 'docs/data.md says how the folder DATA is made.'
LLAMA = 'hf download meta-llama/Llama-2-7b-hf --local-dir LLAMA'
GPU = 'one GPU of 80 GB, and 64 GB of memory'


def llama(argument, workdir):
  """Llama-2-7B put on a grid by configs/llama2_7b.py."""
  return (f'qat ptq --config configs/llama2_7b.py:{argument} --workdir runs/{workdir} --config.pretrained=LLAMA '
          '--config.calibration.data_dir=DATA --config.eval.data_dir=DATA')


def imagenet(argument, workdir):
  """A ResNet on ImageNet by configs/imagenet_resnet.py."""
  return (f'qat train --config configs/imagenet_resnet.py:{argument} --workdir runs/{workdir} '
          '--config.data.data_dir=DATA')


def cifar(argument, workdir):
  """ResNet-20 on CIFAR-10 by configs/cifar10_resnet.py."""
  return (f'qat train --config configs/cifar10_resnet.py:{argument} --workdir runs/{workdir} '
          '--config.data.data_dir=DATA')


def bitnet(recipe, workdir):
  """700 million parameters from scratch by configs/bitnet_700m.py, on eight devices or more."""
  return (f'qat train --config configs/bitnet_700m.py:recipe={recipe} --workdir runs/{workdir} '
          '--config.data.data_dir=DATA --config.data.options.tokenizer=LLAMA --config.mesh.fsdp=8')


SETTINGS = {
    'lsq': dict(
        paper='LSQ, https://arxiv.org/abs/1902.08153', setting='ResNet-18 and 50 on ImageNet',
        hardware='8 GPUs of 80 GB',
        takes='1.6 hours a run of ResNet-18, 3.3 of ResNet-50, by an assumed 2,500 and 1,200 images a second on each',
        expected='top-1 in %, float, 2, 3, 4, 8 bits: ResNet-18 70.5, 67.6, 70.2, 71.1, 71.1; ResNet-50 76.9, 73.7, '
                 '75.8, 76.7, 76.8',
        commands=[command for net in ('resnet18', 'resnet50') for command in (
            imagenet(f'model={net},quantizer=float', net),
            *(imagenet(f'model={net},bits={b},init_from=runs/{net}', f'{net}_lsq_w{b}') for b in (2, 3, 4, 8)))]),
    'pact': dict(
        paper='PACT, https://arxiv.org/abs/1805.06085', setting='ResNet-20 on CIFAR-10', hardware='one GPU',
        takes='17 minutes a run, by an assumed 10,000 images a second',
        expected='error in %: 5 bits 8.4, 4 bits 9.2, 3 bits 9.4, 2 bits 11.1',
        commands=[cifar('quantizer=float', 'r20'), *(cifar(f'quantizer=pact,bits={b}', f'r20_pact_w{b}')
                                                     for b in (5, 4, 3, 2))]),
    'dorefa': dict(
        paper='DoReFa-Net, https://arxiv.org/abs/1606.06160', setting='ResNet-18 on ImageNet',
        hardware='8 GPUs of 80 GB', takes='1.6 hours a run, by an assumed 2,500 images a second on each',
        expected='top-1 in %, by the paper of PACT: 3 bits 67.5, 4 bits 68.1',
        commands=[imagenet(f'model=resnet18,quantizer=dorefa,bits={b}', f'resnet18_dorefa_w{b}') for b in (2, 3, 4)]),
    'bitnet': dict(
        paper='BitNet b1.58, https://arxiv.org/abs/2402.17764', setting='700 million parameters, 100 billion tokens',
        hardware='64 A100 of 80 GB', takes='940 A100 hours a run, by an assumed 40 % of their peak',
        expected='perplexity: LLaMA in floats 12.33, BitNet b1.58 12.87',
        commands=[bitnet('float', 'llama_700m'), bitnet('bitnet', 'bitnet_700m')]),
    'adaround': dict(
        paper='AdaRound, https://arxiv.org/abs/2004.10568', setting='ResNet-18 on ImageNet',
        hardware='one GPU of 80 GB', takes='12.8 hours of float training, by an assumed 2,500 images a second',
        expected='top-1 in %, 4-bit weights: float 69.68, nearest 23.99, AdaRound 68.71',
        commands=[imagenet('quantizer=float', 'resnet18'), *(
            f'qat ptq --config configs/ptq.py:workdir=runs/resnet18,method={m},recipe=w4a16_tensor,examples=1024 '
            f'--workdir runs/resnet18_{m}{more}' for m, more in (
                ('rtn', ' --config.method.rule=search'), ('adaround', ' --config.method.steps=10000')))]),
    'gptq': dict(
        paper='GPTQ, https://arxiv.org/abs/2210.17323', setting='Llama-2-7B on WikiText2', hardware=GPU,
        takes='about 4 hours on one A100 for 175B parameters, by the paper',
        expected='perplexity at 3 bits in groups of 128: float 5.47, nearest 6.66, GPTQ 6.43, by AWQ',
        commands=[LLAMA, *(llama(f'method={m},bits=3', f'llama_{m}_w3') for m in ('rtn', 'gptq'))]),
    'awq': dict(
        paper='AWQ, https://arxiv.org/abs/2306.00978', setting='Llama-2-7B on WikiText2', hardware=GPU,
        takes='not said in the paper',
        expected='perplexity at 3 bits in groups of 128: float 5.47, nearest 6.66, GPTQ 6.43, AWQ 6.24',
        commands=[LLAMA, *(llama(f'method={m},bits=3', f'llama_{m}_w3') for m in ('rtn', 'awq'))]),
    'quarot': dict(
        paper='QuaRot, https://arxiv.org/abs/2404.00456', setting='Llama-2-7B on WikiText2, W4A4', hardware=GPU,
        takes='not said here',
        expected='perplexity: float 5.47, QuaRot 6.10, in groups of 128 5.93, with keys and values in 4 bits too',
        commands=[LLAMA, *(llama(f'method=quarot,bits=4,inputs=4,kv=4,block={b}', f'llama_quarot_{b}')
                           for b in (0, 128))]),
    'omniquant': dict(
        paper='OmniQuant, https://arxiv.org/abs/2308.13137', setting='Llama-2-7B on WikiText2', hardware=GPU,
        takes='1 to 16 hours on one A100 for 7B to 70B, by the paper',
        expected='perplexity in groups of 128: float 5.47, 4 bits 5.58, 3 bits 6.03, 2 bits 11.06',
        commands=[LLAMA, *(llama(f'method=omniquant,bits={b}', f'llama_omniquant_w{b}') for b in (4, 3, 2))]),
    'efficientqat': dict(
        paper='EfficientQAT, https://arxiv.org/abs/2407.11062', setting='Llama-2-7B on WikiText2', hardware=GPU,
        takes='41 hours on one A100 for 70B in both phases, by the paper',
        expected='perplexity: float 5.47; 4 bits 5.53, 3 bits 5.81, 2 bits 7.19 in groups of 128, 6.86 of 64',
        commands=[LLAMA, *(llama(f'method=efficientqat,bits={b},block={g}', f'llama_efficientqat_w{b}_g{g}')
                           for b, g in ((4, 128), (3, 128), (2, 128), (2, 64)))]),
    'qlora': dict(
        paper='QLoRA, https://arxiv.org/abs/2305.14314', setting='Llama 7B on OASST1', hardware='one GPU of 48 GB',
        takes='24 hours for 65B, by the paper', expected='MMLU, mean of 7B to 65B: NF4 and double quantization 53.1, '
        'bfloat16 53.0',
        commands=[LLAMA, 'qat finetune --config configs/llama2_7b_qlora.py --workdir runs/qlora '
                  '--config.pretrained=LLAMA --config.data.options.train=oasst1.jsonl '
                  '--config.data.options.test=held_out.jsonl']),
    'loftq': dict(
        paper='LoftQ, https://arxiv.org/abs/2310.08659', setting='Llama-2-7B on WikiText2', hardware='one GPU of 48 GB',
        takes='not said here', expected='perplexity: 16 bits 5.08, LoftQ at 4 bits 5.24, at 2 bits 7.85',
        commands=[LLAMA, *(f'qat finetune --config configs/llama2_7b_qlora.py:data=wikitext,init=loftq,base={base} '
                           f'--workdir runs/loftq_{base} --config.pretrained=LLAMA --config.data.options.data_dir=DATA'
                           for base in ('nf4', 'nf2'))]),
}
