"""The compiler behind the native kernels, the cache of its libraries, and what all kernels share.

Most tests compile sources of one line in the place of an operation's.
"""

import ctypes
import multiprocessing
import os
import shutil
import threading
import warnings
from pathlib import Path

import pytest
import torch
from disk import full_disk

import tritonaff
from tritonaff.native import __main__ as command
from tritonaff.native import library
from tritonaff.ops import backend as backends
from tritonaff.testing import make_inputs

NAME = "affinity_regression"
ANSWER = 'extern "C" __attribute__((visibility("default"))) int answer() { return %d; }\n'
COMPILERS = [name for name in ("g++", "clang++") if shutil.which(name)]

needs_compiler = pytest.mark.skipif(library.find_compiler() is None, reason="no C++ compiler")


@pytest.fixture(autouse=True)
def nothing_compiled(monkeypatch, tmp_path):
    """A cache folder that does not exist yet, a process that has loaded nothing, sources of one
    line, and no tiles.
    """
    monkeypatch.setattr(backends, "_triton_installed", lambda: False)
    for variable in ("CXX", "TRITONAFF_NATIVE", "TRITONAFF_NATIVE_ARCH"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("TRITONAFF_CACHE", str(tmp_path / "cache"))
    sources = tmp_path / "sources"
    sources.mkdir()
    (sources / "common.h").touch()
    for name in library.OPERATIONS:
        (sources / f"{name}.cpp").write_text(ANSWER % 42)
    monkeypatch.setattr(library, "SOURCES", sources)
    start_again(monkeypatch)


def start_again(monkeypatch):
    """A new process, which knows nothing."""
    monkeypatch.setattr(library, "_loaded", {})
    monkeypatch.setattr(library, "_obstacles", {})


def obstacle():
    return library.obstacle(NAME, torch.empty(1))


def answer():
    assert obstacle() is None
    return library.library(NAME).answer()


def compiled(suffix=".so"):
    folder = library.cache_folder()
    return sorted(folder.glob(f"*{suffix}")) if folder.is_dir() else []


def compiler_of(monkeypatch, folder, script):
    """Makes a shell script the compiler; "$@" are its arguments."""
    path = folder / "compiler"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o700)
    monkeypatch.setenv("CXX", str(path))
    return path


def check_fallback(reason):
    """One warning with the reason and a remedy; then the loss is portable's, and a call that
    insists on native kernels says why there are none.
    """
    logits, target = make_inputs((1, 3, 6, 6))
    with tritonaff.use_backend("portable"):
        expected = tritonaff.affinity_regression_loss(logits, target)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        losses = [tritonaff.affinity_regression_loss(logits, target) for _ in range(2)]
    assert all(torch.equal(loss, expected) for loss in losses)
    (warning,) = caught
    text = str(warning.message)
    assert text.startswith(f"tritonaff: no native kernels for {NAME}: ")
    assert reason in text
    assert "Portable torch operations run instead" in text
    assert "TRITONAFF_NATIVE=0" in text
    with tritonaff.use_backend("native"), pytest.raises(ValueError, match="'native' cannot run"):
        tritonaff.affinity_regression_loss(logits, target)
    assert reason in obstacle()
    assert compiled(".tmp") == []


# --- Compiling, and what may be in the way --------------------------------------------------------


@needs_compiler
def test_the_first_call_compiles_and_says_so_in_one_line(monkeypatch, capfd):
    assert answer() == 42
    (path,) = compiled()
    line = capfd.readouterr().err
    assert line.startswith(f"tritonaff: compiled {NAME} for this CPU in ")
    assert line.endswith(f" s, once: {path}\n")
    assert path.parent.stat().st_mode & 0o777 == 0o700
    start_again(monkeypatch)
    assert answer() == 42
    assert capfd.readouterr().err == ""
    assert compiled(".tmp") == []


def test_no_compiler(monkeypatch):
    monkeypatch.setenv("PATH", "")
    check_fallback("no C++ compiler found (tried c++, g++, clang++); install one")


