"""Runs tiles, compiled by Triton, on a machine without a GPU: a small emulator of PTX in NumPy.

The interpreter executes Triton's language, not the compiled code: layouts, shuffles within a warp,
shared memory, vectors of four numbers, bfloat16, the hardware's approximations. Here a launch
compiles for a GPU, and its PTX runs on tensors of the CPU:

    with emulated():                        # in a process without TRITON_INTERPRET
        tritonaff.affinity_field_loss(logits, target)

A warp of many programs at once is an array (programs, lanes). The warps of a program run one after
another from barrier to barrier, in a shuffled order: a race that a forgotten barrier leaves to
chance is likely to go wrong here. An address that is not aligned, or in no storage of the launch's
tensors, is an error, and so is an instruction that no kernel has used so far. The emulator checks
neither ptxas nor time.
"""

from __future__ import annotations

import ctypes
import itertools
import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import torch
import triton
from launches import driver_of
from numpy.typing import NDArray
from triton.runtime.jit import JITFunction

from tritonaff.ops import backend

Array = NDArray[Any]
Grid = tuple[int, int, int]
LANES = 32
# Programs that run side by side. A larger number is not faster, and needs more memory.
TOGETHER = 128
# Contents of a register before anything is written to it, by its size.
POISON = {1: False, 16: 0x7FC1, 32: 0x7FC0DEAD, 64: 0x7FF8DEADDEADDEAD}
END = 1 << 30
UNSIGNED = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}


class AccessError(AssertionError):
    """An address that is outside all storages of the launch's tensors, or not aligned."""


class Memory:
    """The storages of the tensors of a launch, and the shared memory of every program."""

    def __init__(self, tensors: list[torch.Tensor], programs: int, shared: int) -> None:
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        self.tensors = [
            (start, np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(start)))
            for start, size in storages.items()
            if size > 0
        ]
        self.size_of_shared = shared
        self.stride = (shared + 15) // 16 * 16
        self.shared = np.full(programs * self.stride, 0xAB, np.uint8)

    def find(
        self, space: str, address: Array, program: Array, size: int, what: str
    ) -> Iterator[tuple[Any, Array, Array]]:
        """Some of the addresses, the bytes of their storage, and their positions in these bytes."""
        if (address % size).any():
            raise AccessError(f"{what}: {address[address % size != 0][0]:#x} is not aligned")
        if space == "shared":
            if (address.astype(np.int64) + size > self.size_of_shared).any():
                raise AccessError(f"{what}: beyond the {self.size_of_shared} bytes of a program")
            yield slice(None), self.shared, program * self.stride + address
            return
        left = np.arange(len(address))
        for start, data in self.tensors:
            offset = (address[left] - np.uint64(start)).astype(np.int64)  # negative below
            inside = (offset >= 0) & (offset + size <= len(data))
            if inside.any():
                yield left[inside], data, offset[inside]
                left = left[~inside]
        if len(left) > 0:
            raise AccessError(f"{what}: {address[left[0]]:#x} is in no storage")


