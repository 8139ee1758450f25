"""What gets installed, and the map that the top level shows."""

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import tritonaff

ROOT = Path(__file__).parent.parent


def test_a_wheel_holds_the_package_and_nothing_else(tmp_path):
    source = tmp_path / "source"
    ignore = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__", "runs")
    shutil.copytree(ROOT, source, symlinks=True, ignore=ignore)
    build = "import setuptools.build_meta as b, sys; b.build_wheel(sys.argv[1])"
    subprocess.run(
        [sys.executable, "-c", build, str(tmp_path)], cwd=source, check=True, capture_output=True
    )
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert tops == {"tritonaff", f"tritonaff-{tritonaff.__version__}.dist-info"}
    assert "tritonaff/py.typed" in names
    for package in ("functional", "ops", "kernels", "portable", "reference", "bench"):
        assert any(name.startswith(f"tritonaff/{package}") for name in names)
    metadata = zipfile.ZipFile(wheel).read(f"tritonaff-{tritonaff.__version__}.dist-info/METADATA")
    required = re.findall(r"^Requires-Dist: (.*)$", metadata.decode(), re.MULTILINE)
    assert [line for line in required if "extra ==" not in line] == ["torch>=2.11"]


def test_the_top_level_links_to_the_packages():
    for name in ("kernels", "reference", "bench"):
        assert (ROOT / name).resolve() == ROOT / "tritonaff" / name


def test_the_same_file_name_is_the_same_operation():
    files = {path.name for path in (ROOT / "tritonaff/ops").glob("*.py")}
    operations = files - {"__init__.py", "backend.py"}
    assert {"affinity_field.py", "affinity_regression.py"} <= operations
    for name in operations:
        for room in ("kernels", "portable", "reference"):
            assert (ROOT / "tritonaff" / room / name).exists()
        assert (ROOT / "tests" / f"test_{name}").exists()


def test_the_changelog_knows_the_version():
    assert f"## {tritonaff.__version__}" in (ROOT / "CHANGELOG.md").read_text()
