"""Small datasets in the forms in which the real ones lie on disk."""

import gzip
import io
import json

import numpy as np
from PIL import Image
import pyarrow
import pyarrow.parquet
import tensorflow_datasets as tfds

from tests.run import tiny_finetune

CLASSES = ('n01440764', 'n01443537', 'n01484850')
WORDS = 'the quick brown fox jumps over a lazy dog while seven wizards box'.split()


def picture(random, height, width):
  """A PIL.Image of noise and of a bright half."""
  pixels = random.integers(0, 128, (height, width, 3), dtype=np.uint8)
  pixels[:, :width // 2] += 100
  return Image.fromarray(pixels)


def jpeg(random, height, width):
  """A JPEG file in memory."""
  file = io.BytesIO()
  picture(random, height, width).save(file, 'JPEG')
  return file.getvalue()


def image_folder(folder, train=8, val=4):
  """ImageNet unpacked: <folder>/{train,val}/<class>/*.JPEG, of several sizes."""
  random = np.random.default_rng(0)
  for split, count in dict(train=train, val=val).items():
    for name in CLASSES:
      (folder / split / name).mkdir(parents=True)
      for i in range(count):
        (folder / split / name / f'{name}_{i}.JPEG').write_bytes(jpeg(random, 40 + 3 * i, 64 - 2 * i))
  return folder


def cifar_batches(folder, train=8, test=16):
  """The binary version of CIFAR-10, few records a batch; returns {file: (u8[n, 32, 32, 3], labels)}."""
  folder, random, made = folder / 'cifar-10-batches-bin', np.random.default_rng(1), {}
  folder.mkdir(parents=True)
  for name in (*(f'data_batch_{i}' for i in range(1, 6)), 'test_batch'):
    count = test if name == 'test_batch' else train
    images, labels = random.integers(0, 256, (count, 32, 32, 3), np.uint8), random.integers(0, 10, count, np.uint8)
    planes = images.transpose(0, 3, 1, 2).reshape(count, -1)  # Red, then green, then blue.
    (folder / f'{name}.bin').write_bytes(np.concatenate([labels[:, None], planes], 1).tobytes())
    made[name] = images, labels
  return made


def sentences(count, seed=0):
  """Texts of random words."""
  random = np.random.default_rng(seed)
  return [' '.join(random.choice(WORDS, size=random.integers(8, 40))) + '.' for _ in range(count)]


def c4_files(folder, documents=12):
  """<folder>/en/c4-{train,validation}.*.json.gz, two shards of training; returns {split: [text]}."""
  (folder / 'en').mkdir(parents=True)
  texts = dict(train=sentences(2 * documents), validation=sentences(documents, 1))
  for split, shards in dict(train=2, validation=1).items():
    for i in range(shards):
      some = texts[split][i * documents:(i + 1) * documents]
      with gzip.open(folder / 'en' / f'c4-{split}.{i:05d}-of-{shards:05d}.json.gz', 'wt', encoding='utf-8') as file:
        file.writelines(json.dumps(dict(text=t, timestamp='2019-04-25T12:57:54Z', url='http://x')) + '\n' for t in some)
  return texts


def wikitext_lines(articles, seed=2):
  """Lines as in WikiText: a heading, an empty line, paragraphs, a section."""
  for i, text in enumerate(sentences(articles, seed)):
    yield from ('', f' = Article {i} = \n', '', f' {text} \n', '', ' = = Life = = \n', '', f' {text[::-1]} \n')


def wikitext_parquet(folder, variant='wikitext-103-raw-v1', articles=12):
  """<folder>/<variant>/<split>-00000-of-00001.parquet."""
  (folder / variant).mkdir(parents=True)
  for seed, split in enumerate(('train', 'validation', 'test')):
    table = pyarrow.table(dict(text=list(wikitext_lines(articles, seed))))
    pyarrow.parquet.write_table(table, folder / variant / f'{split}-00000-of-00001.parquet')
  return folder


def tokenizer(folder):
  """A tokenizer.json of bytes; returns its path."""
  path = folder / 'tokenizer.json'
  tiny_finetune.tokenizer().save(str(path))
  return path


def prepare(kind, folder):
  """Writes a TFDS dataset of ArrayRecord files by TFDS's own writer."""
  with tfds.core.registered.skip_registration():
    kind(data_dir=folder, file_format='array_record').download_and_prepare()


with tfds.core.registered.skip_registration():

  class _Images(tfds.core.GeneratorBasedBuilder):
    """Encoded images and their labels."""

    VERSION = tfds.core.Version('1.0.0')
    SPLITS = dict(train=24, validation=8)

    def _info(self):
      return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(self.features()))

    def _split_generators(self, dl_manager):
      return {split: self._generate_examples(split, count) for split, count in self.SPLITS.items()}

  class Imagenet2012(_Images):
    """As TFDS has it: JPEGs of any size."""

    name = 'imagenet2012'

    def features(self):
      return dict(image=tfds.features.Image(encoding_format='jpeg'), file_name=tfds.features.Text(),
                  label=tfds.features.ClassLabel(names=CLASSES))

    def _generate_examples(self, split, count):
      random = np.random.default_rng(count)
      for i in range(count):
        content = io.BytesIO(jpeg(random, 40 + i, 70 - i))
        yield i, dict(image=content, label=i % 3, file_name=f'{split}_{i}.JPEG')

  class Cifar10(_Images):
    """As TFDS has it: PNGs of 32 x 32."""

    name = 'cifar10'
    SPLITS = dict(train=24, test=16)

    def features(self):
      return dict(image=tfds.features.Image(shape=(32, 32, 3)), label=tfds.features.ClassLabel(num_classes=10),
                  id=tfds.features.Text())

    def _generate_examples(self, split, count):
      random = np.random.default_rng(count)
      for i in range(count):
        yield i, dict(image=picture(random, 32, 32), label=i % 10, id=f'{split}_{i}')

  class C4(tfds.core.GeneratorBasedBuilder):
    """As TFDS has it: texts in bytes, a config a language."""

    name = 'c4'
    VERSION = tfds.core.Version('3.1.0')
    BUILDER_CONFIGS = [tfds.core.BuilderConfig(name='en', version=VERSION)]

    def _info(self):
      return tfds.core.DatasetInfo(builder=self, disable_shuffling=True, features=tfds.features.FeaturesDict({
          name: tfds.features.Text() for name in ('text', 'url', 'timestamp', 'content-type', 'content-length')}))

    def _split_generators(self, dl_manager):
      return dict(train=self._generate_examples(24, 0), validation=self._generate_examples(12, 1))

    def _generate_examples(self, count, seed):
      for i, text in enumerate(sentences(count, seed)):
        yield i, {'text': text, 'url': 'http://x', 'timestamp': '', 'content-type': 'text/html', 'content-length': '1'}

  class Wikitext(tfds.core.GeneratorBasedBuilder):
    """A line an example."""

    name = 'wikitext'
    VERSION = tfds.core.Version('1.0.0')
    BUILDER_CONFIGS = [tfds.core.BuilderConfig(name='wikitext-103-raw-v1', version=VERSION)]

    def _info(self):
      return tfds.core.DatasetInfo(builder=self, disable_shuffling=True, features=tfds.features.FeaturesDict({
          'text': tfds.features.Text()}))

    def _split_generators(self, dl_manager):
      return {split: self._generate_examples(seed) for seed, split in enumerate(('train', 'validation', 'test'))}

    def _generate_examples(self, seed):
      yield from enumerate(dict(text=line) for line in wikitext_lines(12, seed))
