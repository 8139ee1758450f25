"""The pictures as a reader sees them: the places of the colours."""

import subprocess
import sys

import pytest
import torch

import tritonaff

Image = pytest.importorskip("PIL.Image")
np = pytest.importorskip("numpy")
pytest.importorskip("matplotlib")
plotting = pytest.importorskip("tritonaff.plotting")
plot_affinity = plotting.plot_affinity

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
    """Top, bottom, left, right of the largest area in the mask. An area thinner than half of the
    largest, such as the colour bar beside a matrix, is left out.
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
    """A matrix without a 0 or a 1 is neither blue nor red, for any values of other matrices."""
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
        ({}, ValueError, "at least one entry, got an empty mapping"),
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
    assert "pip install matplotlib" in result.stdout, result.stderr


# Lines


@pytest.fixture
def figures(monkeypatch):
    """Every saved figure, as its axes with their lines."""
    saved = []
    save = plotting._save
    monkeypatch.setattr(
        plotting, "_save", lambda figure, path: saved.append(figure) or save(figure, path)
    )
    return saved


def lines(axis):
    return {line.get_label(): list(line.get_ydata()) for line in axis.lines}


def ticks(axis):
    return [text.get_text() for text in axis.get_xticklabels()]


def test_frequencies_are_drawn_by_rate(figures, tmp_path):
    statistics = tritonaff.NeighborStatistics([8, (12, 24), 16])
    statistics.pixel_count[:, 8] = torch.tensor([90, 80, 0])
    statistics.pixel_count[:, 0] = torch.tensor([10, 20, 0])
    path = tmp_path / "new" / "neighbors"
    plotting.plot_neighbor_frequencies(statistics, str(path))
    assert Image.open(path).format == "PNG"
    (axis,) = figures[0].axes
    drawn = lines(axis)
    assert list(drawn) == [f"n{k}" for k in range(9)]
    np.testing.assert_allclose(drawn["n8"], [90, 80, np.nan])
    np.testing.assert_allclose(drawn["n0"], [10, 20, np.nan])
    assert np.isnan(drawn["n4"]).all()
    assert ticks(axis) == ["8", "12,24", "16"]


def test_statistics_of_nothing_are_drawn_without_a_warning(tmp_path, recwarn):
    plotting.plot_neighbor_frequencies(tritonaff.NeighborStatistics([1]), tmp_path / "empty.png")
    assert (tmp_path / "empty.png").exists()
    assert not recwarn.list


def test_frequencies_of_something_else(tmp_path):
    with pytest.raises(TypeError, match="statistics must be a NeighborStatistics, got Tensor"):
        plotting.plot_neighbor_frequencies(torch.zeros(1, 9), tmp_path / "new" / "a.png")
    assert not (tmp_path / "new").exists()


def test_accuracies_are_drawn_by_category_and_averaged_over_rates(figures, tmp_path):
    first, second = torch.linspace(0, 1, 18).view(2, 9), torch.full((2, 9), 0.5)
    second[0, 0] = torch.nan
    path = tmp_path / "accuracy.png"
    plotting.plot_affinity_accuracy({"sqrt": first, "none": second.half()}, [8, (2, 4)], path)
    assert Image.open(path).format == "PNG"
    axes = figures[0].axes
    assert [axis.get_title() for axis in axes] == ["sqrt", "none", "mean over rates"]
    np.testing.assert_allclose(lines(axes[0])["8"], first[0])
    np.testing.assert_allclose(lines(axes[0])["2,4"], first[1])
    np.testing.assert_allclose(lines(axes[1])["8"], second[0])
    np.testing.assert_allclose(lines(axes[2])["sqrt"], first.mean(dim=0), rtol=1e-6)
    assert lines(axes[2])["none"] == [0.5] * 9
    assert ticks(axes[0]) == [f"n{k}" for k in range(9)]
    plotting.plot_affinity_accuracy({"sqrt": first}, [8, (2, 4)], path)
    assert len(figures[1].axes) == 1


@pytest.mark.parametrize(
    ("accuracies", "error", "message"),
    [
        (torch.zeros(1, 9), TypeError, "accuracies must be a mapping of titles to tensors"),
        ({}, ValueError, "accuracies must hold at least one entry"),
        ({1: torch.zeros(1, 9)}, TypeError, "every title must be a str, got int"),
        ({"a": torch.zeros(2, 9)}, ValueError, r"must have shape \(1, 9\), got \(2, 9\)"),
        ({"a": torch.zeros(1, 9).long()}, TypeError, r"accuracies\['a'\] must have dtype"),
    ],
)
def test_bad_accuracies(accuracies, error, message, tmp_path):
    with pytest.raises(error, match=message):
        plotting.plot_affinity_accuracy(accuracies, [8], tmp_path / "new" / "a.png")
    assert not (tmp_path / "new").exists()
