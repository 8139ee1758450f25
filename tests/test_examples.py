"""The training example as its users run it, small."""

import contextlib
import importlib
import os
import random
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
import zlib
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import tritonaff

Image = pytest.importorskip("PIL.Image")
np = pytest.importorskip("numpy")
pytest.importorskip("matplotlib")
pytest.importorskip("rich")

SCRIPT = Path(__file__).parent.parent / "examples/train_segmentation.py"
LOSSES = ["ce", "ce+aaf", "ce+ar", "ce+dilated"]
TITLES = ["cross-entropy" + suffix for suffix in ("", " + AAF", " + AR", " + dilated")]
SMALL = ["--steps", "2", "--batch-size", "2", "--size", "32", "48"]


def run(*arguments, torchrun=0, **environment):
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={torchrun}"]
    return subprocess.run(
        [sys.executable, *(launcher if torchrun else ()), str(SCRIPT), *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "80", **environment},
    )


@pytest.fixture
def folder(tmp_path):
    """A data set of two gray and one colour image, each with a void pixel."""
    root = tmp_path / "data"
    rng = np.random.default_rng(0)
    for i, split in enumerate(("train", "val", "test")):
        for kind in ("images", "labels"):
            (root / kind / split).mkdir(parents=True)
        size = (40, 56) if i else (40, 56, 3)
        image = rng.integers(0, 256, size).astype(np.uint8)
        Image.fromarray(image).save(root / "images" / split / "one.png")
        labels = rng.integers(0, 3, (40, 56)).astype(np.uint8)
        labels[0, 0] = 11
        Image.fromarray(labels).save(root / "labels" / split / "one.png")
    (root / "classes.txt").write_text("road\npole\nsky\n")
    return root


@pytest.fixture
def script(monkeypatch):
    monkeypatch.setenv("GOMP_SPINCOUNT", "10000")  # or the script would, for good
    monkeypatch.syspath_prepend(SCRIPT.parent)
    return importlib.import_module("train_segmentation")


def check_output(result, output, name, other="cross-entropy + AAF"):
    assert result.returncode == 0, result.stderr
    for title in ("cross-entropy", other):
        cells = re.escape(title), r"0\.\d+", r"0\.\d+", r"\d+\.\d"
        row = re.search(r"\|\s*" + r"\s*\|\s*".join(cells) + r"\s*\|", result.stdout)
        assert row, result.stdout
    table = [line for line in result.stdout.splitlines() if line.startswith(("|", "+"))]
    assert max(map(len, table)) <= 80
    picture = output / f"{name}.png"
    assert f"picture: {picture}" in result.stdout
    assert Image.open(picture).size[0] > 500


def test_drawn_scenes(tmp_path):
    result = run(*SMALL, "--no-compile", "--output", tmp_path)
    check_output(result, tmp_path, "scenes")
    assert "cross-entropy + AR" not in result.stdout  # only where it is asked for


def test_a_data_set_in_a_folder(folder, tmp_path):
    arguments = ["--data", folder, "--ignore-index", 11, "--output", tmp_path]
    result = run(*SMALL, "--no-compile", *arguments)
    check_output(result, tmp_path, "data")


def test_without_a_compiler_it_says_so_and_trains(folder, tmp_path):
    arguments = ["--data", folder, "--ignore-index", 11, "--output", tmp_path]
    cache = tmp_path / "cache"
    result = run(*SMALL, *arguments, CXX="/nowhere/g++", TORCHINDUCTOR_CACHE_DIR=str(cache))
    check_output(result, tmp_path, "data")
    assert len(re.findall("training in eager mode", result.stdout)) == 1


