"""Pickles of torch tensors and numpy arrays, read without torch and without running code from the file.

Three things make a hostile file harmless: `scan` checks every opcode before anything is built; `Unpickler.find_class` gives
stand-ins for the allowed names and never looks a name up in a module; a budget limits what the stand-ins make. All functions
raise ValueError with the reason.
"""

import io
import math
import pickle
import pickletools
import reprlib
import warnings
from collections.abc import Callable
from functools import cached_property, partial
from typing import Any

import ml_dtypes
import numpy as np
from jaxtyping import Shaped

from retina_jax.errors import quoted

Buffer = bytes | bytearray | memoryview
ReadStorage = Callable[[str], Buffer]
Sizes = list[int] | tuple[int, ...]

NUMPY_KINDS = ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "b1")
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
TORCH_KINDS = {"Double": "f8", "Float": "f4", "Half": "f2", "BFloat16": BFLOAT16, "Long": "i8", "Int": "i4"}
TORCH_KINDS |= {"Short": "i2", "Char": "i1", "Byte": "u1", "Bool": "b1"}
STORAGES = {f"torch.{d}{name}Storage": np.dtype(kind) for d in ("", "cuda.") for name, kind in TORCH_KINDS.items()}
TORCH_DTYPES = "float64 float32 float16 bfloat16 double float half int64 int32 int16 int8 uint8 bool long int short"

LITERALS = frozenset((
    "NONE", "NEWTRUE", "NEWFALSE", "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT",
    "STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES",
    "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8",
))  # fmt: skip
PUTS, GETS = ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"), ("GET", "BINGET", "LONG_BINGET")
OPCODES = frozenset((
    "PROTO", "FRAME", "STOP", "EMPTY_TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "TUPLE", "EMPTY_LIST", "LIST", "APPEND",
    "APPENDS", "EMPTY_DICT", "DICT", "SETITEM", "SETITEMS", "GLOBAL", "STACK_GLOBAL", "REDUCE", "BUILD", "BINPERSID",
    "INST", "OBJ", "NEWOBJ",
))  # fmt: skip
"""Allowed besides those above and MARK. The last three only ever fail, after `find_class` has named what they refer to."""
# A memo reference of two bytes can make a call copy any object. So calls get BUDGET bytes of memory per byte of the pickle;
# weights need up to 45: of a parameter in protocol 4, which takes 61 bytes or more.
BUDGET, CALL, ENTRY = 50, 400, 100  # the last two: bytes that a call takes, and an entry of a list, tuple or dict in it
MEMOISED = frozenset(("EMPTY_DICT", "EMPTY_LIST", "TUPLE1", "TUPLE2", "TUPLE3", "TUPLE", "LIST", "DICT", *PUTS))
"""Opcodes of one byte that take about 80 bytes of memory; at most every second byte of a file can be one."""
LARGEST_KEY = 2**61 - 1  # Python hashes integers modulo this number, so that larger keys of a dict could all collide
ERRORS = (pickle.UnpicklingError, AttributeError, EOFError, LookupError, OverflowError, RecursionError, TypeError)


def numbers_in(buffer: Buffer, dtype: np.dtype, big_endian: bool = False) -> Shaped[np.ndarray, " N"]:
    """Returns the N numbers in `buffer`, in native byte order and aligned, if possible uncopied; bfloat16 as float32."""
    if dtype.kind == "b":
        return np.frombuffer(buffer, np.uint8) != 0
    numbers = np.frombuffer(buffer, dtype)
    numbers = numbers.byteswap() if big_endian else numbers
    numbers = numbers.astype(np.float32) if dtype == BFLOAT16 else numbers
    return numbers if numbers.flags.aligned else numbers.copy()


def are_sizes(numbers: Any) -> bool:
    """Returns whether this is a list or tuple of at most 64 integers in [0, 2^63), small enough to multiply and print."""
    short = isinstance(numbers, list | tuple) and len(numbers) <= 64
    return short and all(type(number) is int and 0 <= number < 2**63 for number in numbers)


class StandIn:
    """Base of stand-ins for torch's and numpy's objects; without `__setstate__`, a pickle could set attributes."""

    def __setstate__(self, state: Any) -> None:
        raise ValueError(f"malformed pickle: a state for a {type(self).__name__}")


