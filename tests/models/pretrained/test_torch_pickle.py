import io
import os
import pickle
import pickletools
import zipfile

import ml_dtypes
import numpy as np
import pytest

from qat.models.pretrained import torch_pickle
from tests.models.pretrained import torch_files

LAYOUTS = dict(zip=torch_files.zipped, legacy=torch_files.legacy)
ARRAYS = {
    'conv.weight': np.arange(24, dtype=np.float32).reshape(2, 3, 4),
    'half': np.array([1.5, -2.0], np.float16),
    'brain': np.array([[1.5], [-3.0]], ml_dtypes.bfloat16),
    'double': np.array([np.pi]),
    'steps': np.array(7, np.int64),
    'mask': np.array([True, False]),
    **{f'of_{kind}': np.array([-1, 100]).astype(kind) for kind in ('int32', 'int16', 'int8', 'uint8')},
    'empty': np.zeros((0, 3), np.float32),
}


@pytest.fixture(params=LAYOUTS.values(), ids=LAYOUTS)
def layout(request):
  return request.param


def of(layout, arrays=ARRAYS):
  return layout(*torch_files.tensors(arrays, old=layout is torch_files.legacy))


def test_reads_every_dtype(layout):
  found = torch_pickle.read(of(layout))
  assert list(found) == list(ARRAYS)
  for name, array in ARRAYS.items():
    assert found[name].dtype == array.dtype, name
    np.testing.assert_array_equal(found[name], array)


def test_reads_paths(tmp_path, layout):
  path = tmp_path / 'x.pth'
  path.write_bytes(of(layout))
  np.testing.assert_array_equal(torch_pickle.read(path)['conv.weight'], ARRAYS['conv.weight'])
  path.write_bytes(b'not torch')
  with pytest.raises(ValueError, match=rf"{path}, read as a file of torch.save: it begins with b'not torc', neither"):
    torch_pickle.read(str(path))


def test_views_share_their_storage(layout):
  """A transposed tensor, and one that begins in the middle, of one storage of 6."""
  x = np.arange(6, dtype=np.float32)
  tensor = lambda *where: torch_files.tensor('Float', 'k', 6, *where)
  entries = dict(a=tensor((3, 2), (1, 3)), b=tensor((2,), (1,), 4), c=tensor((), (), 5), d=tensor((3,), (0,), 2))
  found = torch_pickle.read(layout(torch_files.state_dict(entries), dict(k=x)))
  np.testing.assert_array_equal(found['a'], [[0, 3], [1, 4], [2, 5]])
  np.testing.assert_array_equal(found['b'], [4, 5])
  assert found['c'] == 5
  np.testing.assert_array_equal(found['d'], [2, 2, 2])
  assert np.shares_memory(found['a'], found['b'])


def test_reads_nested_checkpoints():
  pushed = b'}(' + torch_files.text('epoch') + torch_files.integer(3) + torch_files.text('lr') + (
      b'G' + b'\x3f\xe0' + bytes(6)) + torch_files.text('names') + b'](' + torch_files.text('a') + b'N\x88e' + (
      torch_files.text('pair') + torch_files.integer(-5) + b'\x89\x86' + b'u')
  assert torch_pickle.read(torch_files.zipped(pushed, {})) == dict(epoch=3, lr=0.5, names=['a', None, True],
                                                                   pair=(-5, False))


# What must not run.

class Evil:
  """Pickles to a call of os.system."""

  def __init__(self, command):
    self.command = command

  def __reduce__(self):
    return os.system, (self.command,)


@pytest.mark.parametrize('protocol', range(6))
def test_a_function_that_is_called_is_refused_and_does_not_run(tmp_path, protocol, layout):
  ran = tmp_path / 'ran'
  evil = pickle.dumps(dict(weight=Evil(f'touch {ran}')), protocol)
  assert pickle.loads(evil) and ran.exists()  # It would.
  ran.unlink()
  body = evil[2:-1] if protocol >= 2 else evil[:-1]
  with pytest.raises(ValueError, match=r"(asks for 'posix\.system'|opcode).* not run|Nothing of it was run"):
    torch_pickle.read(layout(body, {}))
  assert not ran.exists()