def test_affinity_regression_and_its_heat_maps(folder, tmp_path):
    arguments = ["--data", folder, "--ignore-index", 11, "--output", tmp_path, "--no-compile"]
    result = run(*SMALL, *arguments, "--steps", 3, "--learning-rate", 0.1, "--loss", "ce", "ce+ar")
    check_output(result, tmp_path, "data", "cross-entropy + AR")
    line = (
        r"affinity regression on the test split: "
        r"(0\.\d{4}) before, (0\.\d{4}) after, (0\.\d{4}) cross-entropy\n"
    )
    ((before, after, without),) = re.findall(line, result.stdout)
    assert len({before, after, without}) == 3
    heat_maps = tmp_path / "data-affinity.png"
    assert f"heat maps: {heat_maps}" in result.stdout
    picture = np.asarray(Image.open(heat_maps).convert("RGB")).astype(int)
    assert picture.shape[1] > 2 * picture.shape[0] > 1000
    # The void pixel is a point of both grids: gray lines in each of the three.
    void = (np.ptp(picture, axis=-1) == 0) & (picture[..., 0] > 100) & (picture[..., 0] < 200)
    columns = np.flatnonzero(void.sum(axis=0) > picture.shape[0] / 2)
    assert len(np.flatnonzero(np.diff(columns, prepend=-9) > 1)) == 3 * 2


def test_fewer_steps_than_affinity_regression_needs(folder, tmp_path):
    arguments = ["--data", folder, "--ignore-index", 11, "--output", tmp_path, "--no-compile"]
    result = run(*SMALL, *arguments, "--loss", "ce", "ce+ar")
    check_output(result, tmp_path, "data", "cross-entropy + AR")
    assert "heat maps" not in result.stdout


def test_affinity_regression_joins_in_the_last_third(script):
    data = script.Dataset("", ["road", "pole", "sky"], [], [], [])
    criterion = script.CrossEntropyAR(data, Namespace(ignore_index=255))
    logits, target = torch.randn(2, 3, 24, 24), torch.randint(0, 3, (2, 24, 24))
    target[:, :5] = 255
    before = F.cross_entropy(logits, target, ignore_index=255)
    after = before + 0.1 * tritonaff.AffinityRegressionLoss(ignore_index=255)(logits, target)
    assert after > before + 1e-3
    torch.compiler.reset()
    compiled = torch.compile(criterion, fullgraph=True, backend="eager")
    for step in range(9):
        progress = torch.tensor(step / 9)
        with torch.compiler.set_stance("fail_on_recompile" if step else "default"):
            loss = compiled(script.Output(logits, None), target, progress)
        torch.testing.assert_close(loss, before if step < 6 else after)


def table_rows(text):
    lines = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("| ")]
    return {title.strip(): [cell.strip() for cell in cells] for title, *cells in lines}


@pytest.mark.parametrize("place", ["labels", "head"])
def test_dilated_affinity_its_propagation_and_what_they_cost(folder, tmp_path, place):
    for kind in ("images", "labels"):  # one more, of an odd size
        image = np.asarray(Image.open(folder / kind / "test/one.png"))[:37, :51]
        Image.fromarray(image).save(folder / kind / "test/two.png")
    arguments = ["--data", folder, "--ignore-index", 11, "--output", tmp_path, "--no-compile"]
    arguments += ["--size", 31, 45, "--loss", "ce", "ce+dilated", "--affinity-at", place]
    result = run(*SMALL, *arguments)
    check_output(result, tmp_path, "data", "cross-entropy + dilated")
    rows = table_rows(result.stdout)
    assert rows["test mIoU after iterations"] == ["0", "1", "3", "6", "10"]
    for name in ("predicted affinity", "ground-truth affinity"):
        assert rows[name][0] == rows["cross-entropy + dilated"][0]
        assert all(re.fullmatch(r"0\.\d{3}", cell) for cell in rows[name])
    assert rows["predicted affinity"] != rows["ground-truth affinity"]

    assert rows["cost of an image, 40x56"] == ["parameters", "MFLOP", "time (ms)"]
    parameters, flops, times = zip(*list(rows.values())[-3:], strict=True)
    assert list(rows)[-3:] == ["network", "affinity head", "10 iterations"]
    assert parameters == ("292179", str(33 * 16), "0")
    # A product and a sum: 32 features, 16 logits, half the size; 10 times 3 classes, 16 neighbours.
    head, propagation = 2 * 32 * 16 * 20 * 28, 2 * 10 * 3 * 17 * 40 * 56
    assert flops[1:] == (f"{head / 1e6:.1f}", f"{propagation / 1e6:.1f}")
    assert float(flops[0]) > 50 * float(flops[1])
    assert all(float(ms) > 0 for ms in times)


