"""Files of torch.save, without torch and without running what is in them.

Such a file is a pickle: a program for a stack machine, which may call any function of Python. The machine here knows
what dicts of tensors need, and calls nothing: a name such as torch.FloatStorage is looked up in the tables below, and
any other name is an error.
https://docs.python.org/3/library/pickletools.html, https://docs.pytorch.org/docs/stable/notes/serialization.html

Two layouts hold the numbers. Since torch 1.6 (2020) a file is a zip archive: the pickle is `*/data.pkl`, and each
storage a member `*/data/<key>`. Before, it was five pickles in a row (a magic number, the version, facts about the
machine, the object, the keys of the storages), then the storages: a count i64 and the numbers.
"""

import dataclasses
import io
import math
import pathlib
import pickletools
import reprlib
import struct
import warnings
import zipfile

import ml_dtypes
import numpy as np

MAGIC = 0x1950A86A20F9469CFC6C
VERSION = 1001
DTYPES = {f'torch.{name}Storage': np.dtype(dtype).newbyteorder('<') for name, dtype in dict(
    Double=np.float64, Float=np.float32, Half=np.float16, BFloat16=ml_dtypes.bfloat16, Long=np.int64, Int=np.int32,
    Short=np.int16, Char=np.int8, Byte=np.uint8, Bool=np.bool_).items()}
NAMES = ('collections.OrderedDict', 'torch._utils._rebuild_tensor_v2', *DTYPES)


@dataclasses.dataclass(frozen=True)
class Global:
  """A name that a pickle asks for. It does nothing."""

  name: str


# What zipfile raises when an archive is damaged.
ZIP_ERRORS = (zipfile.BadZipFile, EOFError, NotImplementedError, OverflowError, struct.error)
MARK = Global('the mark of the stack')
# Opcodes that push what they carry.
CONSTANTS = frozenset('NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT BINUNICODE SHORT_BINUNICODE'.split())
VALUES = dict(NONE=None, NEWTRUE=True, NEWFALSE=False)
FIXED_TUPLES = dict(EMPTY_TUPLE=0, TUPLE1=1, TUPLE2=2, TUPLE3=3)


def read(path):
  """The object that a file of torch.save holds, with a numpy array for each tensor.

  Args:
    path: of the file, or its bytes.

  Returns:
    What was saved, made of dicts, lists, tuples, strings, numbers and arrays; arrays that shared a storage still do.
  """
  data = path if isinstance(path, bytes) else pathlib.Path(path).read_bytes()
  what = f'{f"{len(data)} bytes" if path is data else path}, read as a file of torch.save'
  try:
    return _read_zip(data) if data[:2] == b'PK' else _read_legacy(data)
  except ValueError as error:
    raise ValueError(f'{what}: {error}') from error
  except ZIP_ERRORS as error:
    raise ValueError(f'{what}: its zip archive is damaged ({error!r}). Download it again.') from error


def _read_zip(data):
  with zipfile.ZipFile(io.BytesIO(data)) as archive:
    pickles = [name for name in archive.namelist() if name.split('/')[1:] == ['data.pkl']]
    if len(pickles) != 1:
      raise ValueError(f'its zip archive has {len(pickles)} members */data.pkl, and {archive.namelist()[:5]}. '
                       'Give a file that torch.save wrote.')
    root = pickles[0].split('/')[0]
    order = f'{root}/byteorder'
    if order in archive.namelist() and _member(archive, order) != b'little':
      raise ValueError('its numbers are not little-endian. Save it anew on a little-endian machine.')
    storages = Storages(len(data))
    obj = run(io.BytesIO(_member(archive, pickles[0])), storages)
    for key, storage in storages.arrays.items():
      _fill(storage, _member(archive, f'{root}/data/{key}'), key)
  return obj


def _member(archive, name):
  """The bytes of a member, stored as they are: torch compresses none, and one that is may be of any size."""
  if name not in archive.NameToInfo:
    raise ValueError(f'its member {name!r} is not in the archive. The file was cut: download it again.')
  info = archive.getinfo(name)
  if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
    raise ValueError(f'its member {name!r} is compressed or encrypted. Give a file that torch.save wrote.')
  return archive.read(info)


