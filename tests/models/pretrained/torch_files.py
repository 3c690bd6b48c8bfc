"""Writes what torch.save writes, opcode by opcode, after https://docs.python.org/3/library/pickletools.html."""

import io
import struct
import zipfile

import numpy as np

KINDS = {'float32': 'Float', 'float64': 'Double', 'float16': 'Half', 'bfloat16': 'BFloat16', 'int64': 'Long',
         'int32': 'Int', 'int16': 'Short', 'int8': 'Char', 'uint8': 'Byte', 'bool': 'Bool'}
PROTO, STOP, MARK = b'\x80\x02', b'.', b'('


def integer(n):
  """LONG1, which holds any."""
  content = n.to_bytes(max(1, n.bit_length() // 8 + 1), 'little', signed=True)
  return b'\x8a' + bytes([len(content)]) + content


def text(s):
  return b'X' + struct.pack('<I', len(s.encode())) + s.encode()


def called(name, *arguments):
  """module.name(*arguments): GLOBAL, a tuple, REDUCE."""
  module, _, name = name.rpartition('.')
  return b'c' + f'{module}\n{name}\n'.encode() + MARK + b''.join(arguments) + b'tR'


def whole(numbers):
  return MARK + b''.join(map(integer, numbers)) + b't'


def tensor(kind, key, count, shape, strides, offset=0, old=False):
  """torch._utils._rebuild_tensor_v2(persistent storage, offset, shape, strides, False, OrderedDict())."""
  storage = (MARK + text('storage') + f'ctorch\n{kind}Storage\n'.encode() + text(key) + text('cpu') + integer(count)
             + (b'N' if old else b'') + b'tQ')
  return called('torch._utils._rebuild_tensor_v2', storage, integer(offset), whole(shape), whole(strides), b'\x89',
                called('collections.OrderedDict'))


def state_dict(entries):
  """An OrderedDict with torch's attribute _metadata, from name -> what is pushed."""
  items = b''.join(text(name) + pushed for name, pushed in entries.items())
  metadata = b'}' + text('_metadata') + called('collections.OrderedDict') + b's'
  return called('collections.OrderedDict') + MARK + items + b'u' + metadata + b'b'


def tensors(arrays, old=False):
  """Contiguous arrays, each with its own storage, '0', '1', ...: (a state dict's opcodes, key -> array)."""
  entries, storages = {}, {}
  for i, (name, array) in enumerate(arrays.items()):
    strides = tuple(s // array.itemsize for s in np.ascontiguousarray(array).strides) if array.ndim else ()
    entries[name] = tensor(KINDS[array.dtype.name], str(i), array.size, array.shape, strides, old=old)
    storages[str(i)] = array
  return state_dict(entries), storages


def legacy(pushed, storages):
  """A file in the layout before torch 1.6."""
  little = b'}' + MARK + text('protocol_version') + integer(1001) + text('little_endian') + b'\x88u'
  keys = b']' + MARK + b''.join(map(text, storages)) + b'e'
  head = [integer(0x1950A86A20F9469CFC6C), integer(1001), little, pushed, keys]
  return b''.join(PROTO + part + STOP for part in head) + b''.join(
      struct.pack('<q', array.size) + array.tobytes() for array in storages.values())


def zipped(pushed, storages, compression=zipfile.ZIP_STORED, root='archive', **more):
  """A file in the layout since torch 1.6."""
  file = io.BytesIO()
  with zipfile.ZipFile(file, 'w', compression) as archive:
    archive.writestr(f'{root}/data.pkl', PROTO + pushed + STOP)
    for key, array in storages.items():
      archive.writestr(f'{root}/data/{key}', array.tobytes())
    archive.writestr(f'{root}/version', b'3\n')
    for name, content in more.items():
      archive.writestr(f'{root}/{name}', content)
  return file.getvalue()