@pytest.fixture
def blocks():
    """Images and labels of an odd size, three classes in blocks, a few pixels ignored."""
    rng = np.random.default_rng(0)
    pairs = []
    for _ in range(3):
        labels = rng.integers(0, 3, (5, 7)).astype(np.uint8).repeat(5, 0).repeat(5, 1)
        labels[rng.random(labels.shape) < 0.05] = 255
        pairs.append((rng.integers(0, 256, (*labels.shape, 3)).astype(np.uint8), labels))
    return pairs


@pytest.mark.parametrize("place", ["labels", "head"])
def test_dilated_affinity_beside_cross_entropy(script, blocks, place):
    data = script.Dataset("", ["road", "pole", "sky"], blocks, [], [])
    criterion = script.CrossEntropyDilated(data, Namespace(ignore_index=255, affinity_at=place))
    images, labels = (torch.from_numpy(np.stack(x)) for x in zip(*blocks, strict=True))
    images, target = script.to_input(images, "cpu"), labels.long()
    torch.manual_seed(0)
    bare = script.SmallUNet(3)
    torch.manual_seed(0)
    network = script.SmallUNet(3, criterion.neighbors)
    for name, weight in bare.state_dict().items():
        assert torch.equal(weight, network.state_dict()[name])

    rates, compared = ((4, 8), target) if place == "labels" else ((2, 4), target[:, ::2, ::2])
    statistics = tritonaff.NeighborStatistics(rates)
    statistics.update(compared)
    frequency = network.affinity.bias.sigmoid().view(2, 8)
    expected = statistics.positive_frequency().float()[:, None].expand(-1, 8)
    torch.testing.assert_close(frequency, expected, atol=1e-3, rtol=0)

    output = network(images)
    assert output.affinity.shape == (3, 16, 13, 18)
    affinity = output.affinity
    if place == "labels":
        affinity = F.interpolate(affinity, (25, 35), mode="bilinear", align_corners=False)
    dilated = tritonaff.dilated_affinity_loss(
        affinity, compared, rates, statistics=statistics, beta=0.15
    )
    expected = F.cross_entropy(output.logits, target, ignore_index=255) + dilated

    def forward(images, target, progress):
        return criterion(network(images), target, progress)

    torch.compiler.reset()
    loss = torch.compile(forward, fullgraph=True, backend="aot_eager")(
        images, target, torch.tensor(0.5)
    )
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in network.affinity.parameters())


def test_every_column_of_the_propagation_is_one_long_call(script, blocks):
    class Noise(nn.Module):
        def __init__(self):
            super().__init__()
            self.anchor = nn.Parameter(torch.zeros(()))

        def forward(self, x):
            torch.manual_seed(int(x.sum()))
            return script.Output(torch.randn(1, 3, *x.shape[2:]), 3 * torch.randn(1, 16, 13, 18))

    network = Noise()
    table = script.refinement(network, blocks, num_classes=3, ignore_index=255)
    assert table.shape == (2, 5)
    for k, iterations in enumerate((0, 1, 3, 6, 10)):
        confusion = np.zeros((2, 3, 3), int)
        for image, labels in blocks:
            logits, affinity = script.infer(network, image)
            target = torch.from_numpy(labels)[None]
            predicted = F.interpolate(affinity, target.shape[1:], mode="bilinear")
            truth = tritonaff.dilated_affinity_target(target, (4, 8))
            truth = truth.masked_fill(truth == 255, 0).float()
            for row, source in enumerate((predicted, truth)):
                classes = tritonaff.affinity_propagation(
                    logits.softmax(dim=1),
                    source,
                    (4, 8),
                    iterations=iterations,
                    from_logits=row == 0,
                )[0].argmax(dim=0)
                counted = labels != 255
                np.add.at(confusion[row], (labels[counted], classes.numpy()[counted]), 1)
        for row in range(2):
            hits = np.diag(confusion[row])
            iou = hits / (confusion[row].sum(0) + confusion[row].sum(1) - hits)
            assert table[row, k].item() == pytest.approx(iou.mean(), abs=1e-6)
    assert len(set(table.flatten().tolist())) == 9  # but for what is before any iteration


