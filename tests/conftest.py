"""Without a GPU the tiles run in Triton's interpreter, chosen before Triton is imported, or, with
``--ptx``, compiled for a GPU and in an emulator.
"""

import contextlib
import os

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
