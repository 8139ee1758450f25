"""The training examples as their users run them, small."""

import argparse
import csv
import importlib
import json
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
from pathlib import Path

import pytest
import torch
from disk import full_disk
from folders import save_folder
from torch.nn import functional as F

import tritonaff

Image = pytest.importorskip("PIL.Image")
np = pytest.importorskip("numpy")
pytest.importorskip("matplotlib")
pytest.importorskip("rich")

SCRIPT = Path(__file__).parent.parent / "examples/train.py"
LOSSES = ["ce", "ce+aaf", "ce+ar", "ce+dilated"]
TITLES = ["cross-entropy" + suffix for suffix in ("", " + AAF", " + AR", " + dilated")]
SMALL = ["--no-compile", "--steps", "3", "--batch-size", "2", "--size", "31", "45"]
# On the CPU, as users run it, without the interpreter of the other tests.
AS_USERS = {"TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1", "COLUMNS": "80"}


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
    monkeypatch.setenv("GOMP_SPINCOUNT", "10000")  # or the script would change it for good
    monkeypatch.syspath_prepend(SCRIPT.parent)
    return importlib.import_module("train")


@pytest.fixture
def main(script, monkeypatch):
    """Runs the script in this process, on torch operations; its exit status."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, arguments)])
        with tritonaff.use_backend("portable"):
            return script.main()

    return run


def test_a_data_set_in_a_folder(folder, tmp_path):
    arguments = ["--data", folder, "--ignore-index", 11, "--output", tmp_path, "--loss", *LOSSES]
    result = subprocess.run(
        [sys.executable, str(SCRIPT), *SMALL, *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, **AS_USERS},
    )
    assert result.returncode == 0, result.stderr
    for title in TITLES:
        cells = re.escape(title), r"0\.\d+", r"(?:0\.\d+|-)", r"0\.\d+", r"\d+\.\d"
        row = re.search(r"\|\s*" + r"\s*\|\s*".join(cells) + r"\s*\|", result.stdout)
        assert row, result.stdout
    table = [line for line in result.stdout.splitlines() if line.startswith(("|", "+"))]
    assert max(map(len, table)) <= 80
    assert "thin classes: " in result.stdout
    pictures = [tmp_path / "data.png", tmp_path / "data-training.png"]
    places = f"pictures: {pictures[0]}, {pictures[1]}\n"
    assert f"{places}losses and validation mIoU: {tmp_path}/data-losses.csv\n" in result.stdout
    assert all(Image.open(picture).size[0] > 500 for picture in pictures)
    with (tmp_path / "data-losses.csv").open(newline="") as file:
        heading, *rows = csv.reader(file)
    assert heading == ["step", *LOSSES, *(f"{name} val mIoU" for name in LOSSES)]
    assert [row[0] for row in rows] == ["0", "1", "2"]
    assert all(0 <= float(row[5]) <= 1 for row in rows)
    ce, aaf, ar, dilated = zip(*(map(float, row[1:5]) for row in rows), strict=True)
    assert ce[:2] == ar[:2]  # the same weights and batches, and no other loss before the last third
    assert ce[2] < ar[2]
    assert ce[0] < min(aaf[0], dilated[0])


def test_affinity_regression_joins_in_the_last_third(script):
    data = script.Dataset("", ["road", "pole", "sky"], [], [], [])
    criterion = script.CrossEntropyAR(data, 255)
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


def test_dilated_affinity_beside_cross_entropy(script, blocks):
    data = script.Dataset("", ["road", "pole", "sky"], blocks, [], [])
    criterion = script.CrossEntropyDilated(data, 255)
    images, labels = (torch.from_numpy(np.stack(x)) for x in zip(*blocks, strict=True))
    images, target = script.to_input(images, "cpu"), labels.long()
    torch.manual_seed(0)
    bare = script.SmallUNet(3)
    torch.manual_seed(0)
    network = script.SmallUNet(3, criterion.neighbors)
    for name, weight in bare.state_dict().items():
        assert torch.equal(weight, network.state_dict()[name])

    rates = (4, 8)
    statistics = tritonaff.NeighborStatistics(rates)
    statistics.update(target)
    frequency = network.affinity.bias.sigmoid().view(2, 8)
    expected = statistics.positive_frequency().float()[:, None].expand(-1, 8)
    torch.testing.assert_close(frequency, expected, atol=1e-3, rtol=0)

    output = network(images)
    assert output.affinity.shape == (3, 16, 13, 18)
    affinity = F.interpolate(output.affinity, (25, 35), mode="bilinear", align_corners=False)
    dilated = tritonaff.dilated_affinity_loss(
        affinity, target, rates, statistics=statistics, beta=0.15
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


def test_equal_runs_are_equal_and_another_seed_is_not(folder, tmp_path, main):
    arguments = [*SMALL, "--data", folder, "--ignore-index", 11, "--loss", "ce"]
    for name, seed in (("one", 0), ("two", 0), ("three", 1)):
        assert main(*arguments, "--seed", seed, "--output", tmp_path / name) == 0
    one, two, three = (tmp_path / name / "data-losses.csv" for name in ("one", "two", "three"))
    assert one.read_text() == two.read_text() != three.read_text()


def test_crops_without_a_label_have_no_loss(script):
    data = script.Dataset("", ["road", "pole", "sky"], [], [], [])
    logits = torch.randn(2, 3, 8, 8, requires_grad=True)
    target = torch.full((2, 8, 8), 255)
    loss = script.CrossEntropy(data, 255)(script.Output(logits, None), target, torch.tensor(0.0))
    loss.backward()
    assert loss == 0
    assert (logits.grad == 0).all()


def test_a_full_disk_takes_one_line_and_leaves_no_part(folder, tmp_path, main, capsys):
    output = tmp_path / "runs"
    arguments = [*SMALL, "--data", folder, "--ignore-index", 11, "--output", output, "--loss", "ce"]
    error = f"error: [Errno 27] File too large: '{output}/data.png'\n"
    with full_disk(1000):
        assert main(*arguments) == 2
    assert capsys.readouterr().err == error
    assert os.listdir(output) == ["data-losses.csv"]
    # Existing files stay unchanged.
    assert main(*arguments) == 0
    files = {path: path.read_bytes() for path in output.iterdir()}
    assert len(files) == 3
    capsys.readouterr()
    for size, name in ((1000, "data.png"), (10, "data-losses.csv")):
        with full_disk(size):
            assert main(*arguments) == 2
        assert capsys.readouterr().err == error.replace("data.png", name)
        assert files == {path: path.read_bytes() for path in output.iterdir()}


@pytest.mark.nightly
def test_an_interrupted_training_takes_one_line(folder, tmp_path):
    arguments = ["--data", folder, "--ignore-index", 11, *SMALL, "--steps", 10_000]
    output = tmp_path / "runs"
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), *map(str, arguments), "--output", str(output)],
        env={**os.environ, **AS_USERS},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A process that a shell starts in the background ignores the signal, and so would this one.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout.readline() == (
        "data: 3 classes, 1 training, 1 validation and 1 test images; on cpu\n"
    )
    time.sleep(random.uniform(0, 1))  # any moment will do
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert errors == "interrupted: the next run starts anew\n"
    assert process.returncode == 130
    assert os.listdir(output) == []


def test_names_of_classes_are_no_mathematics(script, folder, tmp_path, monkeypatch):
    names = [r"$\x$", "$x^2$", "_sky"]
    (folder / "classes.txt").write_text("\n".join(names))
    pictures, figures = sys.modules["pictures"], []
    save = pictures.Figure.savefig

    def keep(figure, *args, **options):
        figures.append(figure)
        save(figure, *args, **options)

    monkeypatch.setattr(pictures.Figure, "savefig", keep)
    data, networks = script.load_folder(folder, 11), {"untrained": script.SmallUNet(3)}
    script.draw_predictions(tmp_path / "one.png", data, networks, 11)
    assert Image.open(tmp_path / "one.png").format == "PNG"
    texts = figures[0].legends[0].get_texts()
    assert [text.get_text() for text in texts] == [*names, "void", "right", "wrong"]
    assert not any(text.get_parse_math() for text in texts)
    first, _, last = (figures[0].axes[k] for k in (0, 1, 2))
    assert first.get_xlabel() == "one.png"
    assert re.fullmatch(r"mIoU 0\.\d{3}", last.get_xlabel())
    # The prediction is masked where the truth is void.
    assert last.images[0].get_array()[0, 0].tolist() == [255, 255, 255]


def test_the_palette_of_a_data_set(script, folder):
    assert script.load_folder(folder, 11).palette == sys.modules["dataset"].PALETTE
    labels = Image.open(folder / "labels/test/one.png")
    labels.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255, *[0] * 759])
    labels.save(folder / "labels/test/one.png")
    assert script.load_folder(folder, 11).palette == ("#ff0000", "#00ff00", "#0000ff")


def test_thin_classes_and_the_part_of_an_image_with_most_of_them(script):
    labels = np.zeros((40, 64), np.uint8)
    labels[:, 20:] = 1
    labels[12:22, 41:44] = 2  # a pole, 3 wide
    labels[:, 30:32] = 255
    evaluation, pictures = sys.modules["evaluation"], sys.modules["pictures"]
    assert evaluation.thin_classes([(None, labels)], 4) == [2]
    top, left, bottom, right = pictures.thinnest(labels, 4)
    assert (bottom - top, right - left) == (10, 16)
    assert (top, bottom) == (12, 22)
    assert left <= 41 <= 44 <= right


def test_the_notebook_is_committed_without_outputs():
    notebook = json.loads((SCRIPT.parent / "affinity.ipynb").read_text())
    codes = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert len(codes) > 5
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in codes)


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
    """For any number of bits, white is 255 and nothing is clipped."""
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
def test_a_broken_folder_is_named_in_one_line(
    script, main, folder, monkeypatch, capsys, damage, message
):
    damage(folder)
    monkeypatch.setattr(script, "train", lambda *args: pytest.fail("it trained"))
    assert main("--data", folder, "--ignore-index", 11) == 2
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
    script, main, folder, tmp_path, monkeypatch, capsys, arguments, message
):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("")
    Path("runs/data.png").mkdir(parents=True)
    monkeypatch.setattr(script, "train", lambda *args: pytest.fail("it trained"))
    assert main("--data", folder, "--ignore-index", 11, *arguments) == 2
    output, errors = capsys.readouterr()
    assert re.fullmatch(f"error: {message}.*\n", errors)
    assert output == ""


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        *(("seed", value, "is not a whole number from 0 to") for value in (-1, 2**63, "x")),
        ("ignore-index", 256, "'256' is not a whole number from 0 to 255"),
        ("steps", 0, "'0' is not a whole number from 1 to"),
        *(("learning-rate", value, "invalid rate value") for value in ("nan", "inf", -1, "x")),
        ("loss", "mse", "invalid choice: 'mse'"),
    ],
)
def test_options_that_are_refused(main, capsys, option, value, message):
    with pytest.raises(SystemExit):
        main(f"--{option}={value}")
    assert message in capsys.readouterr().err


# -------------------------------------------------------------------------------------- cracks


@pytest.fixture
def cracks(script):
    return importlib.import_module("cracks")


@pytest.fixture
def road(tmp_path):
    """Images of dark lines, one or two pixels wide, with a few ignored pixels."""
    rng = np.random.default_rng(0)

    def draw(k):
        labels = np.zeros((40, 56), np.uint8)
        labels[np.arange(40), np.arange(40) // 2 + 9 * k] = 1
        labels[17 + k, 20:] = 1
        image = (150 - 90 * labels + rng.normal(0, 10, labels.shape)).astype(np.uint8)
        labels[:3, :3] = 255
        return image, labels

    pairs = {split: [draw(0), draw(1)] for split in ("train", "val", "test")}
    return save_folder(tmp_path / "road", ["road", "crack"], pairs)


def test_cracks_are_found_and_trainings_are_kept(cracks, road, tmp_path, monkeypatch, capsys):
    def run(*arguments):
        sizes = ["--steps", 40, "--batch-size", 2, "--size", 24, 32, "--seeds", 2]
        arguments = [road, *sizes, "--output", tmp_path / "runs/cracks.jsonl", *arguments]
        monkeypatch.setattr(sys, "argv", ["cracks.py", *map(str, arguments)])
        with tritonaff.use_backend("portable"):
            status = cracks.main()
        return status, *capsys.readouterr()

    assert run("--loss", "bce")[0] == 0
    status, output, _ = run()  # the other loss alone
    assert status == 0
    assert len(re.findall("cross-entropy, seed", output)) == 0
    assert len(re.findall(r"cross-entropy \+ field, seed \d: step 40/40", output)) == 2
    cells = r"\|\s*[01]\.\d{3} \([01]\.\d{3} to [01]\.\d{3}\)\s*" * 2
    for title in ("cross-entropy", re.escape("cross-entropy + field")):
        assert re.search(rf"\| {title}\s*{cells}\|", output), output
    lines = (tmp_path / "runs/cracks.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    seeds = [("bce", 0), ("bce", 1), ("bce+field", 0), ("bce+field", 1)]
    assert [(row["loss"], row["seed"]) for row in rows] == seeds
    assert all(row["test"]["f1"] > 0.9 for row in rows)

    assert run("--kernel-sizes", 4)[2].startswith("error: kernel_sizes must be odd")
    (tmp_path / "runs/cracks.jsonl").write_text("step,loss\n")
    assert run()[2].endswith("is no file of trainings: choose another --output\n")
    (road / "classes.txt").write_text("road\ncrack\npaint\n")
    assert run()[2] == "error: expected two classes, background first, got 3\n"


def test_losses_of_cracks(cracks):
    options = argparse.Namespace(pos_weight=3.0, ignore_index=255, kernel_sizes=[3])
    logits, target = torch.randn(2, 1, 9, 12), torch.randint(0, 2, (2, 9, 12))
    target[0, :4] = 255
    progress = torch.tensor(0.5)
    bare = cracks.CrossEntropy(options)(logits, target, progress)
    counted = target != 255
    expected = F.binary_cross_entropy_with_logits(
        logits[:, 0][counted], target[counted].float(), pos_weight=torch.tensor(3.0)
    )
    torch.testing.assert_close(bare, expected)
    with tritonaff.use_backend("portable"):
        field = tritonaff.affinity_field_loss(logits, target, activation="sigmoid")
        both = cracks.CrossEntropyField(options)(logits, target, progress)
    torch.testing.assert_close(both, bare + 10**-0.5 * field)


def test_a_crack_may_be_two_pixels_off(cracks):
    labels = np.zeros((20, 20), np.uint8)
    labels[2:18, 10] = 1
    labels[:, 16:] = 255
    for shift, f1 in ((0, 1), (2, 1), (-2, 1), (3, 0)):
        probs = torch.zeros(20, 20)
        probs[2:18, 10 + shift] = 0.8
        probs[:, 16:] = 0.9  # ignored
        scores = cracks.score([probs], [(None, labels)], 0.5, 255)
        assert scores.f1 == pytest.approx(f1, abs=1e-6)
    probs[2:10, 10] = 0.8
    scores = cracks.score([probs], [(None, labels)], 0.5, 255)
    assert scores.precision == 8 / 24  # the column three pixels off
    assert scores.recall == 10 / 16


# ----------------------------------------------------------------------------------- instances


@pytest.fixture
def instances(script):
    pytest.importorskip("mwatershed")
    pytest.importorskip("skimage")
    return importlib.import_module("instances")


@pytest.fixture
def membranes(tmp_path):
    """Bright cells of 13 x 13 pixels between dark membranes, with a few ignored pixels."""
    rng = np.random.default_rng(0)

    def draw():
        y, x = np.mgrid[:45, :60]
        labels = ((y % 15 > 1) & (x % 15 > 1)).astype(np.uint8)
        image = (60 + 100 * labels + rng.normal(0, 10, labels.shape)).astype(np.uint8)
        labels[:3, :3] = 255
        return image, labels

    pairs = {split: [draw(), draw()] for split in ("train", "val", "test")}
    return save_folder(tmp_path / "membranes", ["membrane", "cell"], pairs)


@pytest.fixture
def segment_cells(instances, tmp_path, monkeypatch, capsys):
    """Runs the script in this process, on torch operations: exit status, output and errors."""

    def run(*arguments):
        sizes = ["--batch-size", 2, "--size", 32, 48, "--output", tmp_path / "runs"]
        arguments = ["instances.py", *sizes, *arguments]
        monkeypatch.setattr(sys, "argv", [*map(str, arguments)])
        with tritonaff.use_backend("portable"):
            status = instances.main()
        return status, *capsys.readouterr()

    return run


def rand_errors(output):
    number = r"\|\s*(\d\.\d{3})\s*" * 3
    rows = re.findall(rf"\| (\w+)\s*{number}\|\s*0\.\d+ \|\s*\d+ \|", output)
    return {title: float(error) for title, error, *_ in rows}


def test_cells_are_found(segment_cells, membranes, tmp_path):
    status, output, errors = segment_cells(membranes, "--steps", 160)
    assert status == 0, errors
    found = rand_errors(output)
    assert list(found) == ["affinities", "boundaries"]
    assert max(found.values()) < 0.05, output
    assert max(map(len, output.splitlines()[:-1])) <= 80
    picture = tmp_path / "runs/membranes-instances.png"
    assert output.endswith(f"picture: {picture}\n")
    assert Image.open(picture).size[0] > 900


@pytest.mark.nightly
def test_cells_of_drawn_volumes(segment_cells, tmp_path):
    status, output, errors = segment_cells("--steps", 3)
    assert status == 0, errors
    assert list(rand_errors(output)) == ["affinities", "boundaries"]
    assert Image.open(tmp_path / "runs/volume-instances.png").size[0] > 900


@pytest.mark.parametrize("dimensions", [2, 3])
def test_segments_of_sure_networks_are_the_cells(instances, dimensions):
    """Cells are the segments of their own targets: offsets, anchor and sign fit the watershed."""
    ids = np.kron(np.arange(1, 17).reshape(4, 4), np.ones((8, 9), int))
    ids[::8], ids[:, ::9] = instances.MEMBRANE, instances.MEMBRANE
    ids = ids if dimensions == 2 else np.stack([ids, ids, np.where(ids > 0, ids + 16, 0)])
    volume = torch.from_numpy(ids)[None]
    methods = instances.Affinities(dimensions), instances.Boundaries(dimensions)
    target = tritonaff.instance_affinity_target(volume, methods[0].offsets)[0]
    probs = torch.where(target == 255, 0.5, target.double()), (volume == 0).double()
    for method, prob in zip(methods, probs, strict=True):
        (error, split, merge), segments = instances.score(
            method, [prob.numpy()], [(None, ids)], 0.5
        )
        assert split < 1e-9
        # No membrane lies between planes: connected components join the cells of all planes.
        if dimensions == 2 or method is methods[0]:
            assert max(error, merge) < 1e-9
        else:
            assert merge > 0.1
        assert (segments > 0).all()


def test_membranes_are_learnt_where_labels_count(instances):
    ids = torch.randint(-1, 3, (2, 9, 12))
    logits = torch.randn(2, 1, 9, 12)
    counted = ids != instances.IGNORED
    membrane = (ids[counted] == instances.MEMBRANE).float()
    expected = F.binary_cross_entropy_with_logits(logits[:, 0][counted], membrane)
    torch.testing.assert_close(instances.Boundaries(2).loss(logits, ids), expected)
    assert instances.Boundaries(2).loss(logits, torch.full_like(ids, -1)) == 0


def test_data_sets_without_cells_are_refused(segment_cells, membranes, instances, monkeypatch):
    monkeypatch.setattr(instances, "train", lambda *args: pytest.fail("it trained"))
    label = membranes / "labels/val/1.png"
    kept = label.read_bytes()
    Image.fromarray(np.zeros((45, 60), np.uint8)).save(label)
    assert segment_cells(membranes)[2] == (
        f"error: expected a cell in every image, got none in {membranes}/labels/val\n"
    )
    label.write_bytes(b"no image")
    assert segment_cells(membranes)[2].startswith(f"error: cannot read {label}: ")
    label.write_bytes(kept)
    for path in membranes.glob("*/test/0.png"):
        Image.open(path).crop((0, 0, 60, 27)).save(path)
    assert segment_cells(membranes)[2] == (
        f"error: expected images larger than 27x27, the longest offset, got 60x27 in "
        f"{membranes}/images/test\n"
    )
    (membranes / "classes.txt").write_text("membrane\ncell\nblood\n")
    assert segment_cells(membranes)[2] == "error: expected two classes, membrane first, got 3\n"