# ----------------------------------------------------------------- several processes, checkpoints


def write_pairs(folder):
    """More images, of blocks, with unequal numbers of void pixels."""
    rng = np.random.default_rng(1)
    for split in ("train", "val", "test"):
        for k in range(3):
            image = rng.integers(0, 256, (40, 56, 3)).astype(np.uint8)
            Image.fromarray(image).save(folder / "images" / split / f"{k}.png")
            labels = rng.integers(0, 3, (10, 14)).astype(np.uint8).repeat(4, 0).repeat(4, 1)
            labels[: 15 * k] = 11
            Image.fromarray(labels).save(folder / "labels" / split / f"{k}.png")


def read_losses(path):
    heading, *rows = [line.split(",") for line in path.read_text().splitlines()]
    return {name: [float(row[k]) for row in rows] for k, name in enumerate(heading)}


# On the CPU, as users run it, without the interpreter of the other tests.
AS_USERS = {"TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1"}


def test_several_processes_compute_what_one_does(folder, tmp_path):
    write_pairs(folder)
    arguments = ["--data", folder, "--ignore-index", 11, "--no-compile", "--steps", 3]
    arguments += ["--batch-size", 5, "--size", 32, 48, "--loss"]
    result = run(*arguments, *LOSSES, "--output", tmp_path / "1", **AS_USERS)
    assert result.returncode == 0, result.stderr
    expected, table = read_losses(tmp_path / "1/data-losses.csv"), table_rows(result.stdout)
    assert list(expected) == ["step", *LOSSES]
    assert len(set(expected["ce+ar"])) == 3
    # Of five images 2, 2 and 1.
    output = tmp_path / "3"
    result = run(*arguments, *LOSSES, "--output", output, torchrun=3, **AS_USERS)
    assert result.returncode == 0, result.stderr
    assert "on cpu, 3 processes" in result.stdout
    losses = read_losses(output / "data-losses.csv")
    scores = table_rows(result.stdout)
    for name, title in zip(LOSSES, TITLES, strict=True):
        assert losses[name] == pytest.approx(expected[name], rel=2e-4), name
        for value, by_one in zip(scores[title][:2], table[title][:2], strict=True):
            assert float(value) == pytest.approx(float(by_one), abs=0.01)


def test_a_batch_that_is_too_small_for_the_processes(script, monkeypatch, capsys):
    monkeypatch.setattr(script.ranks, "size", lambda: 3)
    monkeypatch.setattr(sys, "argv", ["train_segmentation.py", "--batch-size", "2"])
    assert script.main() == 2
    assert capsys.readouterr() == ("", "error: a batch of 2 is too small for 3 processes\n")


def test_a_killed_training_goes_on_to_the_same_losses(
    script, folder, tmp_path, monkeypatch, capsys
):
    write_pairs(folder)
    arguments = ["--data", folder, "--ignore-index", 11, "--no-compile", "--steps", 12]
    arguments += ["--batch-size", 2, "--size", 32, 48, "--loss", "ce+ar", "--save-every", 1]
    killed = [*arguments, "--output", tmp_path / "killed"]
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), *map(str, killed)],
        env={**os.environ, **AS_USERS},
        stdout=subprocess.DEVNULL,
    )
    checkpoint = tmp_path / "killed/data-ce+ar.pt"
    while not checkpoint.exists() and process.poll() is None:
        time.sleep(0.01)
    time.sleep(random.uniform(0, 0.2))  # any moment will do
    process.kill()
    assert process.wait() == -signal.SIGKILL
    done = len(torch.load(checkpoint)["losses"])
    assert 1 <= done <= 12

    whole = [*arguments, "--resume", "--output", tmp_path / "whole"]
    results = [
        run(*killed, "--resume", **AS_USERS),
        run(*whole, **AS_USERS),
        run(*whole, **AS_USERS),  # of a training that is done already
    ]
    for result in results:
        assert result.returncode == 0, result.stderr
    assert "goes on after step 12/12" in results[2].stdout
    assert f"cross-entropy + AR: goes on after step {done}/12" in results[0].stdout
    assert "goes on" not in results[1].stdout
    losses, expected = (
        read_losses(tmp_path / name / "data-losses.csv") for name in ("killed", "whole")
    )
    assert losses == expected
    heat_maps = [result.stdout.split("test split: ")[1].splitlines()[0] for result in results]
    assert heat_maps[0] == heat_maps[1] == heat_maps[2]

    other = [str(SCRIPT), *map(str, killed), "--resume", "--seed", "1"]
    monkeypatch.setattr(sys, "argv", other)
    assert script.main() == 2
    errors = capsys.readouterr().err
    assert re.fullmatch("error: .*is of a training with seed 0, not 1: .*\n", errors)


