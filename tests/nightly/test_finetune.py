"""Networks that are trained end to end, in small: drawn cracks, and a stand-in for the backbone."""

import importlib
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from backbone import Backbone
from folders import save_folder

import tritonaff

Image = pytest.importorskip("PIL.Image")
np = pytest.importorskip("numpy")
pytest.importorskip("matplotlib")
ndimage = pytest.importorskip("scipy.ndimage")
pytest.importorskip("skimage")
pytest.importorskip("torchmetrics")

STUDY = Path(__file__).parent.parent.parent / "study"
RNGS = [np.random.default_rng(seed) for seed in range(4)]


@pytest.fixture(autouse=True)
def portable():
    """Interpreted tiles would take minutes."""
    with tritonaff.use_backend("portable"):
        yield


@pytest.fixture(scope="module")
def finetune():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GOMP_SPINCOUNT", "10000")  # or the script would change it for good
        patch.syspath_prepend(STUDY)
        yield importlib.import_module("finetune")


@pytest.fixture(scope="module")
def thin(finetune):
    return sys.modules["thin"]


@pytest.fixture(scope="module")
def cracks(tmp_path_factory):
    """A folder of gray images of 70x50 with a dark line; a corner is ignored."""
    rng = np.random.default_rng(0)

    def draw():
        labels = np.zeros((50, 70), np.uint8)
        at = 10 + rng.integers(30)
        labels[at : at + 3, 5:65] = 1
        image = np.where(labels, 60, 160) + rng.integers(-20, 20, labels.shape)
        labels[:4, :4] = 255
        return image.astype(np.uint8), labels

    counts = {"train": 5, "val": 2, "test": 2}
    pairs = {split: [draw() for _ in range(count)] for split, count in counts.items()}
    return save_folder(tmp_path_factory.mktemp("cracks"), ["road", "crack"], pairs)


@pytest.fixture
def small(finetune, monkeypatch):
    """Short runs on small crops."""
    setting = replace(finetune.SETTINGS["crackforest"], steps=6)
    both = {"crackforest": setting, "isbi": setting}
    monkeypatch.setattr(finetune, "SETTINGS", finetune.SETTINGS | both)
    monkeypatch.setattr(finetune, "CROP", 32)
    monkeypatch.setattr(finetune, "EfficientNetLite0", Backbone)
    monkeypatch.setattr(finetune, "SEEDS", (0, 1))
    monkeypatch.setattr(finetune, "MORE_SEEDS", (0, 1, 2))
    monkeypatch.setattr(finetune, "CHANGES", finetune.CHANGES[-2:])


# -------------------------------------------------------------------------------------- data


def test_the_thin_class_is_label_1(finetune, cracks):
    setting = finetune.SETTINGS["crackforest"]
    as_is = finetune.load(cracks, setting)
    swapped = finetune.load(cracks, replace(setting, thin=0))
    assert (as_is.classes, swapped.classes) == (["road", "crack"], ["crack", "road"])
    for (_, labels), (_, other) in zip(as_is.train, swapped.train, strict=True):
        assert (np.where(labels == 255, 255, 1 - labels) == other).all()


def test_crops_keep_images_and_labels_together(finetune):
    rng = np.random.default_rng(0)
    labels = np.arange(12).repeat(20)[:, None].repeat(90, 1).astype(np.uint8)  # rows tell the scale
    image = (20 * labels)[..., None].repeat(3, 2)
    heights = set()
    for _ in range(20):
        new_image, new_labels = finetune.crop(image, labels, 255, rng)
        assert new_image.shape == (224, 224, 3)
        assert new_labels.shape == (224, 224)
        ignored = new_labels == 255
        # Away from the gray of missing pixels and from other labels, which resizing mixes in.
        inside = ndimage.binary_erosion(~ignored, iterations=4)
        inside &= np.roll(new_labels, 3, 0) == np.roll(new_labels, -3, 0)
        assert inside.any()
        assert (new_image[..., 0] == 20 * new_labels)[inside].all()
        heights.add(round(ignored.mean(), 2))
    assert len(heights) > 5  # of different sizes, so that different parts are missing


