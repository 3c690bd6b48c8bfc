"""The float networks that pages share, and runs of `qat ptq` on them. One that several pages have is trained once."""

DIGITS = dict(
    row='float', program='train', config='configs/digits.py:quantizer=float',
    set={'model.sizes': (64, 32, 32, 10), 'total_steps': 2000, 'optimizer.learning_rate': 5e-3,
         'eval.every_steps': 2000, 'checkpoint_every_steps': 2000})

_WIDE = {'eval.every_steps': 600, 'checkpoint_every_steps': 600}
WIDE_DIGITS = dict(row='float', program='train', config='configs/digits.py:quantizer=float', set=_WIDE)

CHARACTERS = dict(
    row='float', program='train', config='configs/shakespeare.py:recipe=float',
    set={'model.name': 'decoder.llama', 'model.layers': 2, 'total_steps': 800, 'eval.every_steps': 800,
         'checkpoint_every_steps': 800})

ACCURACY = dict(name='accuracy', label='accuracy, %', factor=100, digits=2)
BITS_PER_CHARACTER = dict(name='bits_per_character', label='bits per character', digits=4)
LOSS = dict(name='loss', label='held-out loss, nats', digits=4)
START = dict(name='start_loss', label='before the first step', digits=4)
KL = dict(name='mean_kl', label='KL to float, nats', digits=4)


def digits(row, method, recipe, paper=None, examples=256, **options):
  """Every layer of DIGITS put on a grid; `options` are the method's."""
  return _ptq(row, f'method={method},recipe={recipe},examples={examples}', paper, options)


def wide_digits(row, argument, **leaves):
  """WIDE_DIGITS trained under quantizers; `argument` is that of configs/digits.py."""
  return dict(row=row, program='train', config=f'configs/digits.py:{argument}', set=_WIDE | leaves)


def characters(row, method, recipe, paper=None, transform=None, search=None, transforms=None, **options):
  """The layers of the blocks of CHARACTERS put on a grid; the embedding, which is the head, stays in floats.

  `transform` is a name; `transforms` are several, or those that have options, as in configs/ptq.py.
  """
  before = f',transform={transform}' if transform else ''
  about = _ptq(row, fr'method={method},recipe={recipe},layers=blocks/[\w/]+{before}', paper, options, search or {})
  return about if transforms is None else dict(about, set=about['set'] | dict(transforms=transforms))


def finetuned(row, argument, paper=None, steps=200, **leaves):
  """CHARACTERS fine-tuned on another text by configs/lora.py; compared to the run 'lora', which has no codes."""
  about = dict(row=row, program='finetune', config=f'configs/lora.py:workdir={{float}},{argument},steps={steps}')
  about |= {} if argument == 'base=float' else dict(float='lora')
  about |= dict(set=leaves) if leaves else {}
  return about if paper is None else dict(about, paper=paper)


def _ptq(row, argument, paper, options, search=()):
  leaves = {f'method.{name}': value for name, value in options.items()}
  leaves |= {f'search.{name}': value for name, value in dict(search).items()}
  about = dict(row=row, program='ptq', config=f'configs/ptq.py:workdir={{float}},{argument}', set=leaves)
  return about if paper is None else dict(about, paper=paper)