def _read_legacy(data):
  file, storages = io.BytesIO(data), Storages(len(data))
  if not data.startswith(b'\x80') or run(file, storages) != MAGIC:
    raise ValueError(f'it begins with {data[:8]!r}, neither a zip archive nor the magic number of torch. '
                     'Give a file that torch.save wrote; safetensors and GGUF have readers of their own.')
  version, system = run(file, storages), run(file, storages)
  if version != VERSION or not isinstance(system, dict) or system.get('little_endian') is not True:
    raise ValueError(f'it is of version {reprlib.repr(version)}, from a machine {reprlib.repr(system)}: it should be '
                     f'of version {VERSION}, and little-endian. Save it anew, by torch 1.6 or later.')
  obj, keys = run(file, storages), run(file, storages)
  if not isinstance(keys, list) or sorted(storages.arrays) != sorted(k for k in keys if isinstance(k, str)):
    raise ValueError(f'its tensors lie in {len(storages.arrays)} storages, and it lists {reprlib.repr(keys)}. '
                     'The file is damaged: download it again.')
  for key in keys:
    storage = storages.arrays[key]
    count = int.from_bytes(file.read(8), 'little', signed=True)
    if count != storage.size:
      raise ValueError(f'its storage {key!r} holds {count} numbers, and its tensors were promised {storage.size}. '
                       'The file was cut or damaged: download it again.')
    _fill(storage, file.read(storage.nbytes), key)
  return obj


def _fill(storage, content, key):
  if len(content) != storage.nbytes:
    raise ValueError(f'its storage {key!r} is {len(content)} bytes long, and {storage.size} numbers of {storage.dtype} '
                     f'take {storage.nbytes}. The file was cut: download it again.')
  storage[:] = np.frombuffer(content, storage.dtype)


class Storages:
  """The arrays that tensors are views of, made empty when the pickle names them and filled afterwards."""

  def __init__(self, size_bytes):
    """Args: size_bytes: of the file, which no set of storages can exceed."""
    self.left, self.arrays = size_bytes, {}

  def __call__(self, identity):
    """The storage of ('storage', type, key, device, count), or with a sixth entry, None, in old files."""
    match identity:
      case ('storage', Global(name=kind), str(key), str(), int(count), *view) if (
          kind in DTYPES and count >= 0 and view in ([], [None])):
        pass
      case _:
        raise ValueError(f'it names a storage by {reprlib.repr(identity)}: that should be (storage, one of '
                         f'{sorted(DTYPES)}, key, device, count). Save its tensors anew, by torch 1.6 or later.')
    if key not in self.arrays:
      self.left -= count * DTYPES[kind].itemsize
      if self.left < 0:
        raise ValueError(f'its storage {key!r} of {count} numbers is larger than what the file holds. '
                         'The file was cut or damaged: download it again.')
      self.arrays[key] = np.empty(count, DTYPES[kind])
    if self.arrays[key].dtype != DTYPES[kind] or self.arrays[key].size != count:
      raise ValueError(f'its storage {key!r} is named twice, as {self.arrays[key].dtype}[{self.arrays[key].size}] and '
                       f'as {DTYPES[kind]}[{count}]. The file is damaged: download it again.')
    return self.arrays[key]


def rebuild(storage, offset, shape, strides, *unused):
  """A tensor, as a view of its storage; offset and strides count elements."""
  whole = lambda numbers: isinstance(numbers, tuple) and all(type(n) is int and 0 <= n < 2 ** 63 for n in numbers)
  if not (isinstance(storage, np.ndarray) and whole((offset,)) and whole(shape) and whole(strides)
          and len(shape) == len(strides)):
    raise ValueError(f'it makes a tensor of {reprlib.repr((offset, shape, strides))}: that should be a storage, an '
                     'offset, a shape and strides. The file is damaged: download it again.')
  last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides))
  if math.prod(shape) > storage.size or math.prod(shape) and last >= storage.size:
    raise ValueError(f'it makes a tensor of shape {shape}, strides {strides} and offset {offset} from a storage of '
                     f'{storage.size} numbers. Save a contiguous copy of it, or download the file again.')
  if not math.prod(shape):
    return np.empty(shape, storage.dtype)
  strides = [stride * storage.itemsize if n > 1 else 0 for n, stride in zip(shape, strides)]
  return np.lib.stride_tricks.as_strided(storage[offset:], shape, strides)


def run(file, storages):
  """Runs one pickle of `file`, on a machine that can only build containers and tensors."""
  machine = Machine(storages)
  with warnings.catch_warnings(action='ignore'):  # pickletools warns of escapes in damaged names.
    for opcode, argument, position in _opcodes(file):
      try:
        machine.step(opcode.name, argument)
      except (IndexError, KeyError, TypeError) as error:
        raise ValueError(f'its pickle fails at byte {position}, {opcode.name} {reprlib.repr(argument)}: '
                         f'{type(error).__name__} {error}. The file is damaged: download it again.') from error
  return machine.result