@pytest.mark.parametrize('name', ['posix.system', 'builtins.eval', 'builtins.getattr', 'torch.load', 'torch.nn.Linear',
                                  'collections.OrderedDict.update', 'torch._utils._rebuild_parameter', 'numpy.load'])
def test_names_are_refused_by_name(name, layout):
  with pytest.raises(ValueError, match=rf"its pickle asks for '{name}', which may run any code and was not run"):
    torch_pickle.read(layout(torch_files.called(name, torch_files.text('x')), {}))


def test_names_put_together_on_the_stack_are_refused_by_name():
  pushed = torch_files.text('os') + torch_files.text('system') + b'\x93'
  with pytest.raises(ValueError, match="its pickle asks for 'os.system'"):
    torch_pickle.read(torch_files.zipped(pushed, {}))


@pytest.mark.parametrize('pushed, message', [
    (b'(ios\nsystem\n', r"opcode INST \('os system'\)"),
    (b'ccollections\nOrderedDict\n)\x81', 'opcode NEWOBJ'),
    (b'\x82\x01', 'opcode EXT1'),
    (b'P5\n', 'opcode PERSID'),
    (b']}b', r'sets attributes of \[\], which is no OrderedDict'),
    (torch_files.called('collections.OrderedDict', b'N'), 'makes neither an OrderedDict nor a tensor'),
    (torch_files.called('torch.FloatStorage', b'N'), 'makes neither an OrderedDict nor a tensor'),
    (torch_files.text('x') + b')R', 'makes neither an OrderedDict nor a tensor'),
    (b']NNs', 'SETITEM .*sets 2 keys and values of a list'),
    (b'}](NNu', 'SETITEMS .*sets 2 keys and values of a list'),
    (b'}(]Nu', 'keys are strings or integers'),
    (b'}NaN', 'appends to a dict'),
    (b'h\x07', 'fails at byte 2, BINGET 7: KeyError 7'),
    (b'(NNNe', 'IndexError'),
    (b'0', 'opcode POP'),
    (b'\xff', 'unknown|opcode'),
    (b'', 'IndexError'),
])
def test_pickles_that_do_more_or_less_are_refused(pushed, message):
  with pytest.raises(ValueError, match=message):
    torch_pickle.read(torch_files.zipped(pushed, {}))


@pytest.mark.parametrize('shape, strides, offset', [
    ((7,), (1,), 0), ((2,), (1,), 5), ((2, 2), (5, 1), 0), ((2,), (2 ** 62,), 0), ((1,), (1,), 6),
    ((1,), (1,), 2 ** 80), ((2 ** 40,), (0,), 0), ((2,), (-1,), 3), ((2, 1), (1,), 0), ((-2,), (1,), 0),
    ((0, 2 ** 80), (1, 1), 0)])
def test_tensors_outside_of_their_storage_are_refused(shape, strides, offset, layout):
  pushed = torch_files.state_dict(dict(x=torch_files.tensor('Float', 'k', 6, shape, strides, offset)))
  with pytest.raises(ValueError, match='it makes a tensor of'):
    torch_pickle.read(layout(pushed, dict(k=np.zeros(6, np.float32))))


def test_storages_that_do_not_fit_are_refused(layout):
  tensor = torch_files.tensor('Float', 'k', 6, (6,), (1,))
  state = lambda *entries: torch_files.state_dict({str(i): entry for i, entry in enumerate(entries)})
  six = np.zeros(6, np.float32)
  with pytest.raises(ValueError, match=r"storage 'k'.*(20 bytes long.*take 24|holds 5 numbers)"):
    torch_pickle.read(layout(state(tensor), dict(k=six[:5])))
  with pytest.raises(ValueError, match=r'its member .*data/k.* is not in the archive|it lists \[\]'):
    torch_pickle.read(layout(state(tensor), {}))
  with pytest.raises(ValueError, match="'k' of 1000000000 numbers is larger than what the file holds"):
    torch_pickle.read(layout(state(torch_files.tensor('Float', 'k', 10 ** 9, (1,), (1,))), dict(k=six)))
  with pytest.raises(ValueError, match=r"'k' is named twice, as float32\[6\] and as int32\[6\]"):
    torch_pickle.read(layout(state(tensor, torch_files.tensor('Int', 'k', 6, (6,), (1,))), dict(k=six)))
  with pytest.raises(ValueError, match=r'names a storage by'):
    torch_pickle.read(layout(state(torch_files.tensor('Float', 'k', -6, (6,), (1,))), dict(k=six)))
  with pytest.raises(ValueError, match=r"names a storage by 'x'"):
    torch_pickle.read(layout(torch_files.text('x') + b'Q', {}))


