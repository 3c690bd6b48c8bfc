"""TPU kernels compiled ahead of time for chips that are not here: they compile, within recorded budgets of bundles."""

import functools
import json
import os
import pathlib
import subprocess
import sys

import pytest

from qat.kernels import static_tpu

pytestmark = pytest.mark.aot

BUDGETS = pathlib.Path(__file__).parent / 'tpu_budgets.json'
TOLERANCE = 1.05
DECODE = [f'{case}_16' for case in ('int4_g128_x_bf16', 'int4_x_bf16', 'int8_x_bf16', 'nf4_x_bf16', 'int4_g128_x_int8',
                                    'int8_x_int8')]
PREFILL = [f'{case}_256' for case in ('int4_g128_x_bf16', 'int4_x_bf16', 'int8_x_int8', 'int4_x_int8', 'fp8_x_fp8')]
OTHERS = [*(f'{case}_x_bf16_16' for case in ('int4_g32', 'uint4_g128', 'mxfp4', 'fp8', 'int2_g128', 'uint2_g128')),
          'int2_g128_x_int8_16']
CASES = ['float_16', 'float_256', *DECODE, *PREFILL, *OTHERS, 'rotation', 'encoding', 'attention',
         'attention_kv8', 'attention_kv4']


def budgets():
  return json.loads(BUDGETS.read_text())


@functools.cache
def report(chip, case):
  return static_tpu.compile(f'tests.aot.tpu_cases:{case}', chip)


@pytest.mark.parametrize('case', CASES)
@pytest.mark.parametrize('chip', static_tpu.CHIPS)
def test_compiles_within_its_budget(chip, case):
  found = report(chip, case)
  assert found.error is None
  assert 0 < found.bundles <= TOLERANCE * budgets()[chip][case]
  assert found.temp_bytes < 2**20  # No decoded weight, which would take 32 MiB.


@pytest.mark.parametrize('chip', ['v5e', 'v6e'])
def test_decoding_with_int4_takes_fewer_bundles_than_with_bfloat16(chip):
  assert report(chip, 'int4_g128_x_bf16_16').bundles < report(chip, 'float_16').bundles


@pytest.mark.parametrize('chip', ['v5e', 'v6e'])
def test_a_frozen_layer_holds_no_decoded_weight(chip):
  found = report(chip, 'frozen_layer')
  assert found.error is None and found.bundles > 0
  assert found.temp_bytes < 2**20 and found.argument_bytes < 0.6 * 4096 * 4096


@pytest.mark.parametrize('chip', ['v5e', 'v6e'])
def test_a_frozen_layer_that_xla_divides_among_four(chip):
  """No kernel, which jax would refuse, and neither is a weight gathered nor decoded into memory."""
  done = subprocess.run([sys.executable, '-m', 'tests.aot.sharded_tpu', chip], text=True, capture_output=True,
                        env={**os.environ, **static_tpu.ENVIRONMENT}, timeout=300)
  assert done.returncode == 0, done.stderr
  found = json.loads(done.stdout.splitlines()[-1])
  assert {split: about['kernels'] for split, about in found.items()} == {
      'rows': False, 'outputs': False, 'inputs': False, 'none': True}
  assert {split: about['collectives'] for split, about in found.items() if about['collectives']} == {
      'inputs': ['all-reduce']}
  assert all(about['temp_bytes'] < 2**20 for about in found.values())


def test_fp4_is_loaded_by_one_chip():
  """On others it is int8, which takes fewer bundles than a lookup."""
  assert report('tpu7x', 'mxfp4_as_it_is').error is None
  assert report('v6e', 'mxfp4_as_it_is').error is not None
  assert report('v6e', 'mxfp4_x_bf16_16').bundles < report('v6e', 'nf4_x_bf16_16').bundles


def test_a_tile_that_no_chip_takes_is_rejected():
  assert 'divisible by 8 and 128' in report('v5e', 'unaligned').error
