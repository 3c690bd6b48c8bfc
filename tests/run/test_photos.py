import numpy as np
from PIL import Image
import pytest

from qat.run import photos
from tests import offline


@pytest.fixture(scope='module')
def crops():
  with offline.skips():
    return photos.calibration(23, seed=0, size=32)


def gradient(width, height):
  """A photo whose red is its column and whose green is its row."""
  pixels = np.zeros((height, width, 3), np.uint8)
  pixels[..., 0], pixels[..., 1] = np.arange(width), np.arange(height)[:, None]
  return Image.fromarray(pixels)


def test_the_centre_is_the_centre():
  """A photo of 128 x 192: the side is 128 * 32 / 64 = 64 and nothing is resized twice as large, from (32, 64) on."""
  x = photos.centre(gradient(128, 192), 32) * 128 + 127
  assert x.shape == (32, 32, 3) and x.dtype == np.float32
  np.testing.assert_allclose(x[5, :, 0], 32 + 2 * np.arange(32) + 0.5, atol=1)
  np.testing.assert_allclose(x[:, 5, 1], 64 + 2 * np.arange(32) + 0.5, atol=1)


def test_colours_are_centred():
  flat = lambda value: Image.fromarray(np.full((64, 64, 3), value, np.uint8))
  assert set(photos.centre(flat(255), 16).ravel().tolist()) == {1.0}
  assert set(photos.centre(flat(127), 16).ravel().tolist()) == {0.0}
  assert set(photos.centre(flat(0), 16).ravel().tolist()) == {-127 / 128}


def test_crops_vary_and_stay_within():
  x = photos.crops([gradient(200, 160)], 64, seed=1, size=16) * 128 + 127
  left, right, top = x[:, 8, 0, 0], x[:, 8, -1, 0], x[:, 0, 8, 1]
  assert 0.3 < (left > right).mean() < 0.7                              # Flipped.
  assert (np.diff(x[..., 1].mean(2), axis=1) > 0).all()                 # Never upside down.
  assert np.abs(right - left).min() > 0.4 * 160 * 0.5                   # A quarter of the area is half of a side.
  assert top.std() > 5 and x.min() >= 0 and x.max() <= 199


def test_a_seed_gives_the_same_crops(crops):
  assert crops.shape == (23, 32, 32, 3) and crops.dtype == np.float32
  np.testing.assert_array_equal(crops, photos.calibration(23, seed=0, size=32))
  np.testing.assert_array_equal(crops[:5], photos.calibration(5, seed=0, size=32))
  assert (np.abs(crops - photos.calibration(23, seed=1, size=32)).max((1, 2, 3)) > 0).all()
  assert (np.abs(crops - photos.held_out(23, seed=0, size=32)).max((1, 2, 3)) > 0).all()


def test_photos_are_photos(crops):
  """None is blank, and in turn 9 in colour, 10 in grey, 2 in colour."""
  grey = (crops == crops[..., :1]).all((1, 2, 3))
  assert grey.tolist() == [False] * 9 + [True] * 10 + [False] * 2 + [False] * 2
  assert (crops.std((1, 2, 3)) > 0.01).all() and np.abs(crops).max() <= 1


def test_labelled_photos(crops):
  images, labels = photos.imagenet(64)
  assert images.shape == (20, 64, 64, 3) and labels.dtype == np.int32
  assert labels[:4].tolist() == [243, 559, 438, 990] and labels.max() < 1000


def test_no_crops_are_refused():
  with pytest.raises(ValueError, match='0 crops of size 224: both are at least 1'):
    photos.crops([gradient(8, 8)], 0, 0, 224)
