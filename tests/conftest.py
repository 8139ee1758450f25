"""Without a GPU the tiles run in Triton's interpreter, chosen before Triton is imported, or, with
``--ptx``, compiled for a GPU and in an emulator.
"""

import contextlib
import os
from collections.abc import Callable

import pytest
import torch
from fast_interpreter import speed_up_interpreter
from hypothesis import HealthCheck, settings

from tritonaff.native.library import find_compiler

# Most tensors here are tiny: waking a second thread for them costs more than it saves.
torch.set_num_threads(1)
# Convolutions in full precision: networks are compared with themselves.
torch.backends.cudnn.allow_tf32 = False


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--ptx", action="store_true", help="no GPU: tiles are compiled and emulated")


def pytest_configure(config: pytest.Config) -> None:
    if torch.cuda.is_available():
        if config.getoption("--ptx"):
            raise pytest.UsageError("--ptx is for machines without a GPU")
        return
    if config.getoption("--ptx"):
        from ptx import emulated

        emulation = emulated()
        emulation.__enter__()
        config.add_cleanup(lambda: emulation.__exit__(None, None, None))
    else:
        os.environ["TRITON_INTERPRET"] = "1"
        with contextlib.suppress(ImportError):  # tests of the tiles are skipped
            speed_up_interpreter()
        from interpreted import BLOCKS

        from tritonaff.kernels.blocks import override

        blocks = override(**BLOCKS)
        blocks.__enter__()
        config.add_cleanup(lambda: blocks.__exit__(None, None, None))


settings.register_profile(
    "quick",
    max_examples=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile(
    "nightly", max_examples=2000, deadline=None, suppress_health_check=list(HealthCheck)
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "quick"))


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(params=["portable", "native", "triton"])
def backend(request: pytest.FixtureRequest) -> str:
    """The implementations behind the custom ops."""
    return available(request.param)


@pytest.fixture(params=["reference", "portable", "native", "triton"])
def any_backend(request: pytest.FixtureRequest) -> str:
    """All implementations, and the specification."""
    return available(request.param)


@pytest.fixture
def times_eager(request: pytest.FixtureRequest, device: torch.device) -> Callable[[str], float]:
    """How many times as far off as eager mode's a gradient of a backend may be: 2. Tiles on a GPU
    take its ex2.approx, whose error is up to 4 roundings, where an exponential of eager mode is off
    by 0.3 on average: 16, with a factor 1.2 to spare.
    """
    on_gpu = device.type != "cpu" or request.config.getoption("--ptx")
    return lambda backend: 16.0 if backend == "triton" and on_gpu else 2.0


def available(backend: str) -> str:
    """The backend's name; skips the test where the backend cannot run."""
    if backend == "triton":
        pytest.importorskip("triton", minversion="3.6")
    if backend == "native" and find_compiler() is None:
        pytest.skip("no C++ compiler")
    return backend


@pytest.fixture
def poisoned_memory():
    """torch.empty holds NaN: an element that an implementation forgets to write shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)
