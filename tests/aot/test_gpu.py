"""GPU kernels compiled ahead of time for devices that are not here: no spills, the matrix instructions that were meant,
issue slots within recorded budgets. What XLA makes of its own forms holds no decoded weight."""

import functools
import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

from qat.kernels import static_gpu
from tests.aot import gpu_cases

PLUGIN = importlib.util.find_spec('jax_cuda13_plugin')
pytestmark = [pytest.mark.aot, pytest.mark.skipif(PLUGIN is None, reason="jax has no CUDA plugin: tests/aot/gpu.txt")]

BUDGETS = pathlib.Path(__file__).parent / 'gpu_budgets.json'
TOLERANCE = 1.05
WEIGHT_ONLY = ['int4_g128_8', 'int4_g128_16', 'int4_g128_64', 'int4_g128_128', 'int4_16', 'int4_g32_16',
               'uint4_g128_16', 'int8_16', 'nf4_16', 'nf4_64', 'mxfp4_16', 'mxfp4_128', 'nvfp4_16', 'fp8_16']
OF_CODES = {'int8_x_int8_16': 'IGMMA', 'int8_x_int8_4096': 'IGMMA', 'int4_x_int8_4096': 'IGMMA',
            'fp8_x_fp8_16': 'QGMMA', 'fp8_x_fp8_4096': 'QGMMA'}
KERNELS = [*WEIGHT_ONLY, *OF_CODES]


@functools.cache
def report(case, target='h200'):
  return static_gpu.compile(f'tests.aot.gpu_cases:{case}', target)


@pytest.mark.parametrize('case', KERNELS)
def test_compiles_within_its_budget(case):
  found = report(case)
  assert found.error is None
  assert found.spill_bytes == 0 and not found.losses and found.calls == ('mosaic_gpu_v2',)
  assert 0 < found.slots <= TOLERANCE * json.loads(BUDGETS.read_text())[case]
  assert found.temp_bytes < gpu_cases.K * gpu_cases.N                    # No decoded weight, nor one in bytes.
  assert {op.split('.')[0] for op in found.mma} == {OF_CODES.get(case, 'HGMMA')}


