"""Pickles as data: a pickle is a program for a small stack machine, and this one has no instruction that runs code.

`pickle.Unpickler` with a restricted `find_class` keeps foreign functions out, but not foreign instructions: a memo index
of four bytes makes it allocate 64 GB, BUILD sets attributes, and the hash of a nested tuple may take forever. Here the
standard library splits the file into instructions (`pickletools.genops`), and the few that weights need are carried out
on plain containers and on the stand-ins that the caller admits by name. Any other name ends the reading.
"""

import io
import pickletools
import reprlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

LITERALS = (
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
)
"""Instructions that push their argument. Python 2's byte strings come as latin-1 text, every byte a character."""
KEYS = (str, bytes, int, float, bool, type(None))
"""What a dict's key may be: whatever has a hash that takes no time."""
LARGEST_KEY = 2**61 - 1
"""Integers that are keys, and places in the memo, are smaller: Python hashes integers modulo this, so that larger ones can
be chosen to collide all."""
SIZED = (list, tuple, dict, str, bytes, bytearray)
PAID_PER_BYTE, FREE = 4, 1000
"""Items and bytes that calls and states may take, for each byte of the pickle and besides: weights take 2 for each."""


@dataclass(frozen=True)
class Global:
    """A name that the pickle mentions and that is admitted; it is never looked up in any module."""

    name: str


class StandIn:
    """Base of what the admitted names make in place of the objects of the pickle's own libraries."""

    def set_state(self, state: Any) -> None:
        """Take the state that the pickle holds apart from the object; ValueError where the object has none."""
        raise ValueError(f"gives a state to a {type(self).__name__}, which has none")


Admitted = Mapping[str, Callable[..., Any] | None]
"""Full name ("torch.Size") to the function to call in its place, or to None where it may be mentioned but not called."""


def ordered_dict(pairs: Any = ()) -> dict[Any, Any]:
    """In place of `collections.OrderedDict`."""
    return make_dict(part for pair in pairs for part in pair)


def encode(text: Any, encoding: Any) -> bytes:
    """In place of `_codecs.encode`, by which Python 3 writes bytes into pickles of protocol 2."""
    if not isinstance(text, str) or encoding != "latin1":
        raise TypeError("bytes that are no latin1 text")
    return text.encode(encoding)


def no_bytes() -> bytes:
    """In place of `bytes`, which such pickles call for empty ones."""
    return b""


CONTAINERS: Admitted = {
    "collections.OrderedDict": ordered_dict,
    "_codecs.encode": encode,
    "__builtin__.bytes": no_bytes,
    "builtins.bytes": no_bytes,
}


def unpickle(file: io.BytesIO, admitted: Admitted, persistent: Callable[[Any], Any] | None = None) -> Any:
    """The object of the pickle that starts at the file's position; the position is behind it afterwards.

    Args:
      file: a BytesIO, which reserves no memory for an instruction that lies about its length.
      admitted: names beyond containers that the pickle may mention.
      persistent: what a persistent id stands for; None: there are none.

    Raises ValueError with the reason: the first name that is not admitted, an instruction that weights do not need, or what
    is malformed. Attributes that a pickle sets on an OrderedDict (torch's `_metadata`) are passed over.
    """
    size = len(file.getbuffer()) - file.tell()
    machine = Machine(CONTAINERS | dict(admitted), persistent, PAID_PER_BYTE * size + FREE)
    try:
        with warnings.catch_warnings(action="ignore"):  # pickletools warns of a backslash in a damaged name
            for instruction, argument in instructions(file):
                machine.step(instruction, argument)
    except (AttributeError, IndexError, KeyError, OverflowError, TypeError) as error:
        # What the machine, and the stand-ins it calls, raise on too few or unfitting operands.
        raise ValueError(f"is no sound pickle: {type(error).__name__}: {error}") from error
    return machine.stack.pop()


def instructions(file: io.BytesIO) -> Iterator[tuple[str, Any]]:
    """Name and argument of each instruction, to STOP."""
    try:
        for opcode, argument, _ in pickletools.genops(file):
            yield opcode.name, argument
    except ValueError as error:
        raise ValueError(f"is a truncated or damaged pickle: {error}") from error


