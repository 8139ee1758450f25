"""Statistics of neighbours: against counts by hand, over batches and over folders."""

import json
import os
import signal
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import pytest
import torch
from disk import full_disk

import tritonaff
from tritonaff import NeighborStatistics
from tritonaff.functional import WEIGHTINGS, signal_weight

RATES = [1, (2, 3)]


def labels(n=4, seed=0):
    """(n, 12, 14) with regions and ignored pixels."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randint(0, 3, (n, 4, 5), generator=generator)
    target = coarse.repeat_interleave(3, dim=1).repeat_interleave(3, dim=2)[:, :, :14]
    return target.masked_fill(torch.rand(target.shape, generator=generator) < 0.1, 255)


def counted(target, rates=RATES):
    statistics = NeighborStatistics(rates)
    statistics.update(target)
    return statistics


def assert_equal(a, b):
    assert torch.equal(a.pixel_count, b.pixel_count)
    assert torch.equal(a.signal_count, b.signal_count)


def test_counts_by_hand():
    statistics = NeighborStatistics([1])
    statistics.update(torch.tensor([[[0, 0, 1, 255]]], dtype=torch.uint8))
    # Pixel 0 has one valid neighbour, the same: n8. Pixels 1 and 2 have one different: n7.
    assert statistics.pixel_count.tolist() == [[0, 0, 0, 0, 0, 0, 0, 2, 1]]
    assert statistics.signal_count[0, 7:].tolist() == [[2, 1], [0, 1]]
    torch.testing.assert_close(statistics.frequencies()[0, 7:], torch.tensor([2, 1]).double() / 3)
    assert statistics.positive_frequency().tolist() == [0.5]


def test_batches_add_up_and_so_do_their_statistics(device):
    target = labels().to(device)
    together = counted(target)
    one_by_one = NeighborStatistics(RATES)
    for image in target:
        one_by_one.update(image[None])
    assert_equal(one_by_one, together)
    merged = counted(target[:1])
    other = counted(target[1:])
    merged.merge(other)
    assert_equal(merged, together)
    assert_equal(other, counted(target[1:]))  # left as it was
    assert together.pixel_count.device.type == device.type
    assert together.frequencies().sum(dim=1).tolist() == pytest.approx([1, 1])


def test_nothing_counted_has_no_nan():
    statistics = NeighborStatistics([1, 99])
    statistics.update(torch.zeros(1, 4, 4, dtype=torch.uint8))
    assert statistics.frequencies().tolist() == [[0.0] * 8 + [1.0], [0.0] * 9]
    assert statistics.positive_frequency().tolist() == [1.0, 0.0]
    for weighting in WEIGHTINGS:
        assert statistics.weight(weighting).isfinite().all()


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_weights_are_those_of_the_loss(weighting):
    statistics = counted(labels())
    weight = statistics.weight(weighting)
    assert weight.shape == (2, 9, 2)
    expected = signal_weight(weighting, statistics.pixel_count, statistics.signal_count)
    torch.testing.assert_close(weight, expected)
    logits = torch.randn(4, 16, 12, 14)
    loss = tritonaff.dilated_affinity_loss(
        logits, labels(), RATES, weighting=weighting, statistics=statistics
    )
    terms = tritonaff.dilated_affinity_terms(logits, labels(), RATES)
    by_hand = (terms.loss_sum * weight).sum(dim=(1, 2)) / terms.pixel_count.sum(dim=1)
    torch.testing.assert_close(loss, by_hand.sum())


def test_state_dict_round_trip(tmp_path):
    statistics = counted(labels())
    torch.save(statistics.state_dict(), tmp_path / "statistics.pt")
    loaded = NeighborStatistics(RATES)
    loaded.load_state_dict(torch.load(tmp_path / "statistics.pt"))
    assert_equal(loaded, statistics)
    state = statistics.state_dict()
    loaded.load_state_dict(state)
    loaded.update(labels())
    assert_equal(counted(labels()), statistics)
    assert torch.equal(state["pixel_count"], statistics.pixel_count)  # shares no memory


@pytest.mark.parametrize(
    ("other", "error", "message"),
    [
        (NeighborStatistics([1]), ValueError, r"the same rates, got .* and \(\(1, 1\),\)"),
        (NeighborStatistics(RATES, 0), ValueError, "the same ignore_index, got 255 and 0"),
        ({}, TypeError, "other must be a NeighborStatistics, got dict"),
    ],
)
def test_only_what_was_counted_alike_is_merged(other, error, message):
    statistics = counted(labels())
    with pytest.raises(error, match=message):
        statistics.merge(other)
    if isinstance(other, NeighborStatistics):
        with pytest.raises(error, match=message):
            statistics.load_state_dict(other.state_dict())
    assert_equal(statistics, counted(labels()))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"rates": 8.0}, TypeError, "rates must be a sequence"),
        ({"pixel_count": [[0.5] * 9] * 2}, TypeError, r"'pixel_count'\] must have dtype int64"),
        ({"signal_count": [[0] * 9] * 2}, ValueError, r"must have shape \(2, 9, 2\)"),
    ],
)
def test_a_bad_state_dict_changes_nothing(change, error, message):
    statistics = counted(labels())
    with pytest.raises(error, match=message):
        statistics.load_state_dict({**counted(labels(seed=1)).state_dict(), **change})
    with pytest.raises(ValueError, match=r"state_dict must hold .* lacks"):
        statistics.load_state_dict({"rates": RATES})
    assert_equal(statistics, counted(labels()))


def test_bad_options_and_targets():
    with pytest.raises(TypeError, match="rates must be a sequence"):
        NeighborStatistics(8.0)
    with pytest.raises(TypeError, match="ignore_index must be an int, got str"):
        NeighborStatistics(RATES, "255")
    with pytest.raises(ValueError, match=r"target must have shape \(N, H, W\)"):
        NeighborStatistics(RATES).update(torch.zeros(4, 4, dtype=torch.uint8))
    with pytest.raises(ValueError, match="weighting must be one of"):
        NeighborStatistics(RATES).weight("inverse")
    with pytest.raises(RuntimeError, match=r"call torch\.distributed\.init_process_group first"):
        NeighborStatistics(RATES).all_reduce()


# The command

Image = pytest.importorskip("PIL.Image")
np = pytest.importorskip("numpy")
pytest.importorskip("matplotlib")
from tritonaff import statistics_cli  # noqa: E402
from tritonaff.files import check_writable, replacing  # noqa: E402


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Three label images, two sizes, one below; the command runs beside it."""
    (tmp_path / "labels" / "below").mkdir(parents=True)
    for name, image in images().items():
        image.save(tmp_path / "labels" / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "labels"


def images():
    arrays = labels().to(torch.uint8).numpy()
    palette = Image.fromarray(arrays[1], mode="L").convert("P")
    palette.putdata(arrays[1].flatten().tolist())
    palette.putpalette(list(range(255, -1, -1)) * 3)
    return {
        "a.png": Image.fromarray(arrays[0]),
        "b.PNG": palette,
        "below/c.png": Image.fromarray(arrays[2, :5]),
    }


def test_the_command_counts_a_folder(folder, capsys):
    assert statistics_cli.main(["labels", "--rates", "1", "2,3", "--workers", "1"]) == 0
    rates = ((1, 1), (2, 3), (3, 2))
    expected = NeighborStatistics(rates)
    target = labels().to(torch.uint8)
    for image in (target[0], target[1], target[2, :5]):
        expected.update(image[None])

    content = json.loads((folder.parent / "neighbors.json").read_text())
    statistics = NeighborStatistics(rates)
    statistics.load_state_dict(content)
    assert_equal(statistics, expected)
    assert content["images"] == 3
    assert content["skipped"] == []
    assert content["ignore_index"] == 255
    assert content["frequencies"] == expected.frequencies().tolist()
    assert content["positive_frequency"] == expected.positive_frequency().tolist()
    assert content["weights"] == {name: expected.weight(name).tolist() for name in WEIGHTINGS}
    assert content["versions"]["tritonaff"] == tritonaff.__version__
    assert Image.open(folder.parent / "neighbors.png").format == "PNG"

    output = capsys.readouterr().out
    assert "written: neighbors.json, neighbors.png" in output
    ignored = sum((image == 255).sum().item() for image in (target[0], target[1], target[2, :5]))
    assert f"labels 0 to 2; 255 is ignored, {ignored} pixels\n" in output
    assert all(len(line) <= 80 for line in output.splitlines())
    row = next(line.split() for line in output.splitlines() if line.startswith("2,3"))
    shown = [*expected.frequencies()[1], expected.positive_frequency()[1]]
    assert row[1:] == [f"{100 * x:.2f}" for x in shown]


def test_options_of_the_command(folder):
    options = ["--rates", "1", "--ignore-index", "0", "--workers", "1"]
    files = ["--json", "new/folder/counts.json", "--plot", "labels/plot.png"]
    for force in ([], ["--force"]):  # the second time the command's own plot is among the labels
        assert statistics_cli.main(["labels", *options, *files, *force]) == 0
    content = json.loads((folder.parent / "new/folder/counts.json").read_text())
    assert (content["ignore_index"], content["images"]) == (0, 3)
    assert not (folder.parent / "neighbors.json").exists()
    assert not (folder.parent / "neighbors.png").exists()
    expected = NeighborStatistics([1], ignore_index=0)
    target = labels().to(torch.uint8)
    for image in (target[0], target[1], target[2, :5]):
        expected.update(image[None])
    assert content["pixel_count"] == expected.pixel_count.tolist()


def test_classes_are_counted_and_weighted(folder, capsys):
    """Label 2 in one image of 16 pixels, label 0 in both, of 32 pixels, label 7 never counts."""
    for path in folder.rglob("*"):
        if path.is_file():
            path.unlink()
    first = np.uint8([[0, 0, 0, 0], [0, 0, 0, 0], [2, 2, 0, 0], [7, 7, 7, 7]])
    Image.fromarray(first).save(folder / "first.png")
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(folder / "second.png")
    command = ["labels", "--rates", "1", "--workers", "1"]
    assert statistics_cli.main([*command, "--ignore-index", "7"]) == 0
    output = capsys.readouterr()
    assert output.err == ""
    assert "2 images, 28 pixels; labels 0, 2; 7 is ignored, 4 pixels" in output.out
    assert "    0                26    92.86        2     0.5385     0.5897\n" in output.out
    content = json.loads(Path("neighbors.json").read_text())
    assert content["classes"] == {"pixels": [26, 0, 2], "images": [2, 0, 1]}
    weights = content["class_weights"]
    assert weights["inverse_frequency"] == pytest.approx([28 / (2 * 26), 0, 28 / (2 * 2)])
    # Frequencies 26 / 28 and 2 / 12, their median 23 / 42.
    assert weights["median_frequency"] == pytest.approx([23 / 42 * 28 / 26, 0, 23 / 42 * 6])


def test_an_ignored_label_that_never_occurs_is_a_warning(folder, capsys):
    command = ["labels", "--rates", "1", "--workers", "1", "--ignore-index", "9"]
    assert statistics_cli.main(command) == 0
    output = capsys.readouterr()
    assert "labels 0 to 2, 255; none is ignored\n" in output.out
    assert "warning: no pixel has the label 9, which is to be ignored" in output.err


@pytest.mark.parametrize("name", ["json", "plot"])
def test_files_are_replaced_only_by_force(folder, capsys, name):
    file = Path("results")
    file.write_text("mine")
    command = ["labels", "--rates", "1", "--workers", "1", f"--{name}", "results"]
    assert statistics_cli.main(command) == 1
    assert f"results exists: --force replaces it, --{name} names another" in capsys.readouterr().err
    assert file.read_text() == "mine"
    assert statistics_cli.main([*command, "--force"]) == 0
    assert file.read_bytes() != b"mine"


def test_any_number_of_workers_writes_the_same(folder):
    written = []
    for workers in ("1", "2"):
        command = ["labels", "--rates", "1", "2", "--workers", workers, "--force"]
        assert statistics_cli.main(command) == 0
        written.append((folder.parent / "neighbors.json").read_bytes())
    assert written[0] == written[1]


def gray_png_of_4_bits():
    """2 x 1 pixels, 1 and 11, which Pillow reads as 17 and 187."""

    def chunk(name, data):
        checked = name + data
        return struct.pack(">I", len(data)) + checked + struct.pack(">I", zlib.crc32(checked))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 1, 4, 0, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(bytes([0, 0x1B])))
    return b"\x89PNG\r\n\x1a\n" + header + pixels + chunk(b"IEND", b"")


