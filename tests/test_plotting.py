"""The pictures, looked at as a reader does: where which colour is."""

import subprocess
import sys

import pytest
import torch

Image = pytest.importorskip("PIL.Image")
np = pytest.importorskip("numpy")
pytest.importorskip("matplotlib")
plot_affinity = pytest.importorskip("tritonaff.plotting").plot_affinity

ZEROS, ONES = torch.zeros(4, 4), torch.ones(4, 4)
NAN = torch.full((4, 4), torch.nan)


def draw(matrices, path):
    """The picture (height, width, RGB)."""
    plot_affinity(matrices, path)
    image = Image.open(path)
    assert image.format == "PNG"
    return np.asarray(image.convert("RGB")).astype(int)


def is_blue(picture):
    red, green, blue = np.moveaxis(picture, -1, 0)
    return (blue > red + 60) & (blue > green + 60)


def is_red(picture):
    red, green, blue = np.moveaxis(picture, -1, 0)
    return (red > blue + 60) & (red > green + 60)


def is_gray(picture):
    middle = (picture > 100) & (picture < 200)
    return middle.all(axis=-1) & (np.ptp(picture, axis=-1) == 0)


def panel(mask):
    """Top, bottom, left, right of what is mostly in the mask: thinner than half of it is left out,
    such as the colour bar beside a matrix.
    """
    rows = np.flatnonzero(mask.sum(axis=1) > mask.sum(axis=1).max() / 2)
    columns = np.flatnonzero(mask.sum(axis=0) > mask.sum(axis=0).max() / 2)
    return rows[0], rows[-1] + 1, columns[0], columns[-1] + 1


def test_zero_is_blue_one_is_red_and_nan_gray(tmp_path):
    picture = draw({"zeros": ZEROS, "ones": ONES, "ignored": NAN}, tmp_path / "three.png")
    panels = [panel(mask(picture)) for mask in (is_blue, is_red, is_gray)]
    for (top, bottom, left, right), mask in zip(panels, (is_blue, is_red, is_gray), strict=True):
        assert mask(picture[top:bottom, left:right]).all()
        assert bottom - top > 400
        assert abs((bottom - top) - (right - left)) <= 2  # square
        assert abs(top - panels[0][0]) <= 2  # on one height
    assert panels[0][3] < panels[1][2] < panels[1][3] < panels[2][2]  # in the order given


def test_row_0_is_at_the_top_and_column_0_on_the_left(tmp_path):
    matrix = ZEROS.clone()
    matrix[0, 3] = 1
    picture = draw({"corner": matrix}, tmp_path / "corner.png")
    top, bottom, left, right = panel(is_blue(picture))
    height, width = (bottom - top) // 4, (right - left) // 4
    red = is_red(picture[:, : right + 1])
    assert red[top + 5 : top + height - 5, right - width + 5 : right - 5].all()
    assert red[:, : right - width - 5].sum() == 0
    assert red[top + height + 5 :].sum() == 0


def test_the_scale_is_fixed(tmp_path):
    """A matrix without a 0 or a 1 is neither blue nor red, whatever the others hold."""
    half = torch.full((4, 4), 0.5)
    for k, matrices in enumerate(({"half": half}, {"half": half, "ones": ONES})):
        picture = draw(matrices, tmp_path / f"{k}.png")
        alone = picture[:, : picture.shape[1] // 3]  # of the first matrix
        assert not (is_blue(alone) | is_red(alone)).any()


def test_ignored_is_named_only_where_it_occurs(tmp_path):
    without = draw({"ones": ONES}, tmp_path / "without.png")
    one = ONES.clone()
    one[0] = torch.nan
    with_it = draw({"ones": one}, tmp_path / "with.png")
    assert is_gray(without).sum() < 1000 < is_gray(with_it).sum()
    bottom = panel(is_red(with_it))[1] + 5
    assert is_gray(with_it[bottom:]).sum() > 500  # the patch of the legend


def test_a_matrix_more_makes_the_picture_wider(tmp_path):
    one = draw({"a": ZEROS}, tmp_path / "one.png")
    two = draw({"a": ZEROS, "b": torch.zeros(180, 180)}, tmp_path / "two.png")
    assert one.shape[0] == two.shape[0] > 500
    assert one.shape[1] + 500 < two.shape[1]


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float16,
        torch.bfloat16,
        torch.float32,
        torch.float64,
        torch.bool,
        torch.uint8,
        torch.int8,
        torch.int64,
    ],
)
def test_every_dtype_and_device_draws_the_same(dtype, device, tmp_path):
    matrix = torch.eye(4)
    expected = draw({"eye": matrix}, tmp_path / "expected.png")
    other = matrix.to(device, dtype)[None]
    if dtype.is_floating_point:
        other.requires_grad_()
    np.testing.assert_array_equal(draw({"eye": other}, tmp_path / "other.png"), expected)


def test_folders_are_made_and_the_format_is_png(tmp_path):
    path = tmp_path / "new" / "folder" / "picture"
    draw({"eye": torch.eye(3)}, str(path))
    assert [file.name for file in path.parent.iterdir()] == ["picture"]


def test_it_leaves_pyplot_alone(tmp_path):
    script = """
import sys, torch
from tritonaff.plotting import plot_affinity
plot_affinity({"eye": torch.eye(3)}, sys.argv[1])
assert "matplotlib.pyplot" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "eye.png")], check=True)


@pytest.mark.parametrize(
    ("matrices", "error", "message"),
    [
        ([ZEROS], TypeError, "must be a mapping of titles to tensors, got list"),
        (ZEROS, TypeError, "must be a mapping of titles to tensors, got Tensor"),
        ({}, ValueError, "at least one matrix, got an empty mapping"),
        ({1: ZEROS}, TypeError, "every title must be a str, got int"),
        ({"a": [[0.0]]}, TypeError, r"matrices\['a'\] must be a tensor, got list"),
        ({"a": ZEROS + 0j}, TypeError, r"matrices\['a'\] must have dtype .* got complex64"),
        ({"a": ZEROS.to_sparse()}, TypeError, "must be a dense tensor"),
        ({"a": ZEROS[0]}, ValueError, r"must have shape \(L, L\), got \(4,\)"),
        ({"a": ZEROS[:3]}, ValueError, r"must be square and not empty, got shape \(3, 4\)"),
        ({"a": ZEROS[:0, :0]}, ValueError, r"must be square and not empty, got shape \(0, 0\)"),
        ({"a": ZEROS.expand(2, 4, 4)}, ValueError, r"have shape \(1, L, L\), got \(2, 4, 4\)"),
        ({"a": ZEROS, "b": ZEROS[:3]}, ValueError, r"matrices\['b'\] must be square"),
    ],
)
def test_bad_input(matrices, error, message, tmp_path):
    path = tmp_path / "new" / "picture.png"
    with pytest.raises(error, match=message):
        plot_affinity(matrices, path)
    assert not path.parent.exists()


def test_without_matplotlib_the_error_names_the_extra():
    script = """
import sys
sys.modules["matplotlib"] = None  # an import of it fails
import tritonaff
try:
    import tritonaff.plotting
except ImportError as error:
    print(error)
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert "pip install tritonaff[plot]" in result.stdout, result.stderr