def test_a_checkpoint_is_whole_or_not_there(script, tmp_path, monkeypatch):
    checkpoints = importlib.import_module("checkpoints")
    path = tmp_path / "new/one.pt"
    training = {"seed": 3}
    assert checkpoints.load(path, training) is None
    checkpoints.save(path, {"training": training, "step": 1})

    def fail(content, file):
        file.write(b"half of it")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", fail)
        with pytest.raises(KeyboardInterrupt):
            checkpoints.save(path, {"training": training, "step": 2})
    assert checkpoints.load(path, training)["step"] == 1
    checkpoints.save(path, {"training": training, "step": 3})
    assert checkpoints.load(path, training)["step"] == 3
    with pytest.raises(checkpoints.CheckpointError, match="with seed 3, not 4"):
        checkpoints.load(path, {"seed": 4})
    with full_disk(1000), pytest.raises(OSError, match=r"File too large: '.*one.pt'"):
        checkpoints.save(path, {"training": training, "step": torch.arange(1000)})
    assert checkpoints.load(path, training)["step"] == 3
    assert os.listdir(path.parent) == ["one.pt"]
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(checkpoints.CheckpointError, match=r"cannot read .*one.pt"):
        checkpoints.load(path, training)


@contextlib.contextmanager
def full_disk(size):
    """No file grows beyond that many bytes."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_takes_one_line_and_leaves_no_part(
    script, folder, tmp_path, monkeypatch, capsys
):
    arguments = ["--data", folder, "--ignore-index", 11, "--output", tmp_path / "runs"]
    arguments = [*SMALL, *map(str, arguments), "--no-compile", "--loss", "ce"]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments])
    with full_disk(1000):
        assert script.main() == 2
    error = f"error: [Errno 27] File too large: '{tmp_path}/runs/data-ce.pt'\n"
    assert capsys.readouterr().err == error
    assert os.listdir(tmp_path / "runs") == []
    # The checkpoint and the losses are there, the picture does not fit.
    assert script.main() == 0
    files = {path: path.read_bytes() for path in (tmp_path / "runs").iterdir()}
    monkeypatch.setattr(script.checkpoints, "save", lambda *args: None)
    capsys.readouterr()
    with full_disk(1000):
        assert script.main() == 2
    error = f"error: [Errno 27] File too large: '{tmp_path}/runs/data.png'\n"
    assert capsys.readouterr().err == error
    assert set(files) == set((tmp_path / "runs").iterdir())
    assert files[tmp_path / "runs/data.png"] == (tmp_path / "runs/data.png").read_bytes()


def test_an_interrupted_training_says_how_to_go_on(folder, tmp_path):
    arguments = ["--data", folder, "--ignore-index", 11, "--no-compile", "--steps", 10_000]
    arguments += ["--batch-size", 2, "--size", 32, 48, "--loss", "ce", "--save-every", 1]
    output = tmp_path / "runs"
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), *map(str, arguments), "--output", str(output)],
        env={**os.environ, **AS_USERS},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        # What a shell starts in the background ignores it, and so would this.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    while not (output / "data-ce.pt").exists() and process.poll() is None:
        time.sleep(0.01)
    time.sleep(random.uniform(0, 0.2))  # any moment will do
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    how = f"with --resume, the same command goes on from the checkpoints in {output}"
    assert errors == f"interrupted: {how}\n"
    assert process.returncode == 130
    assert os.listdir(output) == ["data-ce.pt"]
    done = len(torch.load(output / "data-ce.pt")["losses"])
    assert 1 <= done < 10_000


def test_names_of_classes_are_no_mathematics(script, folder, tmp_path, monkeypatch):
    names = [r"$\x$", "$x^2$", "_sky"]
    (folder / "classes.txt").write_text("\n".join(names))
    figures = []
    save = script.Figure.savefig

    def keep(figure, *args, **options):
        figures.append(figure)
        save(figure, *args, **options)

    monkeypatch.setattr(script.Figure, "savefig", keep)
    script.draw(tmp_path / "one.png", script.load_folder(folder, 11), [])
    assert Image.open(tmp_path / "one.png").format == "PNG"
    texts = figures[0].legends[0].get_texts()
    assert [text.get_text() for text in texts] == names
    assert not any(text.get_parse_math() for text in texts)


# ------------------------------------------------------------------------------- kinds of images


def gray_png(pixels, bits):
    """PNG bytes of gray pixels of 1 to 16 bits."""

    def chunk(name, data):
        checked = name + data
        return struct.pack(">I", len(data)) + checked + struct.pack(">I", zlib.crc32(checked))

    height, width = pixels.shape
    shifts = np.arange(bits)[::-1]
    digits = (pixels[..., None] >> shifts & 1).reshape(height, -1).astype(np.uint8)
    rows = b"".join(b"\0" + row.tobytes() for row in np.packbits(digits, axis=1))
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0))
    content = header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + content


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_gray_images_span_their_range(script, folder, bits):
    """Whatever their bits: white is 255, and nothing is clipped."""
    most = 2**bits - 1
    pixels = np.random.default_rng(0).integers(0, most + 1, (40, 56))
    pixels[0, :2] = 0, most
    (folder / "images/train/one.png").write_bytes(gray_png(pixels, bits))
    image, _ = script.load_folder(folder, 11).train[0]
    expected = np.round(pixels / most * 255).astype(np.uint8)
    assert (image == expected[..., None]).all()
    assert image.shape == (40, 56, 3)


def test_older_versions_of_pillow_read_16_bits_as_32(script, folder, monkeypatch):
    pixels = np.random.default_rng(0).integers(0, 65536, (40, 56))
    (folder / "images/train/one.png").write_bytes(gray_png(pixels, 16))
    expected, _ = script.load_folder(folder, 11).train[0]
    opened = Image.open

    def older(path):
        image = opened(path)
        if image.mode == "I;16":
            wide = Image.fromarray(np.array(image).astype(np.int32))
            wide.format = image.format
            return wide
        return image

    monkeypatch.setattr(Image, "open", older)
    image, _ = script.load_folder(folder, 11).train[0]
    assert (image == expected).all()
    assert len(np.unique(image)) == 256


def test_jpegs_of_either_suffix_are_read(script, folder):
    image = Image.open(folder / "images/train/one.png")
    for name in ("a.jpg", "b.jpeg", "c.JPEG"):
        image.save(folder / "images/train" / name, "JPEG")
        shutil.copy(folder / "labels/train/one.png", folder / "labels/train" / f"{name[0]}.png")
    assert len(script.load_folder(folder, 11).train) == 4


# ----------------------------------------------------------------------------- broken data sets


def remove_labels(folder):
    (folder / "labels/train/one.png").unlink()


def remove_classes(folder):
    (folder / "classes.txt").unlink()


def empty_split(folder):
    (folder / "images/val/one.png").unlink()


def other_size(folder):
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(folder / "labels/train/one.png")


def strange_label(folder):
    Image.fromarray(np.full((40, 56), 77, np.uint8)).save(folder / "labels/test/one.png")


def colour_label(folder):
    Image.fromarray(np.zeros((40, 56, 3), np.uint8)).save(folder / "labels/train/one.png")


def broken_image(folder):
    (folder / "images/train/one.png").write_bytes(b"no image")


def empty_image(folder):
    (folder / "images/train/one.png").write_bytes(b"")


def half_an_image(folder):
    path = folder / "images/val/one.png"
    path.write_bytes(path.read_bytes()[:-1000])


def other_bytes(folder):
    path = folder / "labels/test/one.png"
    content = bytearray(path.read_bytes())
    content[40:60] = bytes(20)
    path.write_bytes(content)


def no_folder(folder):
    shutil.rmtree(folder)


def image_of_unknown_range(folder, dtype):
    image = Image.fromarray(np.zeros((40, 56), dtype))
    image.save(folder / "images/train/one.png", "TIFF")


def floating_image(folder):
    image_of_unknown_range(folder, np.float32)


def image_of_32_bits(folder):
    image_of_unknown_range(folder, np.int32)


def labels_of_2_bits(folder):
    labels = np.random.default_rng(0).integers(0, 3, (40, 56))
    (folder / "labels/val/one.png").write_bytes(gray_png(labels, 2))


def labels_of_4_bits(folder):
    labels = np.random.default_rng(0).choice((0, 15), (40, 56))
    (folder / "labels/val/one.png").write_bytes(gray_png(labels, 4))


def labels_of_a_jpeg(folder):
    Image.fromarray(np.zeros((40, 56), np.uint8)).save(folder / "labels/train/one.png", "JPEG")


def void_labels(folder):
    Image.fromarray(np.full((40, 56), 11, np.uint8)).save(folder / "labels/train/one.png")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove_labels, "has no labels"),
        (remove_classes, "there is no .*classes.txt"),
        (empty_split, "there is no .jpg, .jpeg or .png in .*val"),
        (other_size, "is 4x4, its image .* is 56x40"),
        (strange_label, "holds 77, neither one of the 3 classes"),
        (colour_label, "expected 8-bit pixels of mode L or P, got mode RGB"),
        (labels_of_2_bits, "cannot read .*one.png: expected 8-bit pixels, got 2 bits"),
        (labels_of_4_bits, "cannot read .*one.png: expected 8-bit pixels, got 4 bits"),
        (labels_of_a_jpeg, "cannot read .*one.png: expected a PNG file, got JPEG"),
        (void_labels, "all pixels in .*labels/train are ignored, --ignore-index 11"),
        (floating_image, "cannot read .*one.png: expected 8-bit or 16-bit pixels, got mode F"),
        (image_of_32_bits, "cannot read .*one.png: expected 8-bit or 16-bit pixels, got mode I"),
        (broken_image, "cannot read .*one.png"),
        (empty_image, "cannot read .*one.png"),
        (half_an_image, "cannot read .*one.png"),
        (other_bytes, "cannot read .*one.png"),
        (no_folder, "there is no .*classes.txt"),
    ],
)
def test_a_broken_folder_is_named_in_one_line(script, folder, monkeypatch, capsys, damage, message):
    damage(folder)
    arguments = ["train_segmentation.py", "--data", str(folder), "--ignore-index", "11"]
    monkeypatch.setattr(sys, "argv", arguments)
    monkeypatch.setattr(script, "train", lambda *args: pytest.fail("it trained"))
    assert script.main() == 2
    output, errors = capsys.readouterr()
    assert re.fullmatch(f"error: .*{message}.*\n", errors)
    assert output == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--output", "file"], r"\[Errno 17\] File exists: 'file'"),
        (["--output", "runs"], r"\[Errno 21\] Is a directory: 'runs/data.png'"),
        (["--batch-size", "1", "--size", "8", "5"], "a batch of one crop of 8x8 or less"),
    ],
)
def test_outputs_and_sizes_are_refused_before_training(
    script, folder, tmp_path, monkeypatch, capsys, arguments, message
):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("")
    Path("runs/data.png").mkdir(parents=True)
    command = [str(SCRIPT), "--data", str(folder), "--ignore-index", "11"]
    monkeypatch.setattr(sys, "argv", [*command, *arguments])
    monkeypatch.setattr(script, "train", lambda *args: pytest.fail("it trained"))
    assert script.main() == 2
    output, errors = capsys.readouterr()
    assert re.fullmatch(f"error: {message}.*\n", errors)
    assert output == ""


@pytest.mark.parametrize("seed", ["-1", str(2**63), "x"])
def test_seeds_that_no_generator_takes(script, monkeypatch, capsys, seed):
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), f"--seed={seed}"])
    with pytest.raises(SystemExit):
        script.main()
    assert f"{seed!r} is not a whole number from 0 to" in capsys.readouterr().err
