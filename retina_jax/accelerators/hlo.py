"""Reads the text of a compiled program (scheduled HLO): what devices exchange, the cycles that the compiler estimates (TPU),
and the bytes that kernels read and write (GPU). Loops count with their trips."""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

BYTES = {
    **dict.fromkeys(("pred", "s8", "u8", "f8e4m3fn", "f8e5m2"), 1),
    **dict.fromkeys(("bf16", "f16", "s16", "u16"), 2),
    **dict.fromkeys(("f32", "s32", "u32"), 4),
    **dict.fromkeys(("f64", "s64", "u64", "c64"), 8),
}
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")
NO_KERNEL = {
    "parameter",
    "constant",
    "get-tuple-element",
    "tuple",
    "bitcast",
    "while",
    "call",
    "conditional",
    "after-all",
}
NO_KERNEL |= {f"{kind}-{end}" for kind in (*COLLECTIVES, "async", "copy") for end in ("done", "start", "update")}

PARTS = ("slice", "dynamic-slice", "gather")
"""Operations that read no more of their first operand than they return."""

_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_LINE = re.compile(r"^\s+(?:ROOT )?%([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")


@dataclass(frozen=True)
class Operation:
    """One line of a computation."""

    name: str
    kind: str  # fusion, all-reduce, while, ...
    result: int  # bytes of the result
    dtypes: tuple[str, ...]  # of the arrays of the result
    operands: tuple[str, ...]
    source: str  # the name scope of the traced function: jvp(RetinaNet)/class_head/...
    cycles: int  # the compiler's estimate; 0 if there is none
    fused: str = ""  # computation that a fusion runs as one kernel
    index: int = 0  # of a parameter
    calls: tuple[str, ...] = ()  # computations that run: the body and condition of a loop, branches
    trips: int | None = 1  # of a loop; None if the compiler does not know them


@dataclass(frozen=True)
class Program:
    """The operations of a compiled program by computation."""

    entry: str
    unknown_trips: int  # assumed for loops whose number of trips the compiler does not know
    computations: dict[str, list[Operation]] = field(repr=False)

    @cached_property
    def sizes(self) -> dict[str, int]:
        """Bytes of every result by name."""
        return {
            operation.name: operation.result for operations in self.computations.values() for operation in operations
        }

    def walk(self, computation: str = "", times: int = 1) -> Iterator[tuple[Operation, int]]:
        """Yields each operation that runs, with how often it does. The branches of a conditional all count."""
        for operation in self.computations.get(computation or self.entry, ()):
            yield operation, times
            for called in operation.calls:
                yield from self.walk(called, times * (operation.trips or self.unknown_trips))

    def collectives(self) -> dict[str, tuple[int, int]]:
        """Returns number and bytes of the exchanges between devices, by kind and dtype: {"all-reduce f32": (1, 12000)}."""
        found: dict[str, tuple[int, int]] = {}
        for operation, times in self.walk():
            kind = operation.kind.removesuffix("-start")
            if kind in COLLECTIVES:
                name = f"{kind} {'+'.join(sorted(set(operation.dtypes)))}"
                number, size = found.get(name, (0, 0))
                found[name] = number + times, size + times * operation.result
        return found

    def host_transfers(self) -> int:
        """Returns how many operations exchange data with the host."""
        return sum(operation.kind in ("infeed", "outfeed", "send", "recv") for operation, _ in self.walk())

    def cycles(self) -> int:
        """Returns the cycles that the compiler estimates; 0 if it does not (GPUs)."""
        return sum(operation.cycles * times for operation, times in self.walk())

    def kernels(self) -> tuple[Counter[str], Counter[str]]:
        """Returns numbers of kernels and the bytes that they read and write, by kind."""
        numbers, moved = Counter(), Counter()
        for operation, times in self.walk():
            if operation.kind not in NO_KERNEL:
                kind = self._kernel_kind(operation)
                numbers[kind] += times
                moved[kind] += times * self.moved(operation)
        return numbers, moved

    def _kernel_kind(self, operation: Operation) -> str:
        kinds = {operation.kind, *(inner.kind for inner in self.computations.get(operation.fused, ()))}
        if kinds & {"custom-call", "convolution", "dot"}:
            return "convolutions and products"
        if operation.kind in COLLECTIVES:
            return "collectives"
        if operation.kind in ("copy", "transpose") or "transpose" in operation.name:
            return "copies"
        return "reductions" if "reduce" in kinds else "elementwise"

    def moved(self, operation: Operation) -> int:
        """Returns the bytes that an operation reads and writes, if each operand is read once. Of an operand that is only
        sliced or gathered from, the parts count."""
        inside = self.computations.get(operation.fused, ())
        parameters = {inner.index: inner for inner in inside if inner.kind == "parameter"}
        read: Counter[str] = Counter()
        for index, operand in enumerate(operation.operands):
            if index in parameters:
                size = _read(parameters[index], inside)
            else:
                first_of_part = operation.kind in PARTS and index == 0
                size = operation.result if first_of_part else self.sizes.get(operand, 0)
            read[operand] = min(read[operand] + size, self.sizes.get(operand, 0))
        return operation.result + sum(read.values())

    def largest(self, number: int) -> list[tuple[str, int]]:
        """Returns the `number` places in the model with the most cycles (TPU) or bytes (GPU), most first."""
        totals: Counter[str] = Counter()
        by_cycles = self.cycles() > 0
        for operation, times in self.walk():
            if by_cycles or operation.kind not in NO_KERNEL:
                totals[_place(operation)] += times * (operation.cycles if by_cycles else self.moved(operation))
        return totals.most_common(number)


