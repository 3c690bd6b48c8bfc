"""Reading SASS, and what is said where tools are missing."""

import pytest

from qat.kernels import static_gpu

SASS = """
.L_x_0:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_1:
        /*0010*/                   LDSM.16.M88.4 R4, [R2] ;
.L_x_2:
        /*0020*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R3 ;
        /*0030*/              @!P0 BRA `(.L_x_2) ;
        /*0040*/                   LOP3.LUT R8, R4, 0xf000f, R9, 0x6a, !PT ;
        /*0050*/                   HGMMA.64x16x16.F32.BF16 R24, R8, gdesc[UR8], R24 ;
        /*0060*/                   HGMMA.64x16x16.F32.BF16 R24, R8, gdesc[UR8], R24, gsb0 ;
        /*0070*/               @P1 BRA `(.L_x_1) ;
        /*0080*/               @P2 BRA `(.L_x_0) ;
        /*0090*/                   BRA `(.L_x_3) ;
.L_x_3:
        /*00a0*/                   EXIT ;
"""


def test_the_innermost_loop_that_multiplies():
  """Neither the wait inside it, which has no matrix instruction, nor the loop around it; jumps forward are no loops."""
  loop = static_gpu.innermost_loop(SASS)
  assert loop == ['LDSM.16.M88.4', 'SYNCS.PHASECHK.TRANS64.TRYWAIT', 'BRA', 'LOP3.LUT', 'HGMMA.64x16x16.F32.BF16',
                  'HGMMA.64x16x16.F32.BF16', 'BRA']
  assert static_gpu.innermost_loop(SASS.replace('HGMMA', 'FFMA')) == []


def test_a_missing_tool_is_named(monkeypatch):
  monkeypatch.setattr(static_gpu.shutil, 'which', lambda name: None)
  monkeypatch.setattr(static_gpu.pathlib.Path, 'exists', lambda path: False)
  with pytest.raises(FileNotFoundError, match='nvdisasm is neither on PATH.*pip install nvidia-cuda-nvdisasm'):
    static_gpu.tool('nvdisasm')


def test_targets_are_described():
  for target, arch in static_gpu.TARGETS.items():
    text = (static_gpu.pathlib.Path(static_gpu.__file__).parent / 'targets' / f'{target}.txtpb').read_text()
    major = int(arch.removeprefix('sm_').rstrip('a')) // 10
    assert f'major: {major} ' in text and ('ACCELERATED_FEATURES' in text) == arch.endswith('a')
    assert target.upper() in text