def _opcodes(file):
  try:
    yield from pickletools.genops(file)
  except ValueError as error:
    raise ValueError(f'its pickle cannot be read ({error}). The file was cut or damaged: download it again.') from error


class Machine:
  """The stack machine of pickle, less all that calls."""

  def __init__(self, storages):
    self.stack, self.memo, self.storages, self.result = [], {}, storages, None

  def step(self, name, argument):
    """Does one opcode."""
    if name in CONSTANTS:
      self.stack.append(VALUES.get(name, argument))
    elif name in FIXED_TUPLES:
      items = [self.stack.pop() for _ in range(FIXED_TUPLES[name])]
      self.stack.append(tuple(reversed(items)))
    elif hasattr(self, f'op_{name}'):
      getattr(self, f'op_{name}')(argument)
    else:
      raise ValueError(f'its pickle has the opcode {name} ({reprlib.repr(argument)}), of which dicts of tensors have '
                       'no need. Nothing of it was run. Save `model.state_dict()` instead.')

  def since_mark(self):
    """Pops all that lies above the last mark."""
    items = []
    while (item := self.stack.pop()) is not MARK:
      items.append(item)
    return items[::-1]

  def op_PROTO(self, version):
    pass

  def op_FRAME(self, size):
    pass

  def op_STOP(self, _):
    self.result = self.stack.pop()

  def op_MARK(self, _):
    self.stack.append(MARK)

  def op_EMPTY_DICT(self, _):
    self.stack.append({})

  def op_EMPTY_LIST(self, _):
    self.stack.append([])

  def op_TUPLE(self, _):
    self.stack.append(tuple(self.since_mark()))

  def op_APPEND(self, _):
    self.extend([self.stack.pop()])

  def op_APPENDS(self, _):
    self.extend(self.since_mark())

  def op_SETITEM(self, _):
    value, key = self.stack.pop(), self.stack.pop()
    self.update([key, value])

  def op_SETITEMS(self, _):
    self.update(self.since_mark())

  def op_BINPUT(self, place):
    self.memo[place] = self.stack[-1]

  op_LONG_BINPUT = op_BINPUT

  def op_MEMOIZE(self, _):
    self.memo[len(self.memo)] = self.stack[-1]

  def op_BINGET(self, place):
    self.stack.append(self.memo[place])

  op_LONG_BINGET = op_BINGET

  def op_BINPERSID(self, _):
    self.stack.append(self.storages(self.stack.pop()))

  def op_GLOBAL(self, argument):
    name = '.'.join(argument.split(' ', 1))
    if name not in NAMES:
      raise ValueError(f'its pickle asks for {name!r}, which may run any code and was not run. Dicts of tensors need '
                       f'no more than {NAMES}. Save `model.state_dict()` instead.')
    self.stack.append(Global(name))

  def op_STACK_GLOBAL(self, _):
    name, module = self.stack.pop(), self.stack.pop()
    self.op_GLOBAL(f'{module} {name}')

  def op_REDUCE(self, _):
    arguments, function = self.stack.pop(), self.stack.pop()
    match function, arguments:
      case Global(name='collections.OrderedDict'), ():
        self.stack.append({})
      case Global(name='torch._utils._rebuild_tensor_v2'), (_, _, _, _, *_):
        self.stack.append(rebuild(*arguments))
      case _:
        raise ValueError(f'its pickle calls {reprlib.repr(function)} on {reprlib.repr(arguments)}: that makes '
                         'neither an OrderedDict nor a tensor. Nothing was run. Save `model.state_dict()` instead.')

  def op_BUILD(self, _):
    """Attributes of an OrderedDict: torch keeps the versions of modules in them."""
    self.stack.pop()
    if not isinstance(self.stack[-1], dict):
      raise ValueError(f'its pickle sets attributes of {reprlib.repr(self.stack[-1])}, which is no OrderedDict. '
                       'Nothing of it was run. Save `model.state_dict()` instead.')

  def extend(self, items):
    if not isinstance(self.stack[-1], list):
      raise TypeError(f'appends to a {type(self.stack[-1]).__name__}')
    self.stack[-1].extend(items)

  def update(self, items):
    target, keys, values = self.stack[-1], items[::2], items[1::2]
    if not isinstance(target, dict) or len(keys) != len(values) or not all(isinstance(k, str | int) for k in keys):
      raise TypeError(f'sets {len(items)} keys and values of a {type(target).__name__}; keys are strings or integers')
    target.update(zip(keys, values))
