"""Native kernels compiled for another processor: parity on small inputs, in an emulator.

A program for aarch64 holds the kernels of an operation. Launchers run here as always; instead of a
library they get one whose functions send all memory that a call may read or write to the program,
and copy the program's memory back.
"""

import ctypes
import importlib
import shutil
import struct
import subprocess

import pytest
import torch

from tritonaff.native import library
from tritonaff.testing import CASES, check_parity

COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
NEEDED = [name for name in (COMPILER, EMULATOR) if shutil.which(name) is None]

# Pointers and integers are passed in registers of one kind and on the stack, floating-point numbers
# in registers of another kind, whatever their order: one call fits all functions.
PROGRAM = """
#include <cstdint>
#include <cstdio>
#include <vector>

extern "C" { %(declarations)s }

int64_t integer() { int64_t x; fread(&x, 8, 1, stdin); return x; }
double number() { double x; fread(&x, 8, 1, stdin); return x; }

int main() {
    void* functions[] = { %(names)s };
    auto function = (void (*)(%(types)s))functions[integer()];
    std::vector<std::vector<char>> memory(integer());
    for (auto& part : memory) {
        part.resize(integer());
        fread(part.data(), 1, part.size(), stdin);
    }
    auto address = [&] {
        char* start = memory[integer()].data();
        return int64_t(start + integer());
    };
    for (int64_t i = integer(); i > 0; i--) {
        int64_t at = address();
        *(int64_t*)at = address();
    }
    int64_t x[20] = {};
    double y[8] = {};
    for (int64_t n = integer(), i = 0; i < n; i++) x[i] = integer() ? address() : integer();
    for (int64_t n = integer(), i = 0; i < n; i++) y[i] = number();
    function(%(arguments)s);
    for (auto& part : memory) fwrite(part.data(), 1, part.size(), stdout);
}
"""


class Far:
    """The functions of a program, as ctypes.CDLL has them."""

    def __init__(self, program, names):
        self.program, self.names = program, names
        self.kept = []

    def __getattr__(self, name):
        return lambda *arguments: self.call(name, arguments)

    def record(self, function):
        """The same function, whose arguments and results stay alive until the next call."""

        def recorded(*arguments):
            result = function(*arguments)
            self.kept += [*arguments, result]
            return result

        return recorded

    def call(self, name, arguments):
        objects = [getattr(x, "_obj", x) for x in arguments]
        parts = {}  # by address
        for x in (*self.kept, *objects):
            if isinstance(x, torch.Tensor):
                storage = x.untyped_storage()
                parts[storage.data_ptr()] = (storage.nbytes(), x)
            elif isinstance(x, (ctypes.Structure, ctypes.Array)):
                parts[ctypes.addressof(x)] = (ctypes.sizeof(x), x)

        def place(address):
            for i, (start, (size, _)) in enumerate(parts.items()):
                if start <= address < start + size or (address == start and size == 0):
                    return i, address - start
            raise AssertionError("an address that nothing was sent for")

        moved, integers, numbers = [], [], []
        for start, (_, x) in parts.items():
            for field, kind in getattr(x, "_fields_", ()):
                if kind is ctypes.c_void_p or hasattr(kind, "contents"):
                    value = ctypes.cast(getattr(x, field), ctypes.c_void_p).value
                    at = start + getattr(type(x), field).offset
                    moved.append((*place(at), *place(value)))
        for x in objects:
            if isinstance(x, ctypes.c_double):
                numbers.append(x.value)
            elif isinstance(x, ctypes.c_void_p) and x.value:
                integers += [1, *place(x.value)]
            elif isinstance(x, (ctypes.Structure, ctypes.Array)):
                integers += [1, *place(ctypes.addressof(x))]
            else:
                integers += [0, getattr(x, "value", x) or 0]

        def packed(*values):
            return struct.pack(f"={len(values)}q", *values)

        count = sum(not isinstance(x, ctypes.c_double) for x in objects)
        request = [packed(self.names.index(name), len(parts))]
        for start, (size, _) in parts.items():
            request += [packed(size), ctypes.string_at(start, size)]
        request += [packed(len(moved)), *(packed(*places) for places in moved)]
        request += [packed(count, *integers), packed(len(numbers))]
        request += [struct.pack(f"={len(numbers)}d", *numbers)]
        command = [EMULATOR, str(self.program)]
        result = subprocess.run(command, input=b"".join(request), capture_output=True)
        assert result.returncode == 0, result.stderr.decode()
        at = 0
        for start, (size, x) in parts.items():
            if isinstance(x, torch.Tensor):
                ctypes.memmove(start, result.stdout[at : at + size], size)
            at += size
        assert at == len(result.stdout)
        self.kept.clear()


def compile_program(operation, folder):
    """The program, and the names of its functions."""
    source = library.SOURCES / f"{operation}.cpp"
    names = [
        line.split("(")[0].split()[-1]
        for line in source.read_text().splitlines()
        if line.startswith("EXPORT ")
    ]
    main = folder / "main.cpp"
    main.write_text(
        PROGRAM
        % {
            "declarations": " ".join(f"void {name}();" for name in names),
            "names": ", ".join(f"(void*){name}" for name in names),
            "types": ", ".join(["int64_t"] * 20 + ["double"] * 8),
            "arguments": ", ".join([f"x[{i}]" for i in range(20)] + [f"y[{i}]" for i in range(8)]),
        }
    )
    flags = [flag for flag in library.FLAGS if flag not in ("-shared", "-fPIC")]
    program = folder / operation
    command = [COMPILER, *flags, "-static", str(main), str(source), "-o", str(program)]
    subprocess.run(command, check=True)
    return program, names


@pytest.mark.skipif(bool(NEEDED), reason=f"needs {', '.join(NEEDED)}")
@pytest.mark.parametrize("operation", library.OPERATIONS)
def test_parity_on_aarch64(monkeypatch, tmp_path, operation):
    far = Far(*compile_program(operation, tmp_path))
    launchers = importlib.import_module(f"tritonaff.native.{operation}")
    for name in ("images", "integers", "pointer", "_volumes"):
        if hasattr(launchers, name):
            monkeypatch.setattr(launchers, name, far.record(getattr(launchers, name)))
    monkeypatch.setattr(library, "_loaded", {operation: far})
    case = CASES[operation]
    channels = {"dilated_affinity": 32, "instance_affinity": 12}.get(operation, 5)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for confidence in (0.0, 9.0):
            shape = (2, channels, 9, 21)
            inputs = case.make_inputs(shape, dtype, "cpu", confidence=confidence)
            check_parity(case, "native", *inputs)
    logits, *others = case.make_inputs((1, channels, 12, 37))
    logits = logits.movedim(1, -1).contiguous().movedim(-1, 1)
    check_parity(case, "native", logits, *others)