class Dict(dict):
    """Stand-in for `collections.OrderedDict`, which Python 2 calls with a list of pairs."""

    def __init__(self, pairs: Any = ()) -> None:
        for name, value in pairs:
            if not isinstance(name, str):
                raise ValueError(f"malformed pickle: an OrderedDict with a key of type {type(name).__name__}")
            self[name] = value

    def __setstate__(self, state: Any) -> None:
        """Ignores the attribute `_metadata` of torch."""


class Dtype(StandIn):
    """Stand-in for `numpy.dtype`."""

    def __init__(self, kind: Any, *_: Any) -> None:
        if not isinstance(kind, str) or kind not in NUMPY_KINDS:
            raise ValueError(f"numpy array of dtype {reprlib.repr(kind)}; only arrays of numbers are read")
        self.dtype, self.big_endian = np.dtype(kind), False

    def __setstate__(self, state: Any) -> None:
        if state[1] not in ("<", ">", "|"):
            raise ValueError(f"malformed pickle: byte order {reprlib.repr(state[1])}")
        self.big_endian = state[1] == ">"


class Array(StandIn):
    """Stand-in for a tensor or a numpy array."""

    charge: Callable[[Any], None]

    def __init__(self, read: Callable[[], Shaped[np.ndarray, "..."]] | None = None) -> None:
        self.contents = read

    @cached_property
    def numbers(self) -> Shaped[np.ndarray, "..."]:
        """The numbers, made once however many names the array has."""
        if self.contents is None:
            raise ValueError("malformed pickle: a numpy array without contents")
        return self.contents()

    def __setstate__(self, state: Any) -> None:
        """Takes the contents of a `numpy.ndarray`: version (since numpy 1.0), shape, dtype, is column-major, bytes."""
        self.charge(state)
        shape, dtype, column_major, buffer = state[-4:]
        self.contents = numpy_array(buffer, dtype, shape, "F" if column_major else "C").contents


def numpy_array(buffer: Any, dtype: Any, shape: Any, order: Any) -> Array:
    """Replaces `numpy.core.numeric._frombuffer`; order "F" is column-major."""
    buffer = buffer.encode("latin1") if isinstance(buffer, str) else buffer  # a byte string of Python 2
    if not isinstance(dtype, Dtype) or not isinstance(buffer, bytes | bytearray) or not are_sizes(shape):
        raise ValueError("malformed pickle: a numpy array without a dtype, a shape or bytes")
    if len(buffer) != math.prod(shape) * dtype.dtype.itemsize:
        raise ValueError(f"numpy array of shape {shape} and dtype {dtype.dtype} in {len(buffer)} bytes")
    order = "F" if order == "F" else "C"
    return Array(lambda: numbers_in(buffer, dtype.dtype, dtype.big_endian).reshape(shape, order=order))


class Storage(StandIn):
    """`count` numbers, read at first use."""

    def __init__(self, dtype: np.dtype, count: int, big_endian: bool, read: Callable[[], Buffer]) -> None:
        self.dtype, self.count, self.big_endian, self.read = dtype, count, big_endian, read

    @cached_property
    def numbers(self) -> Shaped[np.ndarray, " N"]:
        buffer = self.read()
        if len(buffer) != self.count * self.dtype.itemsize:
            raise ValueError(f"damaged: a storage of {len(buffer)} bytes for {self.count} numbers of {self.dtype}")
        return numbers_in(buffer, self.dtype, self.big_endian)


def rebuild_tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> Array:
    """Replaces `torch._utils._rebuild_tensor`; offset and strides count numbers. Tensors of a storage share memory."""
    sized = are_sizes(shape) and are_sizes(strides) and are_sizes((offset,)) and len(shape) == len(strides)
    if not isinstance(storage, Storage) or not sized:
        raise ValueError("malformed pickle: a tensor without a storage, or with an invalid shape, offset or strides")
    last = offset + sum((side - 1) * stride for side, stride in zip(shape, strides, strict=True))
    # A tensor that is larger than its storage repeats numbers (stride 0). So a few bytes could ask for any amount of memory.
    if math.prod(shape) and max(last + 1, math.prod(shape)) > storage.count:
        raise ValueError(f"tensor of shape {shape}, strides {strides}, offset {offset} in a storage of {storage.count}")
    return Array(partial(_view, storage, offset, shape, strides))