def test_every_loss_gets_the_same_crops(finetune, cracks, small):
    data = finetune.load(cracks, finetune.SETTINGS["crackforest"])
    run = finetune.Run("crackforest", "ce", 6, 1e-2)
    one, other = (finetune.batches(data.train, replace(run, loss=x)) for x in ("ce", "unet"))
    for _ in range(3):
        (x, first), (y, second) = next(one), next(other)
        assert torch.equal(x, y)
        assert torch.equal(first.target, second.target)
        assert first.distance is None
        assert second.distance.shape == second.target.shape


# ------------------------------------------------------------------------------------ scores


def test_counts_of_thin_structures(thin):
    labels = np.zeros((20, 30), np.uint8)
    labels[10, 5:25] = 1
    labels[0, :5] = 255
    probs = np.full(labels.shape, 0.05)
    probs[12, 5:25] = 0.65  # two rows below: within the tolerance
    probs[14, 5:15] = 0.35  # four rows below
    probs[0, :5] = 0.95  # ignored
    score = thin.ThinScore(255)
    score.update(probs, labels)
    counts = score.compute()
    high, low = thin.TENTHS.index(0.5), thin.TENTHS.index(0.3)
    assert (counts["predicted"][high], counts["predicted"][low]) == (20, 30)
    assert counts["near"][high] == counts["near"][low] == 20
    assert counts["found"][high] == counts["true"][high] == 20
    assert counts["hit"][high] == counts["predicted_skeleton_hit"][high] == 0
    assert counts["predicted_skeleton"][high] == counts["true_skeleton"][high] == 20
    assert counts["found"][-1] == counts["predicted"][-1] == 0  # nothing is predicted at 0.9
    end_to_end = importlib.import_module("end_to_end")
    f1 = end_to_end.tolerant_f1(counts)
    assert f1[high] == pytest.approx(100)
    assert f1[low] == pytest.approx(100 * 2 * (2 / 3) / (1 + 2 / 3))
    assert end_to_end.cl_dice(counts)[high] == pytest.approx(0)


def test_a_choice_at_an_end_of_the_thresholds_is_told(finetune, monkeypatch):
    end_to_end = importlib.import_module("end_to_end")
    counts = {"predicted": [10, 10, 10], "near": [5, 9, 8], "hit": [1, 3, 2], "true": [10] * 3}
    thin = {
        **counts,
        "found": [5, 9, 8],
        "predicted_skeleton": [4] * 3,
        "true_skeleton": [4] * 3,
        "predicted_skeleton_hit": [1, 2, 3],  # clDice is best at the last
        "true_skeleton_hit": [1, 2, 3],
    }
    rows = {"ce": {0: {"val": {"thin": thin}}, 1: {"val": {"thin": thin}}}}
    monkeypatch.setattr(end_to_end, "rows_of", lambda page, name: rows)
    said = []
    page = type("Page", (), {"say": lambda self, text: said.append(text)})()
    end_to_end.at_an_end(page, "crackforest")
    end_to_end.at_an_end(page, "camvid")  # which has no threshold to choose
    assert [text.split(": ")[1] for text in said] == ["clDice of cross-entropy 2."]


def test_rand_error_of_cells(thin):
    true = np.ones((9, 21), bool)
    true[:, 10] = False  # a membrane between two cells of 90 pixels
    assert thin.rand_error(true, true) == pytest.approx(0)
    thick = true.copy()
    thick[:, 8:13] = False  # a thick membrane parts the same cells
    assert thin.rand_error(thick, true) == pytest.approx(0)
    precision = 2 * 90 * 89 / (180 * 179)  # of the pairs of pixels, if the cells are merged
    error = thin.rand_error(np.ones_like(true), true)
    assert error == pytest.approx(1 - 2 * precision / (precision + 1))
    assert 0 <= thin.rand_error(np.zeros_like(true), true) <= 1