def test_a_compiler_that_does_not_exist(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler --fast")
    check_fallback("no C++ compiler found (tried no-such-compiler --fast)")


def test_a_compiler_that_fails(monkeypatch, tmp_path):
    path = compiler_of(monkeypatch, tmp_path, "seq 9 >&2; echo out of luck >&2; exit 1")
    check_fallback(f"{path} failed: 8 9 out of luck")


def test_a_compiler_that_fails_without_a_word(monkeypatch, tmp_path):
    compiler_of(monkeypatch, tmp_path, "exit 3")
    check_fallback("failed: status 3")


@needs_compiler
def test_a_cache_folder_that_cannot_be_made(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("TRITONAFF_CACHE", str(tmp_path / "file" / "cache"))
    check_fallback("file/cache (Not a directory); set TRITONAFF_CACHE to a folder")


@needs_compiler
def test_a_cache_folder_that_cannot_be_written(monkeypatch):
    library.cache_folder().mkdir(mode=0o700)
    if os.getuid() == 0:  # may write anywhere

        def refused(dir, suffix):
            raise PermissionError(13, "Permission denied", str(dir))

        monkeypatch.setattr(library.tempfile, "mkstemp", refused)
    else:
        library.cache_folder().chmod(0o500)
    check_fallback("cache (Permission denied); set TRITONAFF_CACHE to a folder")


@needs_compiler
def test_a_full_disk():
    with full_disk(100):
        check_fallback("failed: ")
    assert compiled() == []


@needs_compiler
@pytest.mark.parametrize("there_before", [False, True])
def test_a_folder_that_others_can_write_to(monkeypatch, there_before):
    """Neither used for new libraries, nor trusted with old ones."""
    if there_before:
        assert answer() == 42
        start_again(monkeypatch)
    library.cache_folder().mkdir(exist_ok=True)
    library.cache_folder().chmod(0o777)
    check_fallback("others can write to the cache folder")
    assert len(compiled()) == there_before


@needs_compiler
def test_the_folder_of_another_user(monkeypatch):
    library.cache_folder().mkdir()
    owner = library.cache_folder().stat().st_uid
    monkeypatch.setattr(os, "getuid", lambda: owner + 1)
    if owner == 0:  # trusted by everybody
        os.chown(library.cache_folder(), 12345, -1)
    check_fallback("is another user's; set TRITONAFF_CACHE")


@needs_compiler
def test_a_damaged_library_is_compiled_again(monkeypatch):
    path, _ = library.compile_library(NAME)
    path.write_bytes(path.read_bytes()[:100])
    assert answer() == 42
    assert compiled() == [path]


@needs_compiler
def test_a_compiler_that_makes_no_library(monkeypatch, tmp_path):
    compiler_of(monkeypatch, tmp_path, 'for last; do :; done; echo text > "$last"')
    check_fallback("file too short")


# --- Keys -----------------------------------------------------------------------------------------


@needs_compiler
def test_a_source_that_changed_is_another_library(monkeypatch):
    assert answer() == 42
    (library.SOURCES / f"{NAME}.cpp").write_text(ANSWER % 43)
    start_again(monkeypatch)
    assert answer() == 43
    (library.SOURCES / "common.h").write_text("// changed\n")
    start_again(monkeypatch)
    assert answer() == 43
    assert len(compiled()) == 3


@needs_compiler
def test_another_cpu_with_the_same_home_is_another_library(monkeypatch):
    assert answer() == 42
    monkeypatch.setattr(library, "_this_cpu", lambda: "another CPU")
    start_again(monkeypatch)
    assert answer() == 42
    assert len(compiled()) == 2


def test_the_description_of_a_cpu_holds_its_features():
    if not Path("/proc/cpuinfo").exists():
        pytest.skip("no /proc/cpuinfo")
    description = library._this_cpu()
    assert "flags" in description or "Features" in description
    assert "MHz" not in description  # which changes


@needs_compiler
def test_another_compiler_or_another_flag_is_another_library(monkeypatch):
    assert answer() == 42
    monkeypatch.setenv("CXX", f"{library.find_compiler()[0]} -O1")
    start_again(monkeypatch)
    assert answer() == 42
    monkeypatch.setattr(library, "FLAGS", (*library.FLAGS, "-g"))
    start_again(monkeypatch)
    assert answer() == 42
    assert len(compiled()) == 3


@needs_compiler
def test_a_library_that_is_there_needs_no_compiler(monkeypatch, capfd):
    assert answer() == 42
    capfd.readouterr()
    monkeypatch.setenv("PATH", "")
    start_again(monkeypatch)
    assert answer() == 42
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("named", "flag"), [(None, "native"), ("x86-64-v3", "x86-64-v3"), ("", "")]
)
def test_the_architecture(monkeypatch, named, flag):
    if named is not None:
        monkeypatch.setenv("TRITONAFF_NATIVE_ARCH", named)
    given = [x.removeprefix("-march=") for x in library.flags() if x.startswith("-march=")]
    assert given == ([flag] if flag else [])
    # Libraries for a named architecture run on every CPU of its kind.
    monkeypatch.setattr(library, "_this_cpu", lambda: "another CPU")
    assert (library.cpu() == "another CPU") == (flag == "native")


def test_the_default_folder(monkeypatch, tmp_path):
    monkeypatch.delenv("TRITONAFF_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert library.cache_folder() == tmp_path / "xdg/tritonaff"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert library.cache_folder() == tmp_path / "home/.cache/tritonaff"


# --- Choice, processes, threads, command ----------------------------------------------------------


@pytest.mark.parametrize("value", ["0", "false", "OFF"])
def test_native_kernels_can_be_turned_off(monkeypatch, value):
    """No warning, nothing compiled."""
    monkeypatch.setenv("TRITONAFF_NATIVE", value)
    logits, target = make_inputs((1, 3, 6, 6))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tritonaff.affinity_regression_loss(logits, target)
    with tritonaff.use_backend("native"), pytest.raises(ValueError, match="TRITONAFF_NATIVE turns"):
        tritonaff.affinity_regression_loss(logits, target)
    assert compiled() == []


@pytest.mark.parametrize(
    ("tensor", "reason"),
    [
        (torch.empty(1, dtype=torch.float64), "compute in float32, got torch.float64"),
        (torch.empty(1, device="meta"), "run on CPUs, got device meta"),
    ],
)
def test_tensors_that_no_native_kernel_takes(tensor, reason):
    assert reason in library.obstacle(NAME, tensor)
    assert compiled() == []


def compile_and_answer(results):
    results.put(answer())


@needs_compiler
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_two_processes_that_compile_at_once(monkeypatch, tmp_path):
    """Each waits in its compiler until both are there."""
    here = tmp_path / "here"
    here.mkdir()
    wait = f"touch {here}/$$; until [ $(ls {here} | wc -l) = 2 ]; do sleep 0.05; done"
    compiler_of(monkeypatch, tmp_path, f'{wait}; {library.find_compiler()[0]} "$@"')
    if "fork" not in multiprocessing.get_all_start_methods():
        pytest.skip("no fork, which spares the children the import of torch")
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    processes = [context.Process(target=compile_and_answer, args=(results,)) for _ in range(2)]
    for process in processes:
        process.start()
    try:
        assert [results.get(timeout=120) for _ in processes] == [42, 42]
    finally:
        for process in processes:
            process.kill()
            process.join()
    assert len(list(here.iterdir())) == 2
    assert len(compiled()) == 1
    assert compiled(".tmp") == []


@needs_compiler
def test_threads_that_call_at_once_compile_once(monkeypatch, tmp_path):
    log = tmp_path / "log"
    script = f'echo once >> {log}; sleep 0.2; {library.find_compiler()[0]} "$@"'
    compiler_of(monkeypatch, tmp_path, script)
    answers = []
    threads = [threading.Thread(target=lambda: answers.append(answer())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [42] * 4
    assert log.read_text() == "once\n"


@needs_compiler
def test_the_command_compiles_everything_and_says_where(capsys):
    assert command.main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"compiler  {library.find_compiler()[0]}"
    assert lines[1].startswith("flags     -std=c++17 ")
    assert lines[1].endswith(" -march=native")
    assert lines[2] == f"folder    {library.cache_folder()}"
    assert [line.split(":")[0] for line in lines[3:]] == list(library.OPERATIONS)
    assert all(": compiled in " in line for line in lines[3:])
    assert {line.split(", ")[-1] for line in lines[3:]} == {path.name for path in compiled()}
    assert command.main() == 0
    assert capsys.readouterr().out.count(": compiled before, ") == len(library.OPERATIONS)


def test_the_command_without_a_compiler(monkeypatch, capsys):
    monkeypatch.setenv("PATH", "")
    assert command.main() == 1
    printed = capsys.readouterr().out
    assert "compiler  none found" in printed
    assert printed.count(": failed, no C++ compiler found") == len(library.OPERATIONS)


def test_every_source_is_an_operation_with_a_launcher():
    sources = list(Path(library.__file__).parent.glob("*.cpp"))
    assert {path.stem for path in sources} <= set(library.OPERATIONS)
    assert all(path.with_suffix(".py").exists() for path in sources)


# --- What all kernels share -----------------------------------------------------------------------

SHARED = """
#include "common.h"

EXPORT void load(int64_t dtype, const uint16_t* x, int64_t stride, float* out, int n) {
    (dtype == BFLOAT16 ? load_bfloat16 : load_float16)(x, stride, out, n);
}

EXPORT void store(int64_t dtype, const float* x, uint16_t* out, int64_t stride, int n) {
    (dtype == BFLOAT16 ? store_bfloat16 : store_float16)(x, out, stride, n);
}

EXPORT void functions(const float* x, float* exps, float* logs, float* logs_of_1_plus, int n) {
    for (int i = 0; i < n; i++) exps[i] = exp_of_negative(-x[i]);
    for (int i = 0; i < n; i++) logs[i] = log_of_positive(x[i]);
    for (int i = 0; i < n; i++) logs_of_1_plus[i] = log_of_1_plus(exps[i]);
}

// Counts how often each task runs, and adds up the threads that took part.
EXPORT int threads(int32_t* runs, int64_t num_tasks, int64_t num_threads) {
    std::atomic<int> bodies{0};
    parallel(num_tasks, num_threads, [&](Tasks& tasks) {
        bodies++;
        for (int64_t task; tasks.next(task);) runs[task]++;
    });
    return bodies;
}
"""


@pytest.fixture(scope="module", params=COMPILERS or ["none"])
def shared(request, tmp_path_factory):
    """The functions of common.h, from every compiler at hand."""
    if not COMPILERS:
        pytest.skip("no C++ compiler")
    sources = tmp_path_factory.mktemp("sources")
    shutil.copy(Path(library.__file__).parent / "common.h", sources)
    (sources / "shared.cpp").write_text(SHARED)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CXX", request.param)
        patch.setenv("TRITONAFF_CACHE", str(sources / "cache"))
        patch.setattr(library, "SOURCES", sources)
        path, _ = library.compile_library("shared")
    return ctypes.CDLL(str(path))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(shared, dtype):
    """All numbers of 16 bits are loaded exactly; stored are they, and everything around the numbers
    between them, rounded as torch rounds.
    """
    code = ctypes.c_int64(library.DTYPES.index(dtype))
    for stride in (1, 3):
        bits = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16)
        spread = bits[:, None].expand(-1, stride).contiguous()
        loaded = torch.empty(bits.shape)
        shared.load(
            code, library.pointer(spread), ctypes.c_int64(stride), library.pointer(loaded), 1 << 16
        )
        same(loaded, bits.view(dtype).float())

        ends = torch.tensor([0, 1, 0xFFF, 0x1000, 0x1001, 0x1FFF, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
        wide = ((bits.long()[:, None] << 16) + ends).flatten().to(torch.int32).view(torch.float32)
        stored = torch.empty(len(wide), stride, dtype=dtype)
        shared.store(
            code, library.pointer(wide), library.pointer(stored), ctypes.c_int64(stride), len(wide)
        )
        same(stored[:, 0].float(), wide.to(dtype).float())


def same(result, expected):
    assert torch.equal(result.isnan(), expected.isnan())
    bits, expected_bits = (x.nan_to_num(nan=1.0).view(torch.int32) for x in (result, expected))
    assert torch.equal(bits, expected_bits)  # the sign of 0 too


def test_exp_and_log_keep_their_digits(shared):
    torch.manual_seed(0)
    x = torch.cat(
        [torch.linspace(1e-3, 87, 300_001), torch.rand(100_000), 1 + 0.1 * torch.randn(100_000)]
    )
    x = torch.cat([x, torch.logspace(-37, 38, 100_001), torch.tensor([1.0, 87.0])])
    exps, logs, logs_of_1_plus = (torch.empty_like(x) for _ in range(3))
    shared.functions(*map(library.pointer, (x, exps, logs, logs_of_1_plus)), len(x))
    rounding = torch.finfo(torch.float32).eps
    expected = x.double().neg().exp()
    small = x > 87
    assert not exps[small].any()
    assert ((exps - expected).abs() <= rounding * expected)[~small].all()
    expected = x.double().log()
    assert ((logs - expected).abs() <= rounding * expected.abs()).all()
    expected = exps.double().log1p()
    assert ((logs_of_1_plus - expected).abs() <= 2 * rounding * expected).all()


def test_exp_of_what_is_no_ordinary_number(shared):
    x = torch.tensor([0.0, float("inf"), float("nan"), 1e30])
    exps, logs, logs_of_1_plus = (torch.empty_like(x) for _ in range(3))
    shared.functions(*map(library.pointer, (x, exps, logs, logs_of_1_plus)), len(x))
    assert exps[[0, 1, 3]].tolist() == [1, 0, 0]
    assert exps[2].isnan()
    assert logs_of_1_plus[2].isnan()


@pytest.mark.parametrize(("tasks", "threads"), [(0, 2), (1, 4), (100, 1), (100, 2), (3, 8)])
def test_every_task_runs_once(shared, tasks, threads):
    runs = torch.zeros(tasks, dtype=torch.int32)
    took_part = shared.threads(
        library.pointer(runs), ctypes.c_int64(tasks), ctypes.c_int64(threads)
    )
    assert (runs == 1).all()
    assert min(1, tasks) <= took_part <= min(tasks, threads)
