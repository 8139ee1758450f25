"""Writes the package in the layout of Hugging Face's kernel hub.

    python tools/hub_kernel.py FOLDER

kernel-builder builds the folder (``nix run .#build-and-copy``) and uploads the result, which
``kernels.get_kernel`` then loads. A kernel of the hub imports itself by relative names alone: this
tool rewrites the imports, and the package goes on naming where a name comes from.
"""

from __future__ import annotations

import argparse
import re
import shutil
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "tritonaff"
# Commands, adapters and pictures need other libraries, which kernels of the hub must not import.
LEFT_OUT = {
    *("__main__.py", "bench", "files.py", "statistics_cli.py"),
    *("hf.py", "metrics.py", "mmseg.py", "monai.py", "nnunet.py", "plotting.py", "smp.py"),
}

BUILD = """\
[general]
name = "tritonaff"
version = 0
edition = 5
license = "Apache-2.0"
upstream = "https://github.com/tritonaff/tritonaff"
backends = ["cpu", "cuda", "rocm", "xpu"]

[general.hub]
repo-id = "tritonaff/tritonaff"

# Triton compiles the tiles, a C++ compiler the native kernels, both on first use.
[torch-noarch]
pyext = ["py", "cpp", "h"]
"""

FLAKE = """\
{
  description = "Structured losses of semantic segmentation";
  inputs.kernel-builder.url = "github:huggingface/kernels";
  outputs = { self, kernel-builder }: kernel-builder.lib.genKernelFlakeOutputs {
    inherit self;
    path = ./.;
  };
}
"""

CARD = """\
---
library_name: kernels
license: apache-2.0
---

# tritonaff

Training losses for segmentation networks that lose thin things and blur boundaries: affinity
fields, affinity regression, dilated affinity and propagation, instance affinities.

```python
import torch
from kernels import get_kernel

tritonaff = get_kernel("tritonaff/tritonaff", version=0, trust_remote_code=True)
loss_fn = tritonaff.AffinityFieldLoss(kernel_sizes=(3, 5, 7), cross_entropy=True)
logits = torch.randn(2, 19, 64, 64, requires_grad=True)
loss_fn(logits, torch.randint(0, 19, (2, 64, 64))).backward()
```

Documentation, evidence and tests: https://github.com/tritonaff/tritonaff. The tiles need Triton
3.6 and a GPU; elsewhere native C++ kernels or torch operations run.
"""

TESTS = '''\
"""Every operation on this machine against the equations in float64."""

import pytest
import torch
from tritonaff.testing import CASES, check_parity

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.kernels_ci
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_parity(case):
    channels = {"dilated_affinity": 32, "affinity_field_sigmoid": 2}.get(case.name, 5)
    check_parity(case, "auto", *case.make_inputs((1, channels, 20, 24), device=DEVICE))
'''

BENCHMARK = '''\
"""Forward and backward of the affinity field at the size of street scenes."""

import torch
from kernels.benchmark import Benchmark


class AffinityField(Benchmark):
    seed = 0

    def setup(self):
        self.logits = torch.randn(1, 19, 256, 512, device=self.device, requires_grad=True)
        self.target = torch.randint(0, 19, (1, 32, 64), device=self.device)
        self.target = self.target.repeat_interleave(8, dim=1).repeat_interleave(8, dim=2)

    def loss(self):
        return self.kernel.affinity_field_loss(self.logits, self.target, kernel_sizes=(3, 5, 7))

    def benchmark_forward_backward(self):
        loss = self.loss()
        self.out, *_ = torch.autograd.grad(loss, self.logits)

    def verify_forward_backward(self):
        with self.kernel.use_backend("reference"):
            return torch.autograd.grad(self.loss(), self.logits)[0]
'''


def write(folder: Path) -> None:
    package = folder / "torch-ext/tritonaff"
    for path in sorted(PACKAGE.rglob("*")):
        relative = path.relative_to(PACKAGE)
        if path.suffix not in (".py", ".cpp", ".h") or relative.parts[0] in LEFT_OUT:
            continue
        copy = package / relative
        copy.parent.mkdir(parents=True, exist_ok=True)
        text = path.read_text()
        copy.write_text(relative_imports(text, relative) if path.suffix == ".py" else text)
    files = {
        "build.toml": BUILD,
        "flake.nix": FLAKE,
        "CARD.md": CARD,
        "tests/__init__.py": "",
        "tests/test_tritonaff.py": TESTS,
        "benchmarks/benchmark.py": BENCHMARK,
    }
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    shutil.copy(ROOT / "LICENSE", folder)


def relative_imports(text: str, path: Path) -> str:
    """The source of the module at this path in the package, with relative imports."""
    dots = "." * len(path.parts)

    def relative(match: re.Match[str]) -> str:
        indent, module = match[1], (match[2] or "").removeprefix(".")
        return f"{indent}from {dots}{module} import"

    text = re.sub(r"(?m)^( *)from tritonaff((?:\.\w+)*) import", relative, text)
    if re.search(r"(?m)^ *(import|from) tritonaff\b", text):
        raise ValueError(f"{path} imports the package itself: import names from its modules")
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="is made; must be empty")
    folder = parser.parse_args().folder
    if folder.exists() and any(folder.iterdir()):
        parser.error(f"{folder} is not empty")
    write(folder)
    print(f"written: {folder}")


if __name__ == "__main__":
    main()