def parse(text: str, unknown_trips: int = 1) -> Program:
    """Parses `compiled.as_text()`."""
    computations: dict[str, list[Operation]] = {}
    constants: dict[str, int] = {}
    limits: dict[str, int] = {}  # by computation: n of its comparison i < n, the condition of a loop from 0
    entry = current = ""
    for line in text.splitlines():
        if (head := _HEAD.match(line)) and not line.startswith(" "):
            current = head[2]
            computations[current] = []
            entry = current if head[1] else entry
        elif current and (match := _LINE.match(line)):
            operation = _operation(*match.groups())
            computations[current].append(operation)
            if constant := re.match(r"(\d+)\)", match[4]) if operation.kind == "constant" else None:
                constants[operation.name] = int(constant[1])
            if operation.kind == "compare" and "direction=LT" in match[4] and line.lstrip().startswith("ROOT"):
                limits.update((current, constants[name]) for name in operation.operands if name in constants)
    for operations in computations.values():
        for place, operation in enumerate(operations):
            if operation.trips is None:
                trips = next((limits[called] for called in operation.calls if called in limits), None)
                operations[place] = replace(operation, trips=trips)
    return Program(entry, unknown_trips, computations)


def _operation(name: str, result: str, kind: str, rest: str) -> Operation:
    arguments = rest.split(", metadata=")[0].split("), ")[0]
    source = re.search(r'op_name="([^"]*)"', rest)
    cycles = re.search(r'"estimated_cycles":"(\d+)"', rest)
    trips = re.search(r'known_trip_count[^}]*"n":"(\d+)"', rest)
    calls: list[str] = []
    if kind in ("while", "call", "conditional", "async-start"):
        calls = re.findall(r"(?:body|condition|to_apply|calls|true_computation|false_computation)=%?([\w.\-]+)", rest)
        if branches := re.search(r"branch_computations=\{([^}]*)\}", rest):
            calls += re.findall(r"%?([\w.\-]+)", branches[1])
    arrays = _ARRAY.findall(result)
    fused = re.search(r" calls=%?([\w.\-]+)", rest) if kind == "fusion" else None
    return Operation(
        name=name,
        kind=kind,
        result=sum(_size(*array) for array in arrays),
        dtypes=tuple(dtype for dtype, _ in arrays),
        operands=tuple(re.findall(r"%([\w.\-]+)", arguments)),
        source=source[1] if source else "",
        cycles=int(cycles[1]) if cycles else 0,
        fused=fused[1] if fused else "",
        index=int(rest.split(")")[0]) if kind == "parameter" else 0,
        calls=tuple(calls),
        trips=int(trips[1]) if trips else None if kind == "while" else 1,
    )


def _read(value: Operation, computation: Sequence[Operation]) -> int:
    """Returns how many bytes of `value` a computation reads."""
    total, users = 0, [user for user in computation if value.name in user.operands]
    if not users:  # it is the result
        return value.result
    for user in users:
        part = user.kind in PARTS and user.operands[0] == value.name and value.name not in user.operands[1:]
        total += user.result if part else _read(user, computation) if user.kind == "bitcast" else value.result
    return min(total, value.result)


def _size(dtype: str, dimensions: str) -> int:
    number = BYTES.get(dtype, 0)
    for dimension in filter(None, dimensions.split(",")):
        number *= int(dimension)
    return number


def _place(operation: Operation) -> str:
    """Returns the pass and the module of an operation: backward class_head/conv0."""
    names = operation.source.split("/")
    backward = any(name.startswith("transpose(") for name in names)
    modules = [name for name in names if re.fullmatch(r"[a-z_]+\d*(_\w+)?", name)][:3]
    return f"{'backward' if backward else 'forward'} {'/'.join(modules) or operation.kind}"
