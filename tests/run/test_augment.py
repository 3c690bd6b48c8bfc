"""Augmentation: what each transform may return, by its own definition."""

import numpy as np
from PIL import Image
from PIL import ImageEnhance
import pytest

from qat.run import augment
from qat.run import rand_augment


def ramp(height, width):
  """An image whose red is the column and green the row."""
  pixels = np.zeros((height, width, 3), np.uint8)
  pixels[..., 0], pixels[..., 1] = np.arange(width)[None], np.arange(height)[:, None]
  return Image.fromarray(pixels)


def test_random_resized_crops_have_the_areas_and_aspects_that_they_say():
  crop = augment.RandomResizedCrop(32, area=(0.2, 0.5), aspect=(0.5, 2.0))
  random, image = np.random.default_rng(0), ramp(100, 160)
  areas, aspects = [], []
  for _ in range(500):
    left, top, right, bottom = crop.box(image, random)
    assert 0 <= left < right <= 160 and 0 <= top < bottom <= 100
    areas.append((right - left) * (bottom - top) / 16000)
    aspects.append((right - left) / (bottom - top))
  assert 0.19 < min(areas) and max(areas) < 0.51 and abs(np.mean(areas) - 0.35) < 0.03
  assert 0.48 < min(aspects) and max(aspects) < 2.1 and abs(np.mean(np.log(aspects))) < 0.1
  assert crop(image, random).size == (32, 32)


def test_an_image_that_no_crop_fits_is_cropped_at_its_centre():
  crop = augment.RandomResizedCrop(8, area=(1.0, 1.0), aspect=(3 / 4, 4 / 3))
  assert crop.box(ramp(30, 120), np.random.default_rng(0)) == (40, 0, 80, 30)
  assert crop.box(ramp(120, 30), np.random.default_rng(0)) == (0, 40, 30, 80)


def test_a_padded_crop_is_a_shifted_image_amid_black():
  crop, image = augment.PaddedCrop(8, padding=2), ramp(8, 8)
  padded = np.pad(np.asarray(image), ((2, 2), (2, 2), (0, 0)))
  windows = {padded[i:i + 8, j:j + 8].tobytes() for i in range(5) for j in range(5)}
  random = np.random.default_rng(0)
  seen = {np.asarray(crop(image, random)).tobytes() for _ in range(400)}
  assert seen == windows


def test_half_of_the_images_are_flipped():
  flip, image, random = augment.Flip(), ramp(4, 6), np.random.default_rng(0)
  flipped = [np.asarray(flip(image, random))[0, 0, 0] == 5 for _ in range(400)]
  assert 150 < sum(flipped) < 250
  np.testing.assert_array_equal(augment.Flip(1.0)(image, random), np.asarray(image)[:, ::-1])


@pytest.mark.parametrize('height, width', [(50, 100), (100, 50), (36, 36)])
def test_the_view_of_evaluation_is_the_centre(height, width):
  view = augment.CentreCrop(32, 36)
  pixels = np.asarray(view(ramp(height, width))).astype(int)
  assert pixels.shape == (32, 32, 3)
  scale = min(height, width) / 36
  middle = [pixels[..., 0].mean(), pixels[..., 1].mean()]
  np.testing.assert_allclose(middle, [(width - 1) / 2, (height - 1) / 2], atol=1.5 * max(scale, 1))


def test_resolve_names_transforms_and_their_options():
  made = augment.resolve([dict(name='padded_crop', padding=2), dict(name='flip')], 24)
  assert made == (augment.PaddedCrop(24, 2), augment.Flip())
  with pytest.raises(ValueError, match="Did you mean 'rand_augment'"):
    augment.resolve([dict(name='randaugment')], 24)
  with pytest.raises(ValueError, match=r"augment 'flip' has no \['chance'\]: its options are \['probability'\]"):
    augment.resolve([dict(name='flip', chance=1)], 24)


# RandAugment


@pytest.fixture(scope='module')
def photo():
  random = np.random.default_rng(0)
  return Image.fromarray(random.integers(30, 220, (24, 24, 3), dtype=np.uint8))


NEUTRAL = [name for name in rand_augment.OPERATIONS if name not in ('auto_contrast', 'equalize')]


@pytest.mark.parametrize('name', NEUTRAL)
def test_magnitude_0_changes_nothing(photo, name):
  np.testing.assert_array_equal(rand_augment.apply(name, photo, 0.0), photo)


@pytest.mark.parametrize('name', sorted(set(NEUTRAL) - {'identity', 'translate_x', 'translate_y'}))
def test_a_larger_magnitude_changes_more(photo, name):
  change = lambda m: np.abs(np.asarray(rand_augment.apply(name, photo, m), int) - np.asarray(photo, int)).mean()
  assert change(1.0) > 0 and change(1.0) >= change(0.3)


def test_operations_are_what_their_names_say(photo):
  x = np.asarray(photo, int)
  apply = lambda name, m: np.asarray(rand_augment.apply(name, photo, m), int)
  np.testing.assert_array_equal(apply('posterize', 1.0), x & 0xF0)
  np.testing.assert_array_equal(apply('solarize', 0.5), np.where(x < 128, x, 255 - x))
  np.testing.assert_array_equal(apply('brightness', -1.0), ImageEnhance.Brightness(photo).enhance(0.1))
  moved = apply('translate_x', 0.5)
  shift = round(rand_augment.TRANSLATE * 0.5 * 24)
  np.testing.assert_array_equal(moved[:, :-shift], x[:, shift:])
  assert (moved[:, -shift:] == rand_augment.FILL).all()
  np.testing.assert_array_equal(apply('translate_y', -0.5)[shift:], x[:-shift])


def test_all_operations_and_both_signs_are_drawn(photo, monkeypatch):
  drawn = []
  monkeypatch.setattr(rand_augment, 'apply', lambda name, image, m: drawn.append((name, m)) or image)
  augment_, random = rand_augment.RandAugment(3, 15), np.random.default_rng(0)
  for _ in range(200):
    augment_(photo, random)
  assert len(drawn) == 600 and set(drawn) == {(n, s) for n in rand_augment.OPERATIONS for s in (0.5, -0.5)}


def test_a_magnitude_beyond_the_scale():
  with pytest.raises(ValueError, match='magnitude is from 0 to 30'):
    rand_augment.RandAugment(2, 31)