def _view(storage: Storage, offset: int, shape: Sizes, strides: Sizes) -> Shaped[np.ndarray, "..."]:
    numbers, size = storage.numbers, storage.numbers.itemsize
    # The stride of a side of length 1 is not used, and files hold any number there.
    steps = [stride * size if side > 1 else 0 for side, stride in zip(shape, strides, strict=True)]
    return np.ndarray(shape, numbers.dtype, numbers if math.prod(shape) else None, offset * size, steps)


def latin1_bytes(text: Any, encoding: Any) -> bytes:
    """Replaces `_codecs.encode`, which protocol 2 calls for bytes."""
    if not isinstance(text, str) or not isinstance(encoding, str) or encoding != "latin1":
        raise ValueError("malformed pickle: a call of _codecs.encode other than for bytes")
    return text.encode("latin1")


def size(sides: Any = ()) -> tuple[int, ...]:
    """Replaces `torch.Size`."""
    if not are_sizes(sides):
        raise ValueError("malformed pickle: a torch.Size of anything but sizes")
    return tuple(sides)


FUNCTIONS: dict[str, Callable[..., Any] | None] = {
    "collections.OrderedDict": Dict,
    "_codecs.encode": latin1_bytes,
    "numpy.dtype": Dtype,
    "torch.Size": size,
    "torch.device": lambda *_: None,
    **dict.fromkeys(("__builtin__.bytes", "builtins.bytes"), lambda: b""),
    **dict.fromkeys(("torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2"), rebuild_tensor),
    **{f"torch._utils._rebuild_parameter{end}": lambda tensor, *_: tensor for end in ("", "_with_state")},
    **dict.fromkeys(("numpy.ndarray", *STORAGES, *(f"torch.{name}" for name in TORCH_DTYPES.split()))),
}
"""What a pickle may refer to, with the function called in its place; None: it is not called."""
for _core in ("core", "_core"):  # numpy 1, numpy 2
    FUNCTIONS[f"numpy.{_core}.multiarray._reconstruct"] = lambda *_: Array()
    FUNCTIONS[f"numpy.{_core}.multiarray.scalar"] = lambda dtype, buffer: numpy_array(buffer, dtype, (), "C")
    FUNCTIONS[f"numpy.{_core}.numeric._frombuffer"] = numpy_array


class Global(StandIn):
    """A name that the pickle refers to."""

    def __init__(self, name: str, charge: Callable[[Any], None]) -> None:
        self.name, self.charge = name, charge

    def __call__(self, *arguments: Any) -> Any:
        function = FUNCTIONS[self.name]
        if function is None:
            raise ValueError(f"malformed pickle: a call of {self.name}")
        self.charge(arguments)
        made = function(*arguments)
        if isinstance(made, Array):
            made.charge = self.charge
        return made


def scan(file: io.BytesIO) -> None:
    """Checks the opcodes of the pickle at the file's position, and leaves the position after it.

    Follows the unpickler's stack to find the keys of dicts: the hash of a nested tuple may never end, and that of a deep
    one overflows the C stack. Memo indices must be almost consecutive, since the unpickler allocates as many entries.
    """
    stack: list[bool] = []  # for each object: whether it may be a key
    marks: list[int] = []
    memo: dict[int, bool] = {}
    objects = len(file.getbuffer()) // 2 + 1000
    for opcode, argument, _ in pickletools.genops(file):
        name, operands = opcode.name, opcode.stack_before
        objects -= name in MEMOISED
        if objects < 0:
            raise ValueError("the pickle has more containers than data")
        if name in LITERALS:
            stack.append(not isinstance(argument, int) or abs(argument) < LARGEST_KEY)
        elif name in GETS:
            stack.append(memo[argument])
        elif name in PUTS:
            index = len(memo) if argument is None else argument
            if not 0 <= index <= len(memo) + 1000:
                raise ValueError(f"malformed pickle: memo index {index}")
            memo[index] = stack[-1]
        elif name == "MARK":
            marks.append(len(stack))
        elif name in OPCODES:
            items: list[bool] = []
            if pickletools.markobject in operands:
                operands = operands[: operands.index(pickletools.markobject)]
                items = stack[marks[-1] :]
                del stack[marks.pop() :]
            start = max(len(stack) - len(operands), 0)
            keys = {"SETITEM": stack[start + 1 : start + 2], "SETITEMS": items[::2], "DICT": items[::2]}.get(name, [])
            if not all(keys):
                raise ValueError("malformed pickle: a dict key that is neither text nor a number below 2^61")
            stack[start:] = [False] * len(opcode.stack_after)
        else:
            shown = name if argument is None else f"{name} {reprlib.repr(argument)}"
            raise ValueError(f"the pickle has the opcode {shown}, which weights do not need")
    if stack:
        raise ValueError("malformed pickle: objects are left on the stack")


