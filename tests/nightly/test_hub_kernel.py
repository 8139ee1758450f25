"""The layout of the kernel hub, loaded by the library that loads kernels from there."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hub_kernel import relative_imports

import tritonaff

kernels = pytest.importorskip("kernels")

TOOL = Path(__file__).parent.parent.parent / "tools/hub_kernel.py"
ID = "_tritonaff_cpu_0a1b2c3"  # kernel-builder makes one for each build


@pytest.fixture
def folder(tmp_path):
    subprocess.run([sys.executable, str(TOOL), str(tmp_path / "hub")], check=True)
    return tmp_path / "hub"


def test_kernel_builder_understands_the_build_file(folder):
    build = pytest.importorskip("kernels._rust").Build.open(folder)
    assert build.general.name.python_name == "tritonaff"
    assert (folder / "torch-ext/tritonaff/__init__.py").is_file()


def test_it_loads_beside_the_package_and_computes_the_same(folder):
    """kernel-builder copies the sources and writes the metadata; here the test does."""
    variant = folder / "build/torch-universal"
    shutil.copytree(folder / "torch-ext/tritonaff", variant)
    metadata = {"id": ID, "name": "tritonaff", "version": 0, "license": "Apache-2.0"}
    metadata |= {"backend": {"type": "cpu"}, "python-depends": []}
    (variant / "metadata.json").write_text(json.dumps(metadata))
    loaded = kernels.get_local_kernel(folder, backend="cpu")
    assert loaded.__name__ == ID
    assert loaded.AffinityFieldLoss is not tritonaff.AffinityFieldLoss

    logits = torch.randn(2, 4, 16, 16, requires_grad=True)
    target = torch.randint(0, 4, (2, 16, 16))
    results = []
    for package in (loaded, tritonaff):
        loss = package.AffinityFieldLoss((3, 5), cross_entropy=True)(logits, target)
        results.append((loss, *torch.autograd.grad(loss, logits)))
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=0)
    assert hasattr(getattr(torch.ops, ID), "affinity_field")
    # Nothing that the kernel imports is the installed package.
    own = [module for name, module in sys.modules.items() if name.startswith(f"{ID}.")]
    assert len(own) > 20
    assert all(str(variant) in module.__file__ for module in own if module.__file__)
    for name, value in vars(sys.modules[f"{ID}.api.affinity_field"]).items():
        assert not getattr(value, "__module__", "").startswith("tritonaff"), name


def test_an_import_of_the_package_itself_is_refused():
    text = "from tritonaff import checks\nif 1:\n    from tritonaff.ops.backend import a\n"
    expected = "from .. import checks\nif 1:\n    from ..ops.backend import a\n"
    assert relative_imports(text, Path("api/module.py")) == expected
    with pytest.raises(ValueError, match="imports the package itself"):
        relative_imports("import tritonaff\n", Path("api/module.py"))
