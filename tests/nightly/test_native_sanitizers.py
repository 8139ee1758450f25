"""Native kernels under the address sanitizer and the sanitizer of undefined behaviour, in the tests
of the gate that take a backend.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
OPERATIONS = sorted(path.stem for path in (TESTS.parent / "tritonaff/native").glob("*.cpp"))
FLAGS = "-g1 -fsanitize=address,undefined -fno-sanitize-recover=all"
WRONG = {
    "memory": "auto x = new int[n]; int y = x[n]; delete[] x; return y;",
    "arithmetic": "return n + 2147483647;",
}


@pytest.fixture
def environment(tmp_path):
    """Python with the sanitizers' runtime, and a compiler with their flags."""
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    command = ["g++", "-print-file-name=libasan.so"]
    runtime = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    if not Path(runtime).is_file():
        pytest.skip("g++ has no address sanitizer")
    return {
        **os.environ,
        "PYTHONPATH": str(TESTS.parent),
        "CXX": f"g++ {FLAGS}",
        "LD_PRELOAD": runtime,
        "ASAN_OPTIONS": "detect_leaks=0",  # Python's own
        "TRITONAFF_CACHE": str(tmp_path / "cache"),
    }


@pytest.mark.parametrize("fault", WRONG)
def test_the_sanitizers_find_a_fault(environment, tmp_path, fault):
    source, library = tmp_path / "wrong.cpp", tmp_path / "wrong.so"
    source.write_text(f'extern "C" int wrong(int n) {{ {WRONG[fault]} }}')
    command = [*environment["CXX"].split(), "-fPIC", "-shared", str(source), "-o", str(library)]
    subprocess.run(command, check=True)
    script = f"import ctypes; ctypes.CDLL({str(library)!r}).wrong(3)"
    result = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True
    )
    assert result.returncode != 0
    assert "AddressSanitizer" in result.stderr or "runtime error" in result.stderr


@pytest.mark.parametrize("operation", OPERATIONS)
def test_the_sanitizers_find_nothing(environment, operation):
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider"]
    tests = [TESTS / f"test_{operation}.py", "-k", "native and not compile"]
    result = subprocess.run(
        [*command, *tests], env=environment, cwd=TESTS.parent, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert " passed" in result.stdout
