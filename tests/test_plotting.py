"""The pictures as a reader sees them: the places of the colours."""

import subprocess
import sys

import pytest
import torch

import tritonaff

Image = pytest.importorskip("PIL.Image")
np = pytest.importorskip("numpy")
matplotlib = pytest.importorskip("matplotlib")
Figure = pytest.importorskip("matplotlib.figure").Figure
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


@pytest.fixture
def figures(monkeypatch):
    """Every saved figure, as its axes with their lines."""
    saved = []
    save = plotting._save
    monkeypatch.setattr(
        plotting, "_save", lambda figure, path: saved.append(figure) or save(figure, path)
    )
    return saved


def is_blue(picture):
    red, _, blue = np.moveaxis(picture, -1, 0)
    return (blue > red + 60) & (red < 30)  # the end of the map, not its middle


def is_white(picture):
    return (picture > 240).all(axis=-1)


def is_gray(picture):
    middle = (picture > 100) & (picture < 200)
    return middle.all(axis=-1) & (np.ptp(picture, axis=-1) == 0)


def inside(picture, k=0, count=1):
    """The middle of the k-th of ``count`` panels, without the colour bar."""
    height, width = picture.shape[:2]
    left = int((k + 0.35) * (width - 140) / count)
    return picture[height // 3 : 2 * height // 3, left : left + (width - 140) // count // 3]


def test_zero_is_white_one_is_blue_and_nan_gray(tmp_path):
    picture = draw({"zeros": ZEROS, "ones": ONES, "ignored": NAN}, tmp_path / "three.png")
    for k, mask in enumerate((is_white, is_blue, is_gray)):
        assert mask(inside(picture, k, 3)).all()


def test_row_0_is_at_the_top_and_column_0_on_the_left(tmp_path):
    matrix = ZEROS.clone()
    matrix[0, 3] = 1
    picture = draw({"corner": matrix}, tmp_path / "corner.png")
    blue = is_blue(picture[:, :-140])
    rows, columns = np.flatnonzero(blue.any(axis=1)), np.flatnonzero(blue.any(axis=0))
    assert rows[-1] < picture.shape[0] / 2 < picture.shape[1] / 2 < columns[0]
    assert abs(len(rows) - len(columns)) <= 2  # square
    assert blue.sum() > 0.9 * len(rows) * len(columns)


def test_the_scale_is_fixed(tmp_path):
    """A matrix without a 0 or a 1 has the colour of neither, for any values of other matrices."""
    half = torch.full((4, 4), 0.5)
    colours = []
    for k, matrices in enumerate(({"half": half}, {"half": half, "ones": ONES})):
        middle = inside(draw(matrices, tmp_path / f"{k}.png"), 0, len(matrices))
        assert not (is_blue(middle) | is_white(middle) | is_gray(middle)).any()
        colours.append(middle[0, 0])
    np.testing.assert_array_equal(*colours)


def test_ignored_is_named_only_where_it_occurs(figures, tmp_path):
    one = ONES.clone()
    one[0] = torch.nan
    draw({"ones": ONES}, tmp_path / "without.png")
    draw({"ones": one}, tmp_path / "with.png")
    without, with_it = ([x.get_text() for y in f.legends for x in y.get_texts()] for f in figures)
    assert (without, with_it) == ([], ["ignored"])


def test_a_matrix_more_makes_the_picture_wider(tmp_path):
    one = draw({"a": ZEROS}, tmp_path / "one.png")
    two = draw({"a": ZEROS, "b": torch.zeros(180, 180)}, tmp_path / "two.png")
    assert one.shape[0] == two.shape[0] > 500
    assert one.shape[1] + 500 < two.shape[1]


def test_grids_are_named_and_parted_by_a_line(figures, tmp_path):
    plot_affinity({"a": torch.zeros(180, 180)}, tmp_path / "a.png", grid_sizes=(12, 6))
    axis = figures[0].axes[0]
    assert ticks(axis) == ["12 x 12", "6 x 6"]
    across, down = axis.lines
    assert set(across.get_ydata()) == set(down.get_xdata()) == {143.5}  # 144 points before it
    with pytest.raises(
        ValueError, match=r"a row for each point of grid_sizes .* 180 in all, got 4"
    ):
        plot_affinity({"a": ZEROS}, tmp_path / "new/a.png", grid_sizes=(12, 6))


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
    assert list(drawn) == [str(k) for k in range(9)]
    assert figures[0].legends[0].get_title().get_text() == "neighbours of 8\nwith the same label"
    np.testing.assert_allclose(drawn["8"], [90, 80, np.nan])
    np.testing.assert_allclose(drawn["0"], [10, 20, np.nan])
    assert np.isnan(drawn["4"]).all()
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
    assert ticks(axes[0]) == [str(k) for k in range(9)]
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


# Colours, as people with deuteranopia see them

# Deuteranopia in linear RGB: Machado, Oliveira, Fernandes, "A Physiologically-based Model for
# Simulation of Color Vision Deficiency", 2009, severity 1.
DEUTERANOPIA = np.array(
    [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ]
)


def deuteranope(rgb):
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    linear = (linear @ DEUTERANOPIA.T).clip(0, 1)
    return np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def nearest(colours):
    """Smallest distance of two colours in CIELAB, to ordinary eyes and with deuteranopia. 2.3 is
    just noticeable where two areas touch; areas apart need several times as much.
    """
    colour = pytest.importorskip("skimage.color")
    rgb = np.array([matplotlib.colors.to_rgb(c) for c in colours])
    distances = []
    for seen in (rgb, deuteranope(rgb)):
        lab = colour.rgb2lab(seen[None])[0]
        apart = np.linalg.norm(lab[:, None] - lab, axis=-1)
        distances.append(apart[~np.eye(len(lab), dtype=bool)].min())
    return min(distances)


def test_classes_and_errors_differ_for_every_eye():
    assert nearest([*plotting.PALETTE, plotting.VOID]) > 15
    assert nearest([*plotting.ERRORS.values(), plotting.VOID]) > 15
    tab10 = matplotlib.colormaps["tab10"].colors
    assert nearest(tab10) < 8  # a palette that does not do


def test_ignored_differs_from_every_affinity():
    shades = matplotlib.colormaps["Blues"](np.linspace(0, 1, 50))
    assert min(nearest([shade, plotting.IGNORED]) for shade in shades) > 8


# On axes


@pytest.fixture
def axis():
    return Figure().subplots()


def test_labels_have_the_colours_of_their_classes(device):
    labels = torch.tensor([[0, 1, 2], [3, 255, -1]], device=device)
    picture = plotting.label_colors(labels, 3, palette=("#ff0000", "#00ff00"))
    red, green, white = [255, 0, 0], [0, 255, 0], [255, 255, 255]
    assert picture.tolist() == [[red, green, red], [white, white, white]]
    assert picture.dtype == np.uint8


def test_boundaries_lie_between_pixels(axis):
    plotting.draw_boundaries(axis, torch.tensor([[0, 0, 1], [0, 0, 1], [2, 0, 1]]))
    segments = {tuple(map(tuple, s.tolist())) for s in axis.collections[0].get_segments()}
    between = {((1.5, y - 0.5), (1.5, y + 0.5)) for y in range(3)}  # columns 1 and 2
    assert segments == {*between, ((0.5, 1.5), (0.5, 2.5)), ((-0.5, 1.5), (0.5, 1.5))}


def test_errors_against_a_baseline(axis):
    target = torch.tensor([[0, 0, 0, 0, 255]])
    prediction, baseline = torch.tensor([[0, 1, 0, 1, 0]]), torch.tensor([[0, 1, 1, 0, 0]])
    plotting.draw_errors(axis, prediction, target, 2, baseline)
    plotting.draw_errors(axis, prediction, target, 2)
    names = ["right", "wrong", "better", "worse"], ["right", "wrong", "right", "wrong"]
    for image, expected in zip(axis.images, names, strict=True):
        colours = [matplotlib.colors.to_hex(rgb / 255) for rgb in image.get_array()[0]]
        assert colours == [*(plotting.ERRORS[name] for name in expected), plotting.VOID]


def test_curves_and_their_running_mean(axis):
    plotting.draw_curves(axis, {"ce": {0: 4.0, 1: 2.0, 2: 0.0, 3: 1.0}}, mean_over=2)
    raw, mean = axis.lines
    assert list(raw.get_ydata()) == [4, 2, 0, 1]
    assert list(mean.get_ydata()) == [4, 3, 1, 0.5]
    assert list(mean.get_xdata()) == [0, 1, 2, 3]


def test_scores_by_class_have_a_dot_for_each_seed(axis):
    scores = {"ce": torch.tensor([[0.1, 0.4], [0.3, torch.nan]]), "aaf": torch.tensor([0.5, 0.6])}
    plotting.draw_class_scores(axis, scores, ["road", "$pole"])
    dots, means = axis.lines[0:2], axis.lines[2]
    np.testing.assert_allclose(
        np.ravel([line.get_xdata() for line in dots]), [0.1, 0.4, 0.3, np.nan]
    )
    np.testing.assert_allclose(means.get_xdata(), [0.2, 0.4])
    assert [text.get_text() for text in axis.get_yticklabels()] == ["road", "$pole"]
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["ce", "aaf"]


def test_learned_sizes_are_means_by_the_weights(axis):
    loss = tritonaff.AdaptiveAffinityFieldLoss(2, (3, 7))
    with torch.no_grad():
        loss.edge_scores.copy_(torch.tensor([[20.0, 0.0], [0.0, 20.0]]))
    plotting.draw_learned_sizes(axis, loss, ["road", "pole"])
    edges, non_edges, start = axis.lines
    np.testing.assert_allclose(edges.get_xdata(), [3, 7], atol=1e-6)
    np.testing.assert_allclose(non_edges.get_xdata(), [5, 5])
    assert set(start.get_xdata()) == {5}


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_parts_of_the_affinity_field_add_up_to_the_loss(activation):
    torch.manual_seed(0)
    logits = torch.randn(2, 3, 9, 7, dtype=torch.float64)
    shape = (2, 3, 9, 7) if activation == "sigmoid" else (2, 9, 7)
    target = torch.randint(0, 2 if activation == "sigmoid" else 3, shape)
    target[..., :2, :] = 255
    logits[:, :, :2] = torch.nan
    options = {"margin": 2.0, "activation": activation}
    parts = plotting.affinity_field_map(logits, target, (3, 7), **options)
    loss = tritonaff.affinity_field_loss(logits, target, (3, 7), **options)
    torch.testing.assert_close(parts.sum(), loss)
    assert parts.shape == (2, 9, 7)
    assert (parts[:, :2] == 0).all()
    target[:] = 255
    assert (plotting.affinity_field_map(logits, target, activation=activation) == 0).all()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda axis: plotting.label_colors(ZEROS, 2), TypeError, "labels must have dtype"),
        (lambda axis: plotting.label_colors(ZEROS.int(), 0), ValueError, "must be at least 1"),
        (lambda axis: plotting.draw_boundaries(axis, ZEROS[0].int()), ValueError, "H, W"),
        (
            lambda axis: plotting.draw_errors(axis, ZEROS.int(), ZEROS[:3].int(), 2),
            ValueError,
            r"prediction must have shape \(3, 4\)",
        ),
        (lambda axis: plotting.draw_curves(axis, {}), ValueError, "at least one entry"),
        (
            lambda axis: plotting.draw_class_scores(axis, {"a": ZEROS}, ["road"]),
            ValueError,
            r"scores\['a'\] must have shape \(seeds, 1\)",
        ),
        (
            lambda axis: plotting.draw_learned_sizes(axis, tritonaff.AffinityFieldLoss(), ["a"]),
            TypeError,
            "must be an AdaptiveAffinityFieldLoss, got AffinityFieldLoss",
        ),
        (
            lambda axis: plotting.draw_learned_sizes(
                axis, tritonaff.AdaptiveAffinityFieldLoss(2), ["road"]
            ),
            ValueError,
            "a name for each of 2 classes, got 1",
        ),
        (
            lambda axis: plotting.affinity_field_map(
                torch.zeros(1, 2, 3, 3), torch.full((1, 3, 3), 7)
            ),
            ValueError,
            "7",
        ),
    ],
)
def test_bad_input_of_pictures_on_axes(axis, call, error, message):
    with pytest.raises(error, match=message):
        call(axis)