class Machine:
    """The stack, its marks and the memo, and what each instruction does to them."""

    def __init__(self, admitted: Admitted, persistent: Callable[[Any], Any] | None, budget: int) -> None:
        self.admitted = admitted
        self.budget = budget
        self.persistent = persistent
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def pop(self, count: int) -> list[Any]:
        """The `count` topmost objects, removed."""
        if count > len(self.stack):
            raise IndexError("too few objects on the stack")
        start = len(self.stack) - count
        popped = self.stack[start:]
        del self.stack[start:]
        return popped

    def pop_mark(self) -> list[Any]:
        """The objects above the last mark, removed with it."""
        return self.pop(max(len(self.stack) - self.marks.pop(), 0))

    def step(self, instruction: str, argument: Any) -> None:
        """Carry out one instruction, by the names and arguments of `pickletools`."""
        push = self.stack.append
        if instruction in LITERALS:
            push(argument)
            return
        match instruction:
            case "NONE":
                push(None)
            case "NEWTRUE":
                push(True)
            case "NEWFALSE":
                push(False)
            case "PROTO" | "FRAME":
                pass
            case "STOP":
                if len(self.stack) != 1:
                    raise IndexError(f"{len(self.stack)} objects on the stack at the end")
            case "MARK":
                self.marks.append(len(self.stack))
            case "POP":
                if self.marks and self.marks[-1] == len(self.stack):
                    self.marks.pop()
                else:
                    self.pop(1)
            case "POP_MARK":
                self.pop_mark()
            case "DUP":
                push(self.stack[-1])
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                if not 0 <= argument < LARGEST_KEY:
                    raise ValueError("has a place in the memo that no pickle needs")
                self.memo[argument] = self.stack[-1]
            case "MEMOIZE":
                self.memo[len(self.memo)] = self.stack[-1]
            case "GET" | "BINGET" | "LONG_BINGET":
                push(self.memo[argument])
            case "EMPTY_TUPLE":
                push(())
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                push(tuple(self.pop(int(instruction[-1]))))
            case "TUPLE":
                push(tuple(self.pop_mark()))
            case "EMPTY_LIST":
                push([])
            case "LIST":
                push(self.pop_mark())
            case "APPEND":
                extend(*self.pop(1), into=self.stack[-1])
            case "APPENDS":
                extend(*self.pop_mark(), into=self.stack[-1])
            case "EMPTY_DICT":
                push({})
            case "DICT":
                push(make_dict(self.pop_mark()))
            case "SETITEM":
                update(make_dict(self.pop(2)), into=self.stack[-1])
            case "SETITEMS":
                update(make_dict(self.pop_mark()), into=self.stack[-1])
            case "GLOBAL":
                push(self.look_up(*argument.split(" ", 1)))
            case "STACK_GLOBAL":
                push(self.look_up(*self.pop(2)))
            case "REDUCE":
                function, arguments = self.pop(2)
                push(self.call(function, arguments))
            case "BUILD":
                (state,) = self.pop(1)
                self.pay(state)
                if isinstance(self.stack[-1], StandIn):
                    self.stack[-1].set_state(state)
                elif not isinstance(self.stack[-1], dict):
                    raise TypeError(f"a {type(self.stack[-1]).__name__} takes no state")
            case "BINPERSID" if self.persistent is not None:
                (identity,) = self.pop(1)
                self.pay(identity)
                push(self.persistent(identity))
            case _:
                shown = instruction if argument is None else f"{instruction} {reprlib.repr(argument)}"
                raise ValueError(f"has the pickle instruction {shown}, which no weights need")

    def look_up(self, module: Any, name: Any) -> Global:
        """The name, if it is admitted."""
        if not isinstance(module, str) or not isinstance(name, str):
            raise TypeError("a name that is no text")
        full = f"{module}.{name}"
        if full not in self.admitted:
            raise ValueError(
                f"names {full[:100]!r}, but only tensors, numpy arrays and containers are read (nothing was executed): "
                "save the state dict alone"
            )
        return Global(full)

    def call(self, function: Any, arguments: Any) -> Any:
        """What the stand-in of an admitted function makes of its arguments."""
        stand_in = self.admitted[function.name] if isinstance(function, Global) else None
        if stand_in is None or not isinstance(arguments, tuple):
            what = function.name if isinstance(function, Global) else type(function).__name__
            raise ValueError(f"calls {what}, which is not called in any weights")
        self.pay(arguments)
        return stand_in(*arguments)

    def pay(self, taken: Any) -> None:
        """Takes off the budget what a call may copy: the items of its arguments, and theirs. ValueError where it is spent.

        All other instructions make a few bytes each. These may take the same large object, by a memo of two bytes, again
        and again.
        """
        parts = [taken] if isinstance(taken, SIZED) else []
        for _ in range(3):
            self.budget -= sum(map(len, parts))
            if self.budget < 0:
                raise ValueError(
                    "makes far more objects than its size accounts for, by copying some of them many times"
                )
            parts = [
                item for part in parts if isinstance(part, list | tuple) for item in part if isinstance(item, SIZED)
            ]


def make_dict(parts: Any) -> dict[Any, Any]:
    """{first: second, third: fourth, ...}"""
    parts = list(parts)
    if len(parts) % 2:
        raise ValueError("is no sound pickle: a dict has a key without a value")
    keys = parts[::2]
    for key in keys:
        if not isinstance(key, KEYS):
            raise ValueError(f"has a dict with a key of type {type(key).__name__}, where text or a number is expected")
        if isinstance(key, int) and abs(key) >= LARGEST_KEY:
            raise ValueError("has a dict with an integer of more than 60 bits as a key")
    return dict(zip(keys, parts[1::2], strict=True))


def extend(*items: Any, into: Any) -> None:
    """Append to a list, and to nothing else."""
    if not isinstance(into, list):
        raise TypeError(f"a {type(into).__name__} takes no items")
    into.extend(items)


def update(items: dict[Any, Any], into: Any) -> None:
    """Set items of a dict, and of nothing else."""
    if not isinstance(into, dict):
        raise TypeError(f"a {type(into).__name__} takes no items by key")
    into.update(items)