@pytest.mark.parametrize('case, most', [('int4_g128_16', 130), ('nf4_16', 280)])
def test_slots_of_64_columns_by_128(case, most):
  """HBM delivers 64 x 128 codes of 4 bits in 221 cycles of a processor: 4.3 TB/s, 132 processors, 1.755 GHz."""
  name, _, rows = case.rpartition('_')
  tiles = gpu_cases.tiles(name, int(rows))
  assert report(case).slots / (tiles.columns // 64 * tiles.depth // 128) <= most


def test_beyond_256_rows_a_weight_is_decoded_by_one_pass():
  found = report('int4_g128_512')
  assert found.error is None and 'mosaic_gpu_v2' not in found.calls
  assert found.temp_bytes <= 2.1 * gpu_cases.K * gpu_cases.N              # bf16, once.


@pytest.mark.parametrize('case', ['hadamard_4096', 'hadamard_8192'])
def test_rotations_are_one_pass(case):
  found = report(case)
  assert found.error is None and found.spill_bytes == 0 and not found.losses
  assert found.temp_bytes == 0 and found.calls == ('mosaic_gpu_v2',)
  assert {op.split('.')[0] for op in found.mma} == {'HGMMA'}


@pytest.mark.parametrize('case', ['encode_4096', 'encode_16384', 'encode_fp8_4096', 'encode_fp8_16384'])
def test_encoding_is_one_pass(case):
  found = report(case)
  assert found.error is None and found.spill_bytes == 0 and not found.losses
  assert found.temp_bytes == 0 and found.calls == ('mosaic_gpu_v2',)


def test_encoding_divides_as_xla_does(tmp_path, monkeypatch):
  """The same approximations, so that scales on the device are equal to the bit."""
  compile = lambda case, keep: static_gpu.compile(f'tests.aot.gpu_cases:{case}', 'h200', keep)
  divisions = lambda folder: sorted(op for ptx in folder.glob('**/*.ptx')
                                    for op in re.findall(r'\b(?:div|rcp)\.[\w.]+', ptx.read_text()))
  assert compile('encode_4096', tmp_path / 'kernel').error is None
  monkeypatch.setenv('XLA_FLAGS', f'--xla_dump_to={tmp_path / "xla"} --xla_dump_emitter_re=.*')  # PTX too.
  assert compile('xla_encode_4096', None).error is None
  assert divisions(tmp_path / 'kernel') == divisions(tmp_path / 'xla') == ['div.full.f32', 'rcp.approx.f32']


@pytest.mark.parametrize('case, share', [('attention_8192', 0.1), ('attention_kv8_8192', 0.12),
                                         ('attention_kv4_8192', 0.2)])
def test_attention_writes_little_beside_the_cache_it_reads(case, share):
  """Rows of scales and offsets, and the sums of each part of the tokens."""
  found = report(case)
  assert found.error is None and found.spill_bytes == 0 and not found.losses
  assert found.temp_bytes < share * found.argument_bytes
  assert {op.split('.')[0] for op in found.mma} == {'HGMMA'}


def test_under_vmap():
  found = report('batched_16')
  assert found.error is None and 'mosaic_gpu_v2' in found.calls and found.spill_bytes == 0
  assert found.temp_bytes < gpu_cases.K * gpu_cases.N


def test_inside_shard_map_over_four_gpus():
  """The interpreter runs one device only (tests/kernels/test_sharded.py): here the splits are compiled, and do not run.
  A weight is never gathered, and sums over inputs are reduced."""
  environment = dict(os.environ, JAX_PLATFORMS='cpu', PATH=f'{static_gpu.tool("ptxas").parent}:{os.environ["PATH"]}')
  done = subprocess.run([sys.executable, '-m', 'tests.aot.sharded_gpu'], env=environment, text=True,
                        capture_output=True, timeout=300)
  assert done.returncode == 0, done.stderr
  found = json.loads(done.stdout.splitlines()[-1])
  divided = found.pop('divided')                                         # Outside shard_map: XLA's product.
  assert 'mosaic_gpu_v2' not in divided['calls'] and divided['collectives'] == []
  assert {split: about['collectives'] for split, about in found.items()} == {
      'rows': [], 'outputs': [], 'inputs': ['all-reduce']}
  assert all(about['calls'] == ['mosaic_gpu_v2'] for about in found.values())
  assert all(about['temp_bytes'] < gpu_cases.K * gpu_cases.N for about in found.values())


@pytest.mark.parametrize('case, said', [('too_many_stages', 'bytes of shared memory, of'),
                                        ('too_many_registers', 'registers of a thread')])
def test_what_does_not_fit_is_refused_by_us(case, said):
  assert report(case).error.startswith('ValueError: Tiles(') and said in report(case).error


@pytest.mark.parametrize('target', static_gpu.TARGETS)
@pytest.mark.parametrize('case', ['xla_int4_g128_16', 'xla_uint4_g128_16', 'xla_int8_16', 'xla_int4_g32_16',
                                  'xla_nf4_16', 'xla_mxfp4_16', 'xla_nvfp4_64', 'xla_fp8_16', 'xla_nf4_256'])
def test_what_xla_multiplies_holds_no_decoded_weight(case, target):
  found = report(case, target)
  assert found.error is None and found.temp_bytes < gpu_cases.K * gpu_cases.N


@pytest.mark.parametrize('name', ['mxfp8', 'nvfp4'])
def test_blackwell_multiplies_block_scaled_operands_as_they_are(name):
  found = report(f'block_scaled_{name}_512', 'b200')
  assert found.error is None and found.temp_bytes < 1.1 * gpu_cases.K * gpu_cases.N  # Codes, as cuDNN reads them.
  assert '__cudnn$blockScaledDot' in found.calls


@pytest.mark.parametrize('name', ['mxfp8', 'nvfp4'])
def test_blackwell_reads_the_codes_of_a_prepared_weight_where_they_lie(name):
  found = report(f'prepared_{name}_512', 'b200')
  scales = gpu_cases.K * gpu_cases.N // (32 if name == 'mxfp8' else 16)  # Which XLA puts in cuDNN's order at each call.
  assert found.error is None and scales <= found.temp_bytes < 1.2 * scales
  assert '__cudnn$blockScaledDot' in found.calls


def test_a_prepared_layer_on_blackwell_holds_no_other_weight():
  found = report('blackwell_layer', 'b200')
  assert found.error is None and '__cudnn$blockScaledDot' in found.calls
  assert found.temp_bytes < 0.6 * gpu_cases.K * gpu_cases.N              # Outputs in float32 take half a byte a weight.
  assert found.argument_bytes < 1.3 * gpu_cases.K * gpu_cases.N


def test_kernels_for_hopper_are_refused_elsewhere():
  assert report('int4_g128_16', 'a100').error is not None
