"""Row functions of native kernels compute in vectors: a compiler that finds none says nothing, and
the kernel takes ten times as long.
"""

import re
import shutil
import subprocess

import pytest

from tritonaff.native.library import OPERATIONS, SOURCES, find_compiler, flags

ROW_FUNCTION = re.compile(r"^ROW_FUNCTION \w[\w ]*?[ *](\w+)\(([^)]*)\)", re.MULTILINE)
SYMBOL = re.compile(r"^[0-9a-f]+ <(?:.*\(anonymous namespace\)::)?(\w+)(<.*>)?\(.*>:$")


def functions(operation, folder, monkeypatch):
    """The machine code of the row functions, by name and template arguments."""
    compiler = find_compiler()
    if compiler is None or shutil.which("objdump") is None:
        pytest.skip("no compiler, or no objdump")
    monkeypatch.setenv("TRITONAFF_NATIVE_ARCH", "x86-64-v3")
    library = folder / f"{operation}.so"
    command = [*compiler, *flags(), str(SOURCES / f"{operation}.cpp"), "-o", str(library)]
    if subprocess.run(command, capture_output=True, text=True).returncode:
        pytest.skip("no compiler for x86-64-v3")
    listing = ["objdump", "--disassemble", "--demangle", "--no-show-raw-insn", str(library)]
    listing = subprocess.run(listing, capture_output=True, text=True, check=True).stdout
    text = (SOURCES / "common.h").read_text() + (SOURCES / f"{operation}.cpp").read_text()
    # Elements that lie apart make no vector.
    apart = re.compile("stride|offsets")
    names = {name for name, given in ROW_FUNCTION.findall(text) if not apart.search(given)}
    code = {}
    for part in listing.split("\n\n"):
        title, _, body = part.partition("\n")
        found = SYMBOL.match(title)
        if found and found[1] in names:
            code[found[1] + (found[2] or "")] = body
    return code


@pytest.mark.parametrize("operation", OPERATIONS)
def test_row_functions_are_vectorised(operation, tmp_path, monkeypatch):
    code = functions(operation, tmp_path, monkeypatch)
    assert code
    assert not [name for name, body in code.items() if "%ymm" not in body]