def test_what_is_no_label_image_is_named_and_skipped(folder, capsys):
    assert statistics_cli.main(["labels", "--rates", "1", "--workers", "1"]) == 0
    good = json.loads((folder.parent / "neighbors.json").read_text())
    array = np.zeros((4, 5), dtype=np.uint8)
    Image.fromarray(np.stack([array] * 3, axis=-1)).save(folder / "colour.png")
    Image.fromarray(array.astype(np.uint16)).save(folder / "deep.png")
    (folder / "empty.png").write_bytes(b"")
    Image.fromarray(array).save(folder / "jpeg.png", "JPEG")
    (folder / "nibbles.png").write_bytes(gray_png_of_4_bits())
    (folder / "text.png").write_text("no image")
    complete = (folder / "a.png").read_bytes()
    (folder / "below" / "torn.png").write_bytes(complete[: len(complete) // 2])
    (folder / "notes.txt").write_text("not looked at")
    capsys.readouterr()

    assert statistics_cli.main(["labels", "--rates", "1", "--workers", "1", "--force"]) == 1
    errors = capsys.readouterr().err.splitlines()
    names = ["below/torn.png", "colour.png", "deep.png", "empty.png"]
    names += ["jpeg.png", "nibbles.png", "text.png"]
    assert [line.split(":")[1].split()[-1] for line in errors] == names
    assert "expected 8-bit pixels of mode L or P, got mode RGB" in errors[1]
    assert "expected a PNG file, got JPEG" in errors[4]
    assert "expected 8-bit pixels, got 4 bits" in errors[5]
    content = json.loads((folder.parent / "neighbors.json").read_text())
    assert content.pop("skipped") == names
    assert content == {name: value for name, value in good.items() if name != "skipped"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere", "--rates", "1"], "no such folder: nowhere"),
        (["empty", "--rates", "1"], "no PNG files in empty"),
        (["broken", "--rates", "1", "--workers", "1"], "no image in broken could be read"),
        (
            ["ignored", "--rates", "1", "--workers", "1"],
            "no pixel counts at rate 1: all are ignored, or",
        ),
        (["labels", "--rates", str(2**63)], "must fit 64 bits"),
        (["labels", "--rates", "1", "1"], "rates must be at least 1 and distinct"),
        (["labels", "--rates", "1", "--ignore-index", str(2**63)], "must fit 64 bits"),
        (["labels", "--rates", "1", "--json", "labels/a.png/b.json"], "labels/a.png"),
        (["labels", "--rates", "1", "--json", "empty"], "Is a directory: 'empty'"),
        (["labels", "--rates", "1", "--plot", "labels"], "Is a directory: 'labels'"),
        (
            ["labels", "--rates", "1", "--json", "x", "--plot", "empty/../x"],
            "--json and --plot must be two files, got x for both",
        ),
        (["labels", "--rates", "1", "--json", "labels/a.png"], "labels/a.png is a label image"),
        (["labels", "--rates", "1", "--plot", "labels/a.png"], "labels/a.png is a label image"),
        (
            ["labels", "--rates", "64", "--workers", "1"],
            "no pixel has a neighbour at rate 64: the largest image is 14 x 12",
        ),
        (
            ["labels", "--rates", "13", "12,14", "11", "14,90", "--workers", "1"],
            "at rate 12,14 or 14,90 or 90,14: the largest image is 14 x 12",
        ),
        (
            ["far", "--rates", "1", "2", "--workers", "1"],
            "no pixel counts at rate 2: all are ignored, or all their neighbours are, --ignore-",
        ),
    ],
)
def test_errors_take_one_line_and_write_nothing(folder, arguments, message, capsys):
    (folder.parent / "empty").mkdir()
    (folder.parent / "broken").mkdir()
    (folder.parent / "broken" / "a.png").write_bytes(b"")
    (folder.parent / "ignored").mkdir()
    Image.fromarray(np.full((4, 5), 255, np.uint8)).save(folder.parent / "ignored" / "a.png")
    (folder.parent / "far").mkdir()
    Image.fromarray(np.uint8([[1, 1, 255, 255]])).save(folder.parent / "far" / "a.png")
    before = {path: path.is_file() and path.read_bytes() for path in folder.parent.rglob("*")}
    assert statistics_cli.main(arguments) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("tritonaff-stats: ")
    assert message in last
    assert before == {
        path: path.is_file() and path.read_bytes() for path in folder.parent.rglob("*")
    }


def test_links_are_followed_and_nothing_is_read_twice(folder, tmp_path_factory, capsys):
    command = ["labels", "--rates", "1", "--workers", "1", "--force"]
    assert statistics_cli.main(command) == 0
    expected = json.loads((folder.parent / "neighbors.json").read_text())
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (folder / "below").rename(elsewhere / "below")
    (folder / "a.png").rename(elsewhere / "one.png")
    (elsewhere / "back").symlink_to(folder)
    (elsewhere / "below" / "loop").symlink_to(elsewhere / "below")
    (folder / "linked").symlink_to(elsewhere / "below")
    (folder / "twice").symlink_to(elsewhere)
    (folder / "z.png").symlink_to(elsewhere / "one.png")
    (folder / "self").symlink_to(folder)
    assert statistics_cli.main(command) == 0
    assert json.loads((folder.parent / "neighbors.json").read_text()) == expected

    (folder / "lost.png").symlink_to("nowhere.png")
    capsys.readouterr()
    assert statistics_cli.main(command) == 1
    errors = capsys.readouterr().err
    assert errors.startswith("tritonaff-stats: skipped lost.png: [Errno 2] No such file")
    assert json.loads((folder.parent / "neighbors.json").read_text())["images"] == 3


def test_a_folder_that_cannot_be_listed_is_not_left_out(folder, monkeypatch, capsys):
    scandir = os.scandir

    def refuse(path):
        if Path(path).name == "below":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert statistics_cli.main(["labels", "--rates", "1", "--workers", "1"]) == 1
    errors = capsys.readouterr().err
    assert errors == "tritonaff-stats: [Errno 13] Permission denied: 'labels/below'\n"


@pytest.mark.parametrize("size", [1000, 20_000])  # the statistics are larger; the picture alone is
def test_a_full_disk_leaves_what_was_there(folder, capsys, size):
    command = ["labels", "--rates", "1", "2", "--workers", "1", "--force"]
    assert statistics_cli.main(command) == 0
    before = {path.name: path.read_bytes() for path in folder.parent.iterdir() if path.is_file()}
    assert set(before) == {"neighbors.json", "neighbors.png"}
    assert len(before["neighbors.json"]) < 20_000 < len(before["neighbors.png"])
    capsys.readouterr()
    with full_disk(size):
        assert statistics_cli.main([*command, "--ignore-index", "0"]) == 1
    errors = capsys.readouterr().err.splitlines()
    name = {1000: "neighbors.json", 20_000: "neighbors.png"}[size]
    assert errors == [f"tritonaff-stats: [Errno 27] File too large: '{name}'"]
    after = {path.name: path.read_bytes() for path in folder.parent.iterdir() if path.is_file()}
    assert after == before


def test_outputs_through_links_and_into_pipes(tmp_path):
    (tmp_path / "folder").mkdir()
    real, link = tmp_path / "folder" / "real.txt", tmp_path / "link.txt"
    link.symlink_to(real)
    for text in ("first", "second"):
        check_writable(link)
        with replacing(link) as new:
            assert new.parent == real.parent  # a file moves in one step within a disk only
            new.write_text(text)
        assert link.is_symlink()
        assert real.read_text() == text
    check_writable(real)
    assert real.read_text() == "second"
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        check_writable(pipe)
        with replacing(pipe) as new:
            new.write_text("through")
        assert os.read(reader, 100) == b"through"
    finally:
        os.close(reader)
    assert pipe.is_fifo()
    assert sorted(path.name for path in tmp_path.rglob("*")) == [
        "folder", "link.txt", "pipe", "real.txt",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["labels"], "--rates"),
        (["labels", "--rates", "1,2,3"], "expected R or R1,R2 of positive integers, got '1,2,3'"),
        (["labels", "--rates", "0"], "got '0'"),
        (["labels", "--rates", "x"], "got 'x'"),
        (["labels", "--rates", "1", "--workers", "0"], "expected a positive integer, got '0'"),
    ],
)
def test_bad_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit:
        statistics_cli.main(arguments)
    assert exit.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.skipif(sys.platform != "linux", reason="sees in /proc whether workers have started")
@pytest.mark.nightly
def test_an_interrupt_ends_it_without_a_traceback(folder):
    """Ctrl-C reaches every process of the group, here while workers start."""
    for k in range(5000):
        (folder / f"copy{k}.png").write_bytes((folder / "a.png").read_bytes())
    command = [sys.executable, "-m", "tritonaff.statistics_cli", "labels", "--rates", "1"]
    process = subprocess.Popen(
        [*command, "--workers", "2"],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # A process that a shell starts in the background ignores the signal, and so would this one.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    children = f"/proc/{process.pid}/task/{process.pid}/children"
    deadline = time.monotonic() + 60
    while len(Path(children).read_text().split()) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)  # two workers, and multiprocessing's own
    time.sleep(0.3)  # they import torch
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=300)  # workers import torch before they end
    assert errors == "tritonaff-stats: interrupted\n"
    # During an exec of a string CPython ends by the signal, although the signal was handled.
    assert process.returncode in (130, -signal.SIGINT)