def test_zip_archives_of_others_are_refused():
  pushed, storages = torch_files.tensors(ARRAYS)
  with pytest.raises(ValueError, match='not little-endian. Save it anew'):
    torch_pickle.read(torch_files.zipped(pushed, storages, byteorder=b'big'))
  assert torch_pickle.read(torch_files.zipped(pushed, storages, byteorder=b'little'))
  with pytest.raises(ValueError, match='is compressed or encrypted'):
    torch_pickle.read(torch_files.zipped(pushed, storages, zipfile.ZIP_DEFLATED))
  file = io.BytesIO()
  with zipfile.ZipFile(file, 'w') as archive:
    archive.writestr('word/document.xml', b'')
  with pytest.raises(ValueError, match=r"has 0 members \*/data.pkl, and \['word/document.xml'\]"):
    torch_pickle.read(file.getvalue())


def test_legacy_files_of_other_versions_are_refused():
  data = of(torch_files.legacy)
  with pytest.raises(ValueError, match=r'it is of version 1000'):
    torch_pickle.read(data.replace(torch_files.integer(1001), torch_files.integer(1000), 1))
  with pytest.raises(ValueError, match=r'little_endian.: False'):
    torch_pickle.read(data.replace(b'\x88u', b'\x89u', 1))
  with pytest.raises(ValueError, match=r'neither a zip archive nor the magic number'):
    torch_pickle.read(torch_files.PROTO + torch_files.integer(5) + torch_files.STOP)


def test_cut_anywhere_it_raises(layout):
  data = of(layout, {'a': np.arange(3, dtype=np.float32), 'b': np.arange(2, dtype=np.int64)})
  for n in range(len(data)):
    with pytest.raises(ValueError, match=f'{n} bytes, read as a file of torch.save: '):
      torch_pickle.read(data[:n])


def test_damaged_anywhere_it_reads_or_raises_a_value_error(layout):
  data = of(layout, {'a': np.arange(3, dtype=np.float32), 'b': np.arange(2, dtype=np.int64)})
  random = np.random.default_rng(0)
  read = 0
  for i in range(2000):
    damaged = bytearray(data)
    for place in random.integers(0, len(data), 1 + i % 3):
      damaged[place] = random.integers(0, 256)
    try:
      torch_pickle.read(bytes(damaged))
      read += 1
    except ValueError:
      pass
  assert 0 < read < 2000


def test_containers_within_themselves_do_no_harm():
  """A list of itself, a list doubled 60 times, and tuples 100,000 deep, in values and in errors."""
  assert len(torch_pickle.read(torch_files.zipped(b']q\x00h\x00a', {}))) == 1
  doubled = b'N' + b'q\x00h\x00\x86' * 60
  deep = b'N' + b'\x85' * 100000
  for pushed in (doubled, deep):
    torch_pickle.read(torch_files.zipped(pushed, {}))
    for op in (b'Q', b'}b', b')R'):
      with pytest.raises(ValueError):
        torch_pickle.read(torch_files.zipped(pushed + op, {}))
    with pytest.raises(ValueError, match='keys are strings'):
      torch_pickle.read(torch_files.zipped(b'}' + pushed + b'Ns', {}))


def test_the_writer_writes_pickles():
  """The oracle's oracle: Python's own disassembler."""
  out = io.StringIO()
  pickletools.dis(torch_files.PROTO + torch_files.tensors(ARRAYS)[0] + torch_files.STOP, out)
  assert 'torch._utils _rebuild_tensor_v2' in out.getvalue()