class Warp:
    """One warp of each of some programs."""

    def __init__(
        self, memory: Memory, first: int, count: int, grid: Grid, warp: int, registers: list[Array]
    ) -> None:
        self.memory = memory
        self.shape = count, LANES
        program = np.arange(first, first + count)[:, None]
        self.zero, self.zero64 = np.zeros((1, 1), np.uint32), np.zeros((1, 1), np.uint64)
        self.tid = np.arange(LANES, dtype=np.uint32)[None, :] + warp * LANES, self.zero, self.zero
        self.nctaid = [np.full((1, 1), size, np.uint32) for size in grid]
        along = program % grid[0], program // grid[0] % grid[1], program // (grid[0] * grid[1])
        self.ctaid = [index.astype(np.uint32) for index in along]
        self.program = program - first
        self.registers = registers
        self.place = np.zeros(self.shape, np.int64)  # the next piece of every thread

    def all_of(self, value: Array) -> Array:
        return np.broadcast_to(value, self.shape)

    def active(self, mask: Array | None) -> Array:
        return self.all_of(np.True_ if mask is None else mask)

    def some_of(
        self, space: str, address: Array, mask: Array | None, size: int, what: str
    ) -> Iterator[tuple[Array, Any, Array, Array]]:
        """Some active threads, and the memory that they access."""
        active = self.active(mask)
        at, program = self.all_of(address)[active], self.all_of(self.program)[active]
        for some, data, offset in self.memory.find(space, at, program, size, what):
            yield active, some, data, offset

    def load(
        self,
        space: str,
        address: Array,
        mask: Array | None,
        dtype: Any,
        old: list[Array],
        what: str,
    ) -> list[Array]:
        size = np.dtype(dtype).itemsize
        results = [self.all_of(value).copy() for value in old]
        for active, some, data, offset in self.some_of(space, address, mask, size * len(old), what):
            for i, result in enumerate(results):
                of_active = result[active]
                loaded = elements(data, dtype)[offset // size + i]
                of_active[some] = loaded.astype(result.dtype)  # with its sign
                result[active] = of_active
        return results

    def store(
        self, space: str, address: Array, values: list[Array], mask: Array | None, dtype: Any,
        what: str,
    ) -> None:  # fmt: skip
        size = np.dtype(dtype).itemsize
        for active, some, data, offset in self.some_of(
            space, address, mask, size * len(values), what
        ):
            for i, value in enumerate(values):
                stored = self.all_of(value)[active][some].astype(dtype)
                elements(data, dtype)[offset // size + i] = stored

    def add(self, address: Array, value: Array, mask: Array | None, what: str) -> None:
        size = value.dtype.itemsize
        for active, some, data, offset in self.some_of("global", address, mask, size, what):
            added = self.all_of(value)[active][some]
            np.add.at(elements(data, value.dtype), offset // size, added)

    def copy_async(
        self, to: Array, source: Array, size: int, given: Array, mask: Array | None, what: str
    ) -> None:
        """Copies at once; missing bytes are 0."""
        if ((given > 0) & (given < size)).any():
            raise NotImplementedError(what)
        zeros = [self.zero] * (size // 4)
        wanted = (given > 0) if mask is None else mask & (given > 0)
        values = self.load("global", source, wanted, np.uint32, zeros, what)
        self.store("shared", to, values, mask, np.uint32, what)

    def numbers_of_matrix(
        self, address: Array, i: int, trans: bool, mask: Array | None, what: str
    ) -> Iterator[Array]:
        """Addresses of the two 16-bit numbers of each lane in the i-th matrix (8, 8). The lanes
        from 8 i on hold the addresses of its rows.
        """
        lane = np.arange(LANES)
        rows = np.where(self.active(mask), address, 0)[:, 8 * i : 8 * i + 8]
        if (rows % 16).any():
            raise AccessError(f"{what}: a row is not aligned")
        for half in range(2):
            row, column = lane // 4, 2 * (lane % 4) + half
            row, column = (column, row) if trans else (row, column)
            yield self.all_of(address)[:, 8 * i + row] + 2 * column.astype(np.uint32)

    def load_matrix(
        self, address: Array, i: int, trans: bool, mask: Array | None, what: str
    ) -> Array:
        low, high = (
            self.load("shared", at, mask, np.uint16, [self.zero], what)[0]
            for at in self.numbers_of_matrix(address, i, trans, mask, what)
        )
        return low | high << 16

    def store_matrix(
        self, address: Array, i: int, trans: bool, value: Array, mask: Array | None, what: str
    ) -> None:
        for half, at in enumerate(self.numbers_of_matrix(address, i, trans, mask, what)):
            self.store("shared", at, [value >> 16 * half], mask, np.uint16, what)

    def shuffle(self, mode: str, value: Array, b: Array, c: Array) -> Array:
        """From the lane given by b, if this lane is in the part of the warp given by c."""
        lane = np.arange(LANES)
        part, clamp = (c >> 8 & 31).astype(np.int64), (c & 31).astype(np.int64)
        by, first = b.astype(np.int64) & 31, lane & part
        last = first | (clamp & ~part)
        source = {"bfly": lane ^ by, "idx": first | (by & ~part), "up": lane - by}[mode]
        there = source >= last if mode == "up" else source <= last
        source = self.all_of(np.where(there, source, lane))
        return np.take_along_axis(self.all_of(value), source, axis=1)

    def reduce(self, operation: Any, value: Array) -> Array:
        return operation.reduce(self.all_of(value), axis=1, keepdims=True, dtype=value.dtype)


def elements(data: Array, dtype: Any) -> Array:
    size = np.dtype(dtype).itemsize
    return data[: len(data) // size * size].view(dtype)


# Arithmetic


def up_or_down(value: Array, error: float) -> Array:
    """The largest error of the hardware; the last digit decides the sign."""
    return np.where(value.astype(np.float32).view(np.uint32) & 1, error, -error)


def off_by(value: Array, relative: float) -> Array:
    off = value * (1 + up_or_down(value, relative))
    return np.where(value == 1, value, off).astype(np.float32)  # 2 to the power of 0 is 1 exactly


def flush(value: Array) -> Array:
    """Numbers below the smallest normal one are 0."""
    return np.where(np.abs(value) < np.float32(2.0**-126), np.copysign(np.float32(0), value), value)


def logarithm(value: Array) -> Array:
    """The error is absolute between 0.5 and 2, relative elsewhere."""
    exact = np.log2(value)
    error = up_or_down(exact, 2.0**-22)
    near = (value > 0.5) & (value < 2)
    return np.where(near, exact + error, exact * (1 + error)).astype(np.float32)


def fma(a: Array, b: Array, c: Array) -> Array:
    """Rounded once, or nearly so: of float32 in float64."""
    return (a.astype(np.float64) * b + c).astype(a.dtype)


def to_bfloat16(value: Array) -> Array:
    bits = value.view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return np.where(np.isnan(value), 0x7FFF, rounded).astype(np.uint16)


def from_bfloat16(value: Array) -> Array:
    return (value.astype(np.uint32) << 16).view(np.float32)


def to_int(value: Array, dtype: Any) -> Array:
    """Rounds towards 0 and clamps. NaN becomes 0, and with 64 bits the highest number."""
    info, value = np.iinfo(dtype), np.trunc(value.astype(np.float64))
    inside = (value > float(info.min)) & (value < float(info.max))
    clamped = np.where(value > 0, dtype(info.max), dtype(info.min))
    no_number = np.uint64(1 << 63 if info.bits == 64 else 0).astype(dtype)
    clamped = np.where(np.isnan(value), no_number, clamped)
    return np.where(inside, np.where(inside, value, 0).astype(dtype), clamped)


def quotient(a: Array, b: Array) -> Array:
    """Towards 0."""
    b = np.where(b == 0, 1, b)
    if a.dtype.kind == "u":
        return a // b
    result = np.abs(a) // np.abs(b)
    return np.where((a < 0) != (b < 0), -result, result).astype(a.dtype)


def shift_left(a: Array, by: Array) -> Array:
    """A shift by the size of a number, or by more, gives 0."""
    size = 8 * a.itemsize
    return np.where(by < size, a << np.minimum(by, size - 1).astype(a.dtype), 0).astype(a.dtype)


def shift_right(a: Array, by: Array) -> Array:
    """With the sign, if the type has one."""
    size = 8 * a.itemsize
    shifted = a >> np.minimum(by, size - 1).astype(a.dtype)
    return np.where((by < size) | (a.dtype.kind == "i"), shifted, 0).astype(a.dtype)


def pair(low: Array, high: Array) -> Array:
    return low.astype(np.uint64) | high.astype(np.uint64) << 32


def halves(operation: Any, dtype: Any, a: Array, b: Array) -> Array:
    """The operation on both 16-bit halves of 32-bit numbers."""
    a, b = (np.ascontiguousarray(x).view(dtype) for x in np.broadcast_arrays(a, b))
    return operation(a, b).view(np.uint32)


def extract(a: Array, position: Array, length: Array) -> Array:
    """bfe"""
    wide = a.astype(np.int64) >> (position & 255).astype(np.int64)
    length = np.minimum(length & 255, 32).astype(np.int64)
    wide &= (1 << length) - 1
    if a.dtype.kind == "i":
        wide = np.where(wide >> np.maximum(length - 1, 0) & 1, wide - (1 << length), wide)
    return wide.astype(a.dtype)


def permute(a: Array, b: Array, selector: Array) -> Array:
    """prmt, without its modes"""
    both = pair(a, b)
    result = np.zeros(np.broadcast_shapes(a.shape, b.shape, selector.shape), np.uint64)
    for i in range(4):
        nibble = (selector >> 4 * i & 15).astype(np.uint64)
        byte = both >> 8 * (nibble & 7) & 255
        result |= (
            np.where(nibble > 7, np.where(byte > 127, 255, 0), byte).astype(np.uint64) << 8 * i
        )
    return result.astype(np.uint32)


TYPES: dict[str, Any] = {
    **{f"{kind}{8 * size}": np.dtype(f"{code}{size}").type
       for kind, code in (("s", "i"), ("u", "u"), ("b", "u")) for size in (1, 2, 4, 8)},
    "f16": np.float16, "f32": np.float32, "f64": np.float64, "bf16": np.uint16, "pred": np.bool_,
}  # fmt: skip
WIDER = {"s16": "s32", "u16": "u32", "s32": "s64", "u32": "u64"}
COMPARE = {
    "eq": "{0} == {1}", "ne": "({0} < {1}) | ({0} > {1})", "lt": "{0} < {1}", "le": "{0} <= {1}",
    "gt": "{0} > {1}", "ge": "{0} >= {1}", "neu": "{0} != {1}", "ltu": "~({0} >= {1})",
    "leu": "~({0} > {1})", "gtu": "~({0} <= {1})", "geu": "~({0} < {1})",
    "num": "({0} == {0}) & ({1} == {1})", "nan": "({0} != {0}) | ({1} != {1})",
}  # fmt: skip
# Results of instructions, by the name without type and modes; {type} is NumPy's.
# Approximations have the largest errors that NVIDIA's PTX ISA allows.
RESULTS = {
    "add": "{0} + {1}", "sub": "{0} - {1}", "mul": "{0} * {1}", "mul.lo": "{0} * {1}",
    "div": "quotient({0}, {1})", "rem": "{0} - quotient({0}, {1}) * {1}",
    "div.full": "off_by({0} / {1}, 2.0**-22)", "div.rn": "{0} / {1}",
    "mul.wide": "{0}.astype({wide}) * {1}.astype({wide})",
    "mul.hi": "({0}.astype({wide}) * {1}.astype({wide}) >> 8 * {0}.itemsize).astype({type})",
    "mad.lo": "{0} * {1} + {2}", "mad.wide": "{0}.astype({wide}) * {1}.astype({wide}) + {2}",
    "fma": "fma({0}, {1}, {2})",
    "and": "{0} & {1}", "or": "{0} | {1}", "xor": "{0} ^ {1}", "not": "~{0}", "neg": "-{0}",
    "abs": "np.abs({0})", "shl": "shift_left({0}, {1})", "shr": "shift_right({0}, {1})",
    "shf.l": "(pair({0}, {1}) << ({2} & 31) >> 32).astype({type})",
    "shf.r": "(pair({0}, {1}) >> ({2} & 31)).astype({type})",
    "bfe": "extract({0}, {1}, {2})", "prmt": "permute({0}, {1}, {2})",
    "min": "np.minimum({0}, {1})", "max": "np.maximum({0}, {1})",
    "min.NaN": "np.minimum({0}, {1})", "max.NaN": "np.maximum({0}, {1})",
    "min.number": "np.fmin({0}, {1})", "max.number": "np.fmax({0}, {1})",  # of float, by default
    "popc": "np.bitwise_count({0})",
    "selp": "np.where({2}, {0}, {1})",
    "ex2.approx": "off_by(np.exp2({0}), 2.0**-22)",
    "lg2.approx": "logarithm({0})",
    "rsqrt.approx": "off_by(1 / np.sqrt({0}), 2.0**-22.9)",
    "sqrt.approx": "off_by(np.sqrt({0}), 2.0**-23)",
    "redux.add": "W.reduce(np.add, {0})",
    "redux.min": "W.reduce(np.minimum, {0})",
    "redux.max": "W.reduce(np.maximum, {0})",
    "shfl.bfly": "W.shuffle('bfly', {0}, {1}, {2})",
    "shfl.up": "W.shuffle('up', {0}, {1}, {2})",
    "shfl.idx": "W.shuffle('idx', {0}, {1}, {2})",
}  # fmt: skip
# Modes without an effect here, and modes with the same effect on all instructions.
MODES = {"rn", "ftz", "sync", "wrap"}


# From PTX to Python


class Kernel:
    """PTX as Python functions, one for every straight piece between jumps and barriers. Registers
    are arrays (programs, lanes) of unsigned numbers; either axis may have length 1.
    """

    def __init__(self, ptx: str) -> None:
        entry = re.search(r"\.entry\s+\w+\s*\((.*?)\).*?^\{(.*?)^\}", ptx, re.S | re.M)
        assert entry is not None
        parameters = re.findall(r"\.param\s+\.(\w+)[^,]*?(\w+)\s*(?:,|$)", entry[1].strip())
        self.parameter_types = [kind for kind, _ in parameters]
        self.parameters = [name for _, name in parameters]
        body = re.sub(r"//[^\n]*|^\s*\.(loc|file|section|pragma)\b[^\n]*", "", entry[2], flags=re.M)
        self.bits: dict[str, int] = {}
        for kind, name, many in re.findall(r"\.reg\s+\.(\w+)\s+%?(\w+)(?:<(\d+)>)?", body):
            names = [f"{name}{i}" for i in range(int(many))] if many else [name]
            self.bits |= dict.fromkeys(names, 1 if kind == "pred" else int(kind[1:]))
        self.index = {name: i for i, name in enumerate(self.bits)}
        self.scope = dict(globals())  # names that the functions find: ours, and constants
        body = re.sub(r"\.reg[^;]*;|^\s*[{}]\s*$", "", body, flags=re.M)  # and braces around them
        pieces: list[list[str]] = [[]]
        labels: dict[str, int] = {}
        for statement in body.split(";"):
            text = " ".join(statement.split())
            while label := re.match(r"(\$\w+): ?", text):
                pieces += [[]] if pieces[-1] else []
                labels[label[1]] = len(pieces) - 1
                text = text[label.end() :]
            if text:
                pieces[-1].append(text)
                pieces += [[]] if re.search(r"\b(bra|ret|bar\.sync)\b", text) else []
        self.pieces = [self._function(i, texts, labels) for i, texts in enumerate(pieces)]

    def _function(
        self, number: int, texts: list[str], labels: dict[str, int]
    ) -> Callable[..., Any]:
        """Returns the next piece of the threads, or two pieces and a condition; and True if the
        threads wait before the piece.
        """
        self.read: dict[str, None] = {}
        self.written: dict[str, None] = {}
        lines, goto, waits = [], f"{number + 1}", False
        for text in texts:
            self.condition, mask = "", "mask"
            if predicate := re.match(r"@(!?)(%\w+) ", text):
                text = text[predicate.end() :]
                self.condition = predicate[1].replace("!", "~") + self.operand(predicate[2], "pred")
                mask = f"({self.condition} if mask is None else mask & {self.condition})"
            name, _, rest = text.partition(" ")
            if name.startswith("bra") or name == "ret":
                target = labels[rest] if name != "ret" else END
                goto = f"{target}"
                if self.condition:
                    goto = f"({self.condition}, {target}, {number + 1})"
            elif name == "bar.sync":
                waits = True
            elif name == "bar.warp.sync":
                pass  # lanes run side by side
            else:
                operands = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s][^,]*", rest)
                lines += self.instruction(name, [o.strip() for o in operands], mask, repr(text))
        load = [f"{r} = W.registers[{self.index[r]}]" for r in self.read]
        save = [f"W.registers[{self.index[r]}] = {r}" for r in self.written]
        merge = [
            f"W.registers[{self.index[r]}] = np.where(mask, {r}, W.registers[{self.index[r]}])"
            for r in self.written
        ]
        code = [*load, *lines, "if mask is None:", *(f"    {line}" for line in [*save, "pass"])]
        code += ["else:", *(f"    {line}" for line in [*merge, "pass"]), f"return {goto}, {waits}"]
        source = f"def piece_{number}(W, P, mask):\n" + "\n".join(f"    {line}" for line in code)
        exec(compile(source, f"<piece {number}>", "exec"), self.scope)
        function: Callable[..., Any] = self.scope[f"piece_{number}"]
        return function

    def constant(self, value: Any, kind: str) -> str:
        name = f"K{len(self.scope)}"
        self.scope[name] = np.array([[value]]).astype(TYPES[kind])
        return name

    def operand(self, text: str, kind: str) -> str:
        """An expression for the operand that an instruction of this type reads."""
        if special := re.fullmatch(r"%(tid|ctaid|nctaid)\.([xyz])", text):
            return f"W.{special[1]}[{'xyz'.index(special[2])}]"
        name = text.removeprefix("%")
        if name in self.bits:
            if name not in self.written:
                self.read[name] = None
            if kind == "pred":
                return name
            bits = 8 * np.dtype(TYPES[kind]).itemsize
            if bits != self.bits[name]:
                name = f"{name}.astype(np.uint{bits})"
            if kind == "bf16":
                return f"from_bfloat16({name})"
            return name if kind[0] in "ub" else f"{name}.view({numpy_type(kind)})"
        if text.startswith(("0f", "0d")):
            bits = np.array(int(text[2:], 16), np.uint32 if text[1] == "f" else np.uint64)
            number = bits.view(np.float32 if text[1] == "f" else np.float64)
            return self.constant(number if kind[0] == "f" else bits, kind)
        if re.fullmatch(r"-?(0x[0-9A-Fa-f]+|\d+)U?", text):
            size = 64 if kind == "pred" else 8 * np.dtype(TYPES[kind]).itemsize
            return self.constant(np.uint64(int(text.rstrip("U"), 0) % (1 << size)), kind)
        if text == "global_smem":  # where shared memory begins
            return self.constant(0, kind)
        raise NotImplementedError(f"operand {text}")

    def address(self, text: str) -> str:
        base, offset = re.fullmatch(r"\[ ?([%\w]+) ?\+? ?(-?\d+)? ?\]", text).groups()  # type: ignore[union-attr]
        kind = "u64" if self.bits.get(base.removeprefix("%")) == 64 else "u32"
        code = self.operand(base, kind)
        return f"({code} + {self.operand(offset, kind)})" if offset and int(offset) else code

    def assign(self, register: str, value: str) -> list[str]:
        """The value as the bits of a register."""
        name = register.removeprefix("%")
        if name == "_":
            return []
        if self.bits[name] > 1:
            value = f"as_unsigned({value}, np.uint{self.bits[name]})"
        if self.condition:
            value = f"np.where({self.condition}, {value}, {self.old([name])[1:-1]})"
        self.written[name] = None
        return [f"{name} = {value}"]

    def old(self, names: list[str]) -> str:
        names = [name.removeprefix("%") for name in names]
        self.read |= dict.fromkeys(name for name in names if name not in self.written)
        return f"[{', '.join(names)}]"

    def instruction(self, name: str, o: list[str], mask: str, what: str) -> list[str]:
        head, *parts = name.split(".")
        kind = parts[-1]
        if head in ("ld", "st", "ldmatrix", "stmatrix", "red", "atom", "cp"):
            return self.memory(head, parts, o, mask, what)
        if head == "mov":
            return self.move(o, kind)
        if head == "setp" and len(parts) == 2 and kind in ("f16x2", "bf16x2"):
            return self.compare_halves(COMPARE[parts[0]], kind, o)
        if head == "setp" and len(parts) == 2:
            return self.assign(
                o[0], COMPARE[parts[0]].format(*(self.operand(x, kind) for x in o[1:]))
            )
        if head == "cvt":
            return self.convert(parts, o)
        modes = [p for p in parts[:-1] if p not in MODES or f"{head}.{p}" in RESULTS]
        if head in ("min", "max") and kind[0] in "fb" and not modes:
            modes = ["number"]
        form = RESULTS.get(".".join([head, *modes]), "{wide}")
        not_wider = "{wide}" in form and kind not in WIDER
        if not_wider or (head == "bfe" and kind.endswith("64")) or "|" in o[0]:
            raise NotImplementedError(name)
        if kind in ("s16x2", "u16x2"):
            half, pairs = numpy_type(kind[:-2]), ", ".join(self.operand(x, "b32") for x in o[1:])
            return self.assign(
                o[0], f"halves(lambda a, b: {form.format('a', 'b')}, {half}, {pairs})"
            )
        kinds = [kind] * 3
        if head in ("shl", "shr", "bfe"):  # by how much
            kinds[1:] = ["u32"] * 2
        if head == "mad" and modes == ["wide"]:
            kinds[2] = WIDER[kind]
        if head == "selp":
            kinds[2] = "pred"
        values = [self.operand(x, k) for x, k in zip(o[1:], kinds, strict=False)]
        if "ftz" in parts:
            values = [f"flush({value})" for value in values]
        wide = numpy_type(WIDER.get(kind, kind))
        value = form.format(*values, type=numpy_type(kind), wide=wide)
        if kind == "bf16":  # its operands are float32
            value = f"to_bfloat16({value})"
        return self.assign(o[0], f"flush({value})" if "ftz" in parts else value)

    def compare_halves(self, form: str, kind: str, o: list[str]) -> list[str]:
        """Compares the low halves of two registers, then the high ones: a predicate for each."""
        number = "from_bfloat16({})" if kind == "bf16x2" else "{}.view(np.float16)"
        lines = []
        for predicate, shift in zip(o[0].split("|"), (0, 16), strict=True):
            halves = (f"({self.operand(x, 'u32')} >> {shift}).astype(np.uint16)" for x in o[1:])
            lines += self.assign(predicate, form.format(*(number.format(x) for x in halves)))
        return lines

    def move(self, o: list[str], kind: str) -> list[str]:
        """Moves; some take a register apart or put one together."""
        if o[0][0] != "{" and o[1][0] != "{":
            return self.assign(o[0], self.operand(o[1], kind))
        size = 8 * np.dtype(TYPES[kind]).itemsize
        names = names_in(o[0] if o[0][0] == "{" else o[1])
        part = size // len(names)
        if o[0][0] == "{":
            whole = self.operand(o[1], f"u{size}")
            return [
                line
                for i, name in enumerate(names)
                for line in self.assign(name, f"({whole} >> {part * i}).astype(np.uint{part})")
            ]
        terms = [
            f"{self.operand(name, f'u{part}')}.astype(np.uint{size}) << {part * i}"
            for i, name in enumerate(names)
        ]
        return self.assign(o[0], " | ".join(f"({term})" for term in terms))

    def convert(self, parts: list[str], o: list[str]) -> list[str]:
        *rounding, to, source = parts
        to_integer = source[0] == "f" and to[0] in "su"
        if rounding not in ([["rzi"]] if to_integer else [[], ["rn"]]):
            raise NotImplementedError(".".join(parts))
        values = [self.operand(x, source) for x in o[1:]]
        if to in ("bf16x2", "f16x2"):
            half = "to_bfloat16({})" if to == "bf16x2" else "{}.astype(np.float16).view(np.uint16)"
            high, low = (half.format(value) for value in values)
            return self.assign(o[0], f"{high}.astype(np.uint32) << 16 | {low}")
        if to_integer:
            return self.assign(o[0], f"to_int({values[0]}, {numpy_type(to)})")
        if to == "bf16":
            return self.assign(o[0], f"to_bfloat16({values[0]})")
        return self.assign(o[0], f"{values[0]}.astype({numpy_type(to)})")

    def memory(self, head: str, parts: list[str], o: list[str], mask: str, what: str) -> list[str]:
        space, kind = parts[0].partition("::")[0], parts[-1]
        if head == "ld" and space == "param":
            value = f"P[{self.parameters.index(o[1].strip('[]'))}]"
            return self.assign(o[0], f"{value}.view({numpy_type(kind)})")  # with its sign
        if head == "cp":
            if "global" not in parts:
                return []  # waits for copies, which are made at once
            given = self.operand(o[-1], "u32")
            to, source = self.address(o[0]), self.address(o[1])
            return [f"W.copy_async({to}, {source}, {int(o[2], 0)}, {given}, {mask}, {what})"]
        if head in ("red", "atom"):
            # The result of an atomic addition is right if every lane has its own address.
            address, value = self.address(o[-2]), self.operand(o[-1], kind)
            add = f"W.add({address}, {value}, {mask}, {what})"
            old = f"W.load('global', {address}, {mask}, {numpy_type(kind)}, [W.zero64], {what})[0]"
            if "add" not in parts or kind.startswith("bf16"):
                raise NotImplementedError(what)
            return [add] if head == "red" else [*self.assign(o[0], old), add]
        loads = head.startswith("ld")
        names, address = names_in(o[not loads]), self.address(o[loads])
        if head in ("ldmatrix", "stmatrix"):
            trans = "trans" in parts
            lines = []
            for i, name in enumerate(names):
                if loads:
                    value = f"W.load_matrix({address}, {i}, {trans}, {mask}, {what})"
                    lines += self.assign(name, value)
                else:
                    value = self.operand(name, "u32")
                    lines.append(
                        f"W.store_matrix({address}, {i}, {trans}, {value}, {mask}, {what})"
                    )
            return lines
        if loads:
            old = self.old(names)
            self.written |= dict.fromkeys(name.removeprefix("%") for name in names)
            return [
                f"{old} = W.load({space!r}, {address}, {mask}, {numpy_type(kind)}, {old}, {what})"
            ]
        values = ", ".join(self.operand(name, kind) for name in names)
        return [f"W.store({space!r}, {address}, [{values}], {mask}, {numpy_type(kind)}, {what})"]

    def run(
        self, values: list[Any], tensors: list[torch.Tensor], grid: Grid, warps: int, shared: int
    ) -> None:
        parameters = []
        # After the kernel's parameters come Triton's own: scratch memory, which no kernel has.
        for kind, value in itertools.zip_longest(self.parameter_types, values, fillvalue=0):
            if kind[0] != "f":
                value = np.uint64(value % (1 << 64))
            array = np.array([[value]]).astype(TYPES[kind])
            parameters.append(array.view(UNSIGNED[8 * array.itemsize]))
        programs = math.prod(grid)
        random = np.random.default_rng(0)
        with np.errstate(all="ignore"):
            for first in range(0, programs, TOGETHER):
                count = min(TOGETHER, programs - first)
                memory = Memory(tensors, count, shared)
                each = [
                    Warp(memory, first, count, grid, warp, self.new_registers())
                    for warp in range(warps)
                ]
                while any((warp.place != END).any() for warp in each):
                    for i in random.permutation(warps):
                        self.run_to_barrier(each[i], parameters)

    def new_registers(self) -> list[Array]:
        dtypes = {1: np.bool_, **UNSIGNED}
        return [np.full((1, 1), POISON[bits], dtypes[bits]) for bits in self.bits.values()]

    def run_to_barrier(self, warp: Warp, parameters: list[Array]) -> None:
        """The threads that are behind go first: loops wait for these threads."""
        waiting = warp.place == END
        while not waiting.all():
            number = int(warp.place[~waiting].min())
            active = (warp.place == number) & ~waiting
            mask = None if active.all() else active
            goto, waits = self.pieces[number](warp, parameters, mask)
            if isinstance(goto, tuple):
                goto = np.where(*goto)
            warp.place = np.where(active, goto, warp.place)
            waiting = waiting | active if waits else waiting | (warp.place == END)


def names_in(text: str) -> list[str]:
    return [name.strip() for name in text.strip("{} ").split(",")]


def numpy_type(kind: str) -> str:
    return f"np.{np.dtype(TYPES[kind]).name}"


def as_unsigned(value: Array, dtype: Any) -> Array:
    """A result as the bits of a register; integers of another size are extended or cut."""
    if value.dtype.itemsize != np.dtype(dtype).itemsize:
        if value.dtype.kind == "f":
            raise NotImplementedError(f"{value.dtype} in a register of {8 * dtype().itemsize} bits")
        return value.astype(dtype)
    return value if value.dtype == dtype else value.view(dtype)


# In place of a GPU


compile_or_launch = JITFunction.run
kernels: dict[int, tuple[Any, Kernel]] = {}


def launch(function: JITFunction[Any], *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
    compiled = compile_or_launch(function, *args, grid=grid, warmup=True, **options)
    if id(compiled) not in kernels:
        kernels[id(compiled)] = compiled, Kernel(compiled.asm["ptx"])
    _, kernel = kernels[id(compiled)]
    given = dict(zip(function.arg_names, args, strict=False)) | options
    values = [given[name] for name, kind in compiled.src.signature.items() if kind != "constexpr"]
    tensors = [value for value in values if isinstance(value, torch.Tensor)]
    values = [v.data_ptr() if isinstance(v, torch.Tensor) else v for v in values]
    sizes: Grid = (*grid, 1, 1)[:3]
    kernel.run(values, tensors, sizes, compiled.metadata.num_warps, compiled.metadata.shared)


@contextmanager
def emulated() -> Iterator[None]:
    """Inside this context, tiles take tensors of the CPU, and their compiled code is emulated."""
    if triton.knobs.runtime.interpret:
        raise RuntimeError("unset TRITON_INTERPRET: Triton has chosen its interpreter")
    with (
        driver_of("sm_90"),
        mock.patch.object(JITFunction, "run", launch),
        mock.patch.object(backend, "triton_obstacle", return_value=None),
    ):
        yield
