"""The float networks that pages share, and runs of `qat ptq` on them. One that several pages have is trained once."""

DIGITS = dict(
    row='float', program='train', config='configs/digits.py:quantizer=float',
    set={'model.sizes': (64, 32, 32, 10), 'total_steps': 2000, 'optimizer.learning_rate': 5e-3,
         'eval.every_steps': 2000, 'checkpoint_every_steps': 2000})

CHARACTERS = dict(
    row='float', program='train', config='configs/shakespeare.py:recipe=float',
    set={'model.name': 'decoder.llama', 'model.layers': 2, 'total_steps': 800, 'eval.every_steps': 800,
         'checkpoint_every_steps': 800})

ACCURACY = dict(name='accuracy', label='accuracy, %', factor=100, digits=2)
BITS_PER_CHARACTER = dict(name='bits_per_character', label='bits per character', digits=4)
KL = dict(name='mean_kl', label='KL to float, nats', digits=4)


def digits(row, method, recipe, paper=None, examples=256, **options):
  """Every layer of DIGITS put on a grid; `options` are the method's."""
  return _ptq(row, f'method={method},recipe={recipe},examples={examples}', paper, options)


def characters(row, method, recipe, paper=None, transform=None, search=None, **options):
  """The layers of the blocks of CHARACTERS put on a grid; the embedding, which is the head, stays in floats."""
  before = f',transform={transform}' if transform else ''
  return _ptq(row, fr'method={method},recipe={recipe},layers=blocks/[\w/]+{before}', paper, options, search or {})


def _ptq(row, argument, paper, options, search=()):
  leaves = {f'method.{name}': value for name, value in options.items()}
  leaves |= {f'search.{name}': value for name, value in dict(search).items()}
  about = dict(row=row, program='ptq', config=f'configs/ptq.py:workdir={{float}},{argument}', set=leaves)
  return about if paper is None else dict(about, paper=paper)