class Unpickler(pickle.Unpickler):
    """Builder of containers, literals and stand-ins from a pickle that `scan` has checked."""

    def __init__(self, file: io.BytesIO, size: int, read: ReadStorage | None, big_endian: bool) -> None:
        super().__init__(file, fix_imports=False, encoding="latin1")
        self.budget = BUDGET * size + 100_000
        self.read_storage, self.big_endian = read, big_endian
        self.storages: dict[str, Storage] = {}
        self.globals: dict[str, Global] = {}

    def charge(self, arguments: Any) -> None:
        """Subtracts the memory that a call may take."""
        entries = sum(len(part) for part in arguments if isinstance(part, list | tuple | dict))
        copied = sum(len(part) for part in arguments if isinstance(part, str | bytes | bytearray))
        self.budget -= CALL + ENTRY * (len(arguments) + entries) + copied
        if self.budget < 0:
            raise ValueError("the pickle copies the same objects many times and would make far more than its size")

    def find_class(self, module: str, name: str) -> Global:
        full = f"{module}.{name}"
        if full not in FUNCTIONS:
            allowed = "only tensors, numpy arrays and containers are read"
            raise ValueError(f"refers to {quoted(full)}; {allowed} (nothing was executed); save the state dict alone")
        return self.globals.setdefault(full, Global(full, self.charge))

    def persistent_load(self, identity: Any) -> Storage:
        """Returns the storage of ("storage", type, key, device, count[, None]), the same for the same key."""
        if not isinstance(identity, tuple) or len(identity) not in (5, 6) or identity[0] != "storage":
            raise ValueError("malformed pickle: a persistent id that is not a storage")
        _, kind, key, _, count, *view = identity
        known = isinstance(kind, Global) and kind.name in STORAGES and isinstance(key, str) and are_sizes((count,))
        if not known or any(part is not None for part in view) or self.read_storage is None:
            raise ValueError("malformed pickle: a storage of invalid type, key or size, or a view (torch 0.3)")
        read, dtype = self.read_storage, STORAGES[kind.name]
        storage = self.storages.setdefault(key, Storage(dtype, count, self.big_endian, lambda: read(key)))
        if (storage.dtype, storage.count) != (dtype, count):
            raise ValueError(f"inconsistent types or sizes of storage {quoted(key)}")
        return storage


def unpickle(
    file: io.BytesIO, read: ReadStorage | None = None, big_endian: bool = False
) -> tuple[Any, dict[str, Storage]]:
    """Returns the object in the pickle at the file's position, with an `Array` for each array; and the storages by key.

    `file` is a BytesIO, which allocates nothing for an opcode with a wrong length; its position is left after the pickle.
    `read` returns the bytes of the storage with a key; None: there are no storages.
    """
    start = file.tell()
    try:
        with warnings.catch_warnings(action="ignore"):  # pickletools warns of a backslash in a damaged name
            scan(file)
            end = file.tell()
            file.seek(start)
            unpickler = Unpickler(file, end - start, read, big_endian)
            root = unpickler.load()
    except ERRORS as error:
        raise ValueError(f"malformed pickle: {type(error).__name__}: {error}") from error
    file.seek(end)
    return root, unpickler.storages