def test_a_perfect_prediction_scores_all(finetune):
    labels = torch.zeros(1, 16, 16, dtype=torch.uint8)
    labels[:, 5:7, 2:14] = 1
    score = finetune.Score(replace(finetune.SETTINGS["isbi"]), 2)
    yes = (labels == 1).float()[:, None]
    score.update(torch.cat((1 - yes, yes), dim=1), labels)
    found = score.compute()
    assert found["confusion"] == [[232, 0], [0, 24]]
    assert found["boundary_f_1"] == found["boundary_recall_3"] == [1, 1]
    thresholds = finetune.SETTINGS["isbi"].thresholds
    assert found["thin"]["thresholds"] == [*thresholds]
    assert found["thin"]["rand_error"] == [0] * len(thresholds)
    for name in ("near", "hit", "true"):
        assert found["thin"][name] == [24] * len(thresholds)


# ---------------------------------------------------------------------------------- training


def test_all_weights_learn_and_the_backbone_of_the_next_run_does_not(finetune, cracks, small):
    data = finetune.load(cracks, finetune.SETTINGS["crackforest"])
    backbone = Backbone()
    before = {k: v.clone() for k, v in backbone.state_dict().items()}
    for loss in finetune.WEIGHTS:
        run = finetune.Run("crackforest", loss, 6, 1e-2)
        start, _ = finetune.make(run, data, backbone)
        result, network = finetune.train(run, data, backbone)
        assert [look["step"] for look in result["looks"]] == [1, 2, 3, 4, 5, 6]
        for name, weight in network.named_parameters():
            assert not torch.equal(weight, start.get_parameter(name)), (loss, name)
        for name, weight in backbone.state_dict().items():
            assert torch.equal(weight, before[name])
        assert ("edge_weight" in result) == (loss == "ce+aaf")
        assert network.classify.out_channels == 1


def test_a_killed_study_goes_on_and_ends_on_the_page(
    finetune, cracks, small, tmp_path, monkeypatch
):
    train, count = finetune.train, 0

    def dies(*arguments):
        nonlocal count
        count += 1
        if count == 4:
            raise KeyboardInterrupt
        return train(*arguments)

    monkeypatch.setattr(finetune, "train", dies)
    folders, output, results = {"crackforest": cracks}, tmp_path / "runs", tmp_path / "results"
    results.mkdir()
    collected = results / "finetune.json"
    with pytest.raises(KeyboardInterrupt):
        finetune.train_missing(folders, output, collected)
    assert len(finetune.finished(output, collected)) == 3
    finetune.collect(output, collected)
    finetune.draw(folders, output, collected)
    assert (output / "failures-crackforest-ce+affinity.png").stat().st_size > 5000
    before = finetune.finished(output, collected)
    for path in output.glob("*.json"):  # as if an earlier version had scored them
        path.write_text(path.read_text().replace('"hit"', '"hits"'))
    finetune.score_again(folders, output, collected)
    assert finetune.finished(output, collected) == before
    output = tmp_path / "another machine"  # which has the collected runs alone
    finetune.train_missing(folders, output, collected)
    everything = finetune.finished(output, collected)
    assert {run.name for run in finetune.plan(["crackforest"], everything)} == set(everything)
    assert count - 1 == len(everything)
    assert len(list(output.glob("*.json"))) == len(everything) - 3
    finetune.collect(output, collected)
    assert len(json.loads(collected.read_text())["runs"]) == len(everything)
    shown = STUDY.parent / "docs/results/study"
    for name in ("study.json", "cost.json"):
        (results / name).write_text((shown / name).read_text())
    report = importlib.import_module("report")
    page = report.write(results, tmp_path / "docs").read_text()
    for heading in ("# Does it help", "## What the papers claim", "### CrackForest, end to end"):
        assert f"\n{heading}" in f"\n{page}"
    first, rest = page.split("## What the papers claim")
    whole = rest.split("### CrackForest, end to end")[1].split("## Decoders on frozen")[0]
    for row in ("then 1 iteration", "then 3 iterations", "then 10 iterations"):
        assert f"\n| + dilated, {row} | " in whole
        assert (f"\n| + dilated, {row} | " in first) == (row == "then 10 iterations")
    assert "start 0.5" in page
    for picture in ("differences", "curves", "camvid"):
        assert (tmp_path / f"docs/study-{picture}.png").stat().st_size > 0


