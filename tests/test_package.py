"""The contents of archives, and the layout of the top level."""

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import tritonaff

ROOT = Path(__file__).parent.parent
HOME = "https://github.com/tritonaff/tritonaff"
COMMITTED = json.loads((ROOT / "docs/results/static.json").read_text())


def build(kind, folder):
    """The one file that a build of a copy of the sources makes: a "wheel" or an "sdist"."""
    source = folder / "source"
    made = ("build", "dist", "*.egg-info", "__pycache__", "runs", ".*_cache", ".hypothesis")
    ignore = shutil.ignore_patterns(".git", ".venv", *made)
    shutil.copytree(ROOT, source, symlinks=True, ignore=ignore)
    command = f"import setuptools.build_meta as b, sys; b.build_{kind}(sys.argv[1])"
    subprocess.run(
        [sys.executable, "-c", command, str(folder)], cwd=source, check=True, capture_output=True
    )
    (archive,) = folder.glob("tritonaff-*")
    return archive


def test_a_wheel_holds_the_package_and_nothing_else(tmp_path):
    wheel = build("wheel", tmp_path)
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert tops == {"tritonaff", f"tritonaff-{tritonaff.__version__}.dist-info"}
    assert "tritonaff/py.typed" in names
    for package in ("functional", "ops", "kernels", "portable", "reference", "bench", "testing"):
        assert any(name.startswith(f"tritonaff/{package}") for name in names)
    metadata = zipfile.ZipFile(wheel).read(f"tritonaff-{tritonaff.__version__}.dist-info/METADATA")
    required = re.findall(r"^Requires-Dist: (.*)$", metadata.decode(), re.MULTILINE)
    assert [line for line in required if "extra ==" not in line] == ["torch>=2.6"]
    urls = dict(re.findall(r"^Project-URL: (\w+), (.*)$", metadata.decode(), re.MULTILINE))
    assert urls.keys() == {"Source", "Documentation", "Changelog", "Issues"}
    assert all(url.startswith(HOME) for url in urls.values())


@pytest.mark.nightly
def test_an_sdist_holds_the_tests_and_passes_them(tmp_path):
    """All tests are collected; a few run, which are quick and read files outside of the package."""
    shutil.unpack_archive(build("sdist", tmp_path), tmp_path)
    (root,) = (path for path in tmp_path.glob("tritonaff-*") if path.is_dir())
    names = ["CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "Makefile", "README.md", ".ci/run"]
    names += ["tests/processes.py", "tests/nightly/test_ptx.py", "tools/ptx.py", "study/study.py"]
    names += ["examples/train.py", "docs/demo.png", "kernels/shared.py"]
    assert [name for name in names if not (root / name).exists()] == []
    assert not list(root.rglob("*.pyc"))
    quick = "test_rates or changelog or top_level or same_file or readme or ci_installs"
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-k", quick]
    run = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout


@pytest.mark.nightly
def test_an_installed_wheel_computes_a_loss(tmp_path):
    target = tmp_path / "site-packages"
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--target", str(target)]
    subprocess.run([*command, str(build("wheel", tmp_path))], check=True, capture_output=True)
    script = """
import torch, tritonaff
logits = torch.randn(1, 3, 16, 16, requires_grad=True)
tritonaff.AffinityFieldLoss()(logits, torch.randint(0, 3, (1, 16, 16))).backward()
print(tritonaff.__file__, logits.grad.abs().sum().item() > 0)
"""
    run = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(target), "TRITONAFF_CACHE": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
    )
    assert run.stdout == f"{target}/tritonaff/__init__.py True\n", run.stderr


def test_the_recipe_has_the_versions_of_the_package():
    recipe = (ROOT / "recipe/recipe.yaml").read_text()
    project = (ROOT / "pyproject.toml").read_text()
    assert f'  version: "{tritonaff.__version__}"\n' in recipe
    assert f'requires-python = ">={re.search(r"python_min: .(3[.][0-9]+)", recipe)[1]}"' in project
    assert f'dependencies = ["torch{re.search(r"- pytorch (.*)", recipe)[1]}"]' in project
    for command, function in re.findall(r"- (tritonaff-\w+) = (.*)", recipe):
        assert f'{command} = "{function}"' in project


def test_links_of_the_readme_lead_somewhere_from_a_package_index_too():
    links = re.findall(r"(!?)\[[^]]*\]\(([^)]*)\)", (ROOT / "README.md").read_text())
    own = [(picture, link) for picture, link in links if "://arxiv.org/" not in link]
    assert len(own) >= 10
    for picture, link in own:
        start = f"{HOME}/{'raw' if picture else 'blob'}/main/"
        assert link.startswith(start)
        page, _, heading = link.removeprefix(start).partition("#")
        assert (ROOT / page).is_file(), link
        if heading:
            titles = re.findall(r"^#+ (.*)$", (ROOT / page).read_text(), re.MULTILINE)
            assert heading in [title.lower().replace(" ", "-") for title in titles], link


def test_the_top_level_links_to_the_packages():
    for name in ("kernels", "reference", "bench"):
        package = ROOT / "tritonaff" / name
        if (ROOT / "PKG-INFO").exists():  # an sdist has copies
            for path in package.glob("*.py"):
                assert (ROOT / name / path.name).read_bytes() == path.read_bytes()
        else:
            assert (ROOT / name).resolve() == package


def test_the_same_file_name_is_the_same_operation():
    """A module in every folder, or a package."""
    files = (ROOT / "tritonaff/reference").glob("[a-z]*.py")
    operations = {path.stem for path in files}
    assert {"affinity_field", "affinity_regression"} <= operations
    for name in operations:
        # Affinities of colours are a few torch operations on every device.
        for room in ("ops", "portable", *(["kernels"] if name != "image_affinity" else [])):
            folder = ROOT / "tritonaff" / room
            assert (folder / f"{name}.py").exists() or (folder / name).is_dir()
        assert (ROOT / "tests" / f"test_{name}.py").exists()


def test_every_kernel_is_in_the_static_table():
    static = {(row["op"], row["kernel"]) for row in COMMITTED["kernels"]}
    static = {(OPS_OF_VARIANTS.get(op, op), kernel) for op, kernel in static}
    source = ROOT / "tritonaff/kernels"
    kernels = {
        (file.relative_to(source).parts[0].removesuffix(".py"), name)
        for file in source.rglob("*.py")
        for name in re.findall(r"^def (\w+_kernel)\(", file.read_text(), re.MULTILINE)
    }
    assert static == kernels


OPS_OF_VARIANTS = {
    "affinity_field_cross_entropy": "affinity_field",
    "affinity_field_cross_entropy_bfloat16": "affinity_field",
    "affinity_field_backward": "affinity_field",
    "affinity_field_unaligned": "affinity_field",
    "affinity_field_scale": "affinity_field",
    "affinity_regression_every_pixel": "affinity_regression",
    "affinity_regression_150_classes": "affinity_regression",
    "square_root_affinity": "affinity_regression",
}


def test_ci_installs_the_triton_of_the_committed_table():
    """Otherwise no test would notice that a kernel has grown."""
    constraints = (ROOT / ".ci/constraints.txt").read_text()
    assert f"triton=={COMMITTED['versions']['triton']}" in constraints.splitlines()


def test_the_changelog_knows_the_version():
    assert f"## {tritonaff.__version__}" in (ROOT / "CHANGELOG.md").read_text()
