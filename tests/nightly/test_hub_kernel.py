"""The layout of the kernel hub, loaded by the library that loads kernels from there.

That library has the name of the link ``kernels`` at the top level of a checkout: the scripts below
look for it everywhere else first.
"""

import importlib.metadata
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hub_kernel import relative_imports

ROOT = Path(__file__).parent.parent.parent
try:
    importlib.metadata.version("kernels")
except importlib.metadata.PackageNotFoundError:
    pytest.skip("needs Hugging Face's kernels", allow_module_level=True)

BEGIN = f"""
import sys
sys.path = [path for path in sys.path if path != {str(ROOT)!r}] + [{str(ROOT)!r}]
"""
UNDERSTOOD = """
from kernels._rust import Build

Build.open(sys.argv[1])  # ValueError for a key or a value that it does not know
print("understood")
"""
LOADED = """
import pathlib

import kernels, torch, tritonaff

loaded = kernels.get_local_kernel(pathlib.Path(sys.argv[1]), backend="cpu")
name = loaded.__name__
assert name != "tritonaff" and loaded.AffinityFieldLoss is not tritonaff.AffinityFieldLoss
logits = torch.randn(2, 4, 16, 16, requires_grad=True)
target = torch.randint(0, 4, (2, 16, 16))
results = []
for package in (loaded, tritonaff):
    loss = package.AffinityFieldLoss((3, 5), cross_entropy=True)(logits, target)
    results.append((loss, *torch.autograd.grad(loss, logits)))
for ours, expected in zip(*results, strict=True):
    assert torch.equal(ours, expected)
# Its ops are its own, and nothing that it imports is the installed package.
assert hasattr(getattr(torch.ops, name), "affinity_field")
own = [module for key, module in sys.modules.items() if key.startswith(name + ".")]
assert len(own) > 20
for module in own:
    assert module.__file__.startswith(sys.argv[1])
    for value in vars(module).values():
        assert not str(getattr(value, "__module__", "")).startswith("tritonaff")
print(name)
"""


@pytest.fixture
def folder(tmp_path):
    tool = ROOT / "tools/hub_kernel.py"
    subprocess.run([sys.executable, str(tool), str(tmp_path / "hub")], check=True)
    return tmp_path / "hub"


def output(script, folder):
    command = [sys.executable, "-c", BEGIN + script, str(folder)]
    run = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_kernel_builder_understands_the_build_file(folder):
    assert output(UNDERSTOOD, folder) == "understood\n"
    assert (folder / "torch-ext/tritonaff/__init__.py").is_file()


def test_it_loads_beside_the_package_and_computes_the_same(folder):
    """kernel-builder copies the sources and writes the metadata; here the test does."""
    variant = folder / "build/torch-universal"
    shutil.copytree(folder / "torch-ext/tritonaff", variant)
    name = "_tritonaff_cpu_0a1b2c3"  # kernel-builder makes one for each build
    metadata = {"id": name, "name": "tritonaff", "version": 0, "license": "Apache-2.0"}
    metadata |= {"backend": {"type": "cpu"}, "python-depends": []}
    (variant / "metadata.json").write_text(json.dumps(metadata))
    assert output(LOADED, folder) == f"{name}\n"


def test_an_import_of_the_package_itself_is_refused():
    text = "from tritonaff import checks\nif 1:\n    from tritonaff.ops.backend import a\n"
    expected = "from .. import checks\nif 1:\n    from ..ops.backend import a\n"
    assert relative_imports(text, Path("api/module.py")) == expected
    with pytest.raises(ValueError, match="imports the package itself"):
        relative_imports("import tritonaff\n", Path("api/module.py"))