def test_the_first_look_tells_the_learning_rate(finetune):
    results = {}
    while True:
        runs = finetune.plan(["crackforest", "camvid"], results)
        missing = [run for run in runs if run.name not in results]
        if not missing:
            break
        run = missing[0]
        results[run.name] = {"looks": [{"miou": 9}, {"miou": run.learning_rate}]}
    others = [run for run in runs if run.loss != "ce" or run.seed]
    assert {run.learning_rate for run in others} == {1e-2}
    losses = finetune.WEIGHTS
    more = 2 * (len(finetune.MORE_SEEDS) - len(finetune.SEEDS))  # the first settings are as good
    count = len(finetune.SEEDS) * len(losses) + len(finetune.CHANGES) + more
    assert len(results) == 1 + 2 * count  # one for the other rate
    names = [name.split("-")[0] for name in results]
    assert set(names[: 1 + 3 * len(finetune.FIRST)]) == {"crackforest"}


def test_the_validation_split_chooses_settings(finetune):
    base = finetune.Run("camvid", "ce", 300, 1e-2)
    results = {run.name: {"looks": [{"miou": 0.5}]} for run in finetune.trials(base)}
    best = finetune.trials(base)[3]
    results[best.name] = {"looks": [{"miou": 0.6}], "test": {"miou": 0.0}}
    more = finetune.search(base, results)[len(results) :]
    assert {run.seed for run in more if run.options == best.options} == set(finetune.MORE_SEEDS)
    assert {run.loss for run in more} == {"ce", "ce+affinity"}


def test_runs_are_read_as_they_were_written(finetune):
    for run in finetune.trials(finetune.Run("isbi", "ce", 300, 1e-2)):
        assert finetune.Run.read(json.loads(json.dumps(asdict(run)))) == run


# ------------------------------------------------------------------------------------- boxes


def test_masks_from_boxes(finetune, monkeypatch, tmp_path, capsys):
    boxes = importlib.import_module("boxes")
    monkeypatch.setattr(boxes, "EfficientNetLite0", Backbone)
    monkeypatch.setattr(finetune, "CROP", 64)
    labels = np.zeros((64, 80), np.uint8)
    labels[20:40, 10:40], labels[30:50, 60:70] = 1, 2
    pairs = [(rng.integers(256, size=labels.shape).astype(np.uint8), labels) for rng in RNGS]
    splits = {"train": pairs, "val": pairs[:1], "test": pairs}
    folder = save_folder(tmp_path / "streets", ["road", *boxes.CLASSES], splits)
    picture = tmp_path / "boxes.png"
    arguments = [str(folder), "--steps", "1", "--seeds", "1", "--output", str(picture)]
    monkeypatch.setattr(sys, "argv", ["boxes.py", *arguments])
    assert boxes.main() == 0
    assert "| filled boxes | 100.0 | 100.0 |" in capsys.readouterr().out  # two rectangles
    assert picture.stat().st_size > 5000


def test_boxes_of_connected_parts(finetune):
    boxes = importlib.import_module("boxes")
    labels = torch.zeros(1, 30, 40, dtype=torch.long)
    labels[0, 2:14, 3:15], labels[0, 16:28, 20:39], labels[0, 0, 39] = 1, 2, 1  # too small
    found = boxes.find_boxes(labels, [1, 2])
    assert found.edges.tolist() == [[3, 2, 14, 13], [20, 16, 38, 27]]
    assert found.channel.tolist() == [0, 1]
    inside = boxes.filled(found, (1, 2, 30, 40))
    assert torch.equal(inside[0, 0], (labels[0] == 1) & (labels[0].sum(1, keepdim=True) > 1))
    logits = torch.where(inside, 20.0, -20.0)
    counted = torch.ones(1, 1, 30, 40, dtype=torch.bool)
    assert boxes.box_loss(logits, found, counted) < 1e-6
    assert boxes.box_loss(-logits, found, counted) == pytest.approx(40)
