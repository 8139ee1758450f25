"""The study in small: drawn scenes, and a stand-in for the backbone."""

import importlib
import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from backbone import Backbone
from torch.nn import functional as F

import tritonaff

Image = pytest.importorskip("PIL.Image")
np = pytest.importorskip("numpy")
pytest.importorskip("matplotlib")
pytest.importorskip("rich")
pytest.importorskip("scipy")
pytest.importorskip("torchmetrics")

STUDY = Path(__file__).parent.parent.parent / "study"
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def portable():
    """Interpreted tiles would take minutes."""
    with tritonaff.use_backend("portable"):
        yield


@pytest.fixture(scope="module")
def study():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GOMP_SPINCOUNT", "10000")  # or the script would change it for good
        patch.syspath_prepend(STUDY)
        yield importlib.import_module("study")


@pytest.fixture(scope="module")
def losses(study):
    return sys.modules["losses"]


@pytest.fixture(scope="module")
def tables(study):
    return sys.modules["tables"]


@pytest.fixture(scope="module")
def camvid(study, tmp_path_factory):
    """A folder of scenes of 80x60; some are named like the dusk clip."""
    root = tmp_path_factory.mktemp("camvid")
    scenes = importlib.import_module("scenes")
    drawn = iter(scenes.make_scenes(9, seed=5))
    names = {
        "train": ["0001TP_1", "0001TP_2", "0006R0_1", "0006R0_2", "0016E5_1"],
        "val": ["0016E5_2"],
        "test": ["0001TP_3", "Seq05VD_1", "Seq05VD_2"],
    }
    for split, stems in names.items():
        for kind in ("images", "labels"):
            (root / kind / split).mkdir(parents=True)
        for stem in stems:
            image, labels = (x[10:70, :80] for x in next(drawn))
            labels = labels.copy()
            labels[:3, :5] = 11
            Image.fromarray(image).save(root / "images" / split / f"{stem}.png")
            Image.fromarray(labels).save(root / "labels" / split / f"{stem}.png")
    (root / "classes.txt").write_text("\n".join(scenes.CLASSES) + "\n")
    return root


@pytest.fixture(scope="module")
def folder(study, camvid, tmp_path_factory):
    folder = study.ImageFolder("camvid", camvid)
    folder.extract(Backbone(), tmp_path_factory.mktemp("cache"), lambda status: None)
    return folder


@pytest.fixture
def run(study):
    return study.plan.Run("camvid", "ce", steps=4, batch_size=2)


def train(study, folder, run, **options):
    data = study.Data(run.data, folder)
    return study.train(run, data, Backbone(), CPU, compiled=False, say=lambda status: None)


# ------------------------------------------------------------------------------------ losses


def brute_force_contrastive(features, target, ignore_index, margin):
    near, far = [], []
    n, _, height, width = features.shape
    for b in range(n):
        f = features[b] / features[b].norm(dim=0)
        for y in range(height):
            for x in range(width):
                for v in range(max(y - 1, 0), min(y + 2, height)):
                    for u in range(max(x - 1, 0), min(x + 2, width)):
                        pair = target[b, y, x].item(), target[b, v, u].item()
                        if (v, u) == (y, x) or ignore_index in pair:
                            continue
                        d = (f[:, y, x] - f[:, v, u]).square().sum().item()
                        if pair[0] == pair[1]:
                            near.append(d)
                        else:
                            far.append(max(0.0, margin - d))
    return sum(sum(terms) / len(terms) for terms in (near, far) if terms)


@pytest.mark.parametrize("classes", [1, 3])
def test_contrastive_loss(losses, classes):
    generator = torch.Generator().manual_seed(0)
    # Alike enough that some pairs of different labels are closer than the margin.
    features = 1 + 0.4 * torch.randn(2, 4, 4, 5, generator=generator, dtype=torch.float64)
    target = torch.randint(0, classes, (2, 4, 5), generator=generator)
    target[0, 1, 2] = target[1, 3, 0] = 255
    for margin in (0.2, 0.05):
        expected = brute_force_contrastive(features, target, 255, margin)
        loss = losses.contrastive_loss(features, target, 255, margin)
        assert loss.item() == pytest.approx(expected, rel=1e-9)


def test_contrastive_loss_of_nothing(losses):
    features = torch.randn(1, 3, 2, 2, requires_grad=True)
    loss = losses.contrastive_loss(features, torch.full((1, 2, 2), 255), 255)
    loss.backward()
    assert loss.item() == 0
    assert features.grad.count_nonzero() == 0


def test_boundary_distance(losses):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, (3, 4)).repeat(3, 0).repeat(2, 1).astype(np.uint8)
    labels[rng.random(labels.shape) < 0.1] = 11
    distance = losses.boundary_distance(labels, 11)
    for y, x in np.ndindex(labels.shape):
        others = np.argwhere((labels != labels[y, x]) & (labels != 11))
        nearest = np.sqrt(((others - (y, x)) ** 2).sum(axis=1)).min()
        expected = 0 if labels[y, x] == 11 else nearest
        assert distance[y, x] == pytest.approx(expected, rel=1e-6)
    assert np.isinf(losses.boundary_distance(np.ones((2, 2), np.uint8), 11)).all()


def test_weights_at_boundaries(losses):
    torch.manual_seed(0)
    target = torch.tensor([[[0, 0, 0, 1, 2, 255]]])
    distance = torch.tensor([[[math.inf, 2.0, 1.0, 1.0, 1.0, 0.0]]])
    logits = torch.randn(1, 3, 1, 6)
    facts = losses.Facts(3, 255, 4, [])
    criterion = losses.BoundaryWeights(facts, 3.0)
    output, batch = losses.Output(logits, None, None), losses.Batch(target, distance)
    loss = criterion(output, batch, torch.tensor(0.0))
    total = weights = 0.0
    for k in range(5):
        d = 4 * distance[0, 0, k].item()  # pixels of the image
        weight = 1 + 3 * math.exp(-(d**2) / (2 * 5**2))
        total -= weight * logits[0, :, 0, k].log_softmax(dim=0)[target[0, 0, k]].item()
        weights += weight
    assert loss.item() == pytest.approx(total / weights, rel=1e-6)


@pytest.mark.parametrize("channels", [1, 3])
def test_dice_loss(losses, channels):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, channels, 3, 4, generator=generator, dtype=torch.float64)
    target = torch.randint(0, 2, (2, 3, 4), generator=generator)  # class 2 does not occur
    target[0, 1, 2] = target[1, 0, 3] = 255
    probs = logits.sigmoid() if channels == 1 else logits.softmax(dim=1)
    found = []
    for label in (1,) if channels == 1 else (0, 1):
        p = probs[:, 0 if channels == 1 else label][target != 255]
        y = (target == label)[target != 255]
        found.append(1 - 2 * p[y].sum() / (p.sum() + y.sum()))
    expected = sum(found) / len(found)
    torch.testing.assert_close(losses.dice_loss(logits, target, 255), expected)
    nothing = losses.dice_loss(logits.requires_grad_(), torch.full_like(target, 255), 255)
    nothing.backward()
    assert nothing.item() == logits.grad.count_nonzero() == 0


def test_one_channel_is_two_classes(losses):
    logits = torch.randn(2, 1, 3, 4, generator=torch.Generator().manual_seed(0))
    target = torch.tensor([0, 1, 255, 1]).expand(2, 3, 4)
    two = torch.cat((torch.zeros_like(logits), logits), dim=1)
    loss = losses.log_loss(logits, target, 255)
    torch.testing.assert_close(loss, losses.log_loss(two, target, 255))
    assert (loss[..., 2] == 0).all()


def test_the_adversary_minimises_what_the_network_maximises(losses):
    torch.manual_seed(0)
    target = torch.randint(0, 3, (2, 16, 16))
    target[0, :4] = 255
    criterion = losses.Adversarial(losses.Facts(3, 255, 4, []), 0.5)
    logits = torch.randn(2, 3, 16, 16, requires_grad=True)
    loss = criterion(losses.Output(logits, None, None), losses.Batch(target, None), None)
    counted = (target != 255)[:, None]
    probs = logits.softmax(dim=1) * counted
    true = F.one_hot(target.clamp(max=2), 3).movedim(-1, 1) * counted
    real, fake = (criterion.discriminator(x.float()).sigmoid() for x in (true, probs))
    entropy = F.cross_entropy(logits, target, ignore_index=255)
    game = real.log().mean() + (1 - fake).log().mean()  # Eq. 8
    torch.testing.assert_close(loss, entropy - game)
    weights = list(criterion.discriminator.parameters())
    ascent = torch.autograd.grad(game, weights, retain_graph=True)
    for step, wanted in zip(
        torch.autograd.grad(loss, weights, retain_graph=True), ascent, strict=True
    ):
        torch.testing.assert_close(step, -wanted)
    (step,) = torch.autograd.grad(loss, logits, retain_graph=True)
    (wanted,) = torch.autograd.grad(entropy + 0.5 * (1 - fake).log().mean(), logits)
    torch.testing.assert_close(step, wanted)


# ---------------------------------------------------------------------------------- training


def test_all_losses_start_alike_and_each_learns(study, losses, folder, run):
    data = study.Data("camvid", folder)
    first, inputs, ends = {}, {}, {}
    for loss in losses.LOSSES:
        one = replace(run, loss=loss)
        network, criterion = study.make(one, data, Backbone(), CPU)
        first[loss] = {k: v.clone() for k, v in network.state_dict().items()}
        source = study.batches(data, one, CPU)
        inputs[loss] = [next(source) for _ in range(4)]
        start = {k: v.clone() for k, v in criterion.state_dict().items()}
        result, trained = train(study, folder, one)
        assert result["val"][-1]["step"] == 4
        ends[loss] = trained.state_dict()
        for name, parameter in trained.named_parameters():
            assert not torch.equal(parameter, first[loss][name]), (loss, name)
        assert ("edge_weight" in result) == (loss == "ce+aaf")
        if loss == "ce+aaf":
            assert len(start) == 3  # the weight, and two learned parameters
            rows = torch.tensor(result["edge_weight"])
            torch.testing.assert_close(rows.sum(dim=1), torch.ones(8), atol=2e-4, rtol=0)
            assert (rows - 1 / 3).abs().max() > 1e-3
    for loss in losses.LOSSES:
        for name, weight in first["ce"].items():
            assert torch.equal(weight, first[loss][name])
        for (x1, b1), (x2, b2) in zip(inputs["ce"], inputs[loss], strict=True):
            assert all(map(torch.equal, (*x1, b1.target), (*x2, b2.target)))
            assert (b2.distance is not None) == (loss == "unet")
        if loss != "ce":
            assert not torch.equal(ends[loss]["classify.weight"], ends["ce"]["classify.weight"])
    other, _ = study.make(replace(run, seed=1), data, Backbone(), CPU)
    assert not torch.equal(other.classify.weight, first["ce"]["classify.weight"])


def test_affinity_regression_joins_in_the_last_third(study, folder, run, monkeypatch):
    monkeypatch.setattr(sys.modules["training"], "CURVE", 1)
    curves = {}
    for loss in ("ce", "ce+ar"):
        result, _ = train(study, folder, replace(run, loss=loss, steps=6))
        curves[loss] = result["curve"]
        assert [look["step"] for look in result["val"]] == [2, 4, 6]
    assert curves["ce"][:4] == curves["ce+ar"][:4]
    assert curves["ce+ar"][4] > curves["ce"][4] + 0.01


def test_what_is_compiled_serves_other_seeds_and_weights(study, losses, folder, run, monkeypatch):
    data = study.Data("camvid", folder)
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 100)  # as compiled_objective
    torch.compiler.reset()
    forward = torch.compile(study.objective, fullgraph=True, dynamic=False, backend="eager")
    for loss in losses.LOSSES:
        for seed, weight in ((0, 1.0), (1, 0.5)):
            one = replace(run, loss=loss, seed=seed, weight=weight)
            network, criterion = study.make(one, data, Backbone(), CPU)
            x, batch = next(study.batches(data, one, CPU))
            with torch.compiler.set_stance("fail_on_recompile" if seed else "default"):
                value = forward(network, criterion, x, batch, torch.tensor(0.8))
            value.backward()
            network, criterion = study.make(one, data, Backbone(), CPU)
            expected = study.objective(network, criterion, x, batch, torch.tensor(0.8))
            torch.testing.assert_close(value, expected)


def test_the_whole_image_as_target(study, folder, run):
    data = study.Data("camvid", folder)
    one = replace(run, loss="ce+affinity", resolution="image")
    network, criterion = study.make(one, data, Backbone(), CPU)
    x, batch = next(study.batches(data, one, CPU))
    assert batch.target.shape == (2, 64, 96)  # 60x80, and a multiple of 32
    progress = torch.tensor(0.5)
    loss = study.objective(network, criterion, x, batch, progress)
    logits = F.interpolate(network(x).logits, (64, 96), mode="bilinear")
    field = tritonaff.affinity_field_loss(logits, batch.target, (3,), ignore_index=11)
    expected = F.cross_entropy(logits, batch.target, ignore_index=11) + field * 10**-0.5
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=0)


# -------------------------------------------------------------------------------------- data


def test_features_are_those_of_the_padded_image_and_its_mirror(study, folder):
    backbone = Backbone()
    for item, mirrored in ((("train", 3), False), (("train", 3), True), (("test", 1), False)):
        image, labels = folder.pairs[item[0]][item[1]]
        step = -1 if mirrored else 1
        padded = np.full((64, 96, 3), 127, np.uint8)
        padded[:60, :80] = image[:, ::step]
        expected = backbone(torch.from_numpy(padded)[None])
        for level, other in zip(folder.features_of([(item, mirrored)], CPU), expected, strict=True):
            torch.testing.assert_close(level, other, atol=1e-3, rtol=1e-3)  # kept as float16
        target = folder.target(item, mirrored, 4)
        wide = np.full((64, 96), 11, np.uint8)
        wide[:60, :80] = labels[:, ::step]
        assert (target == wide[2::4, 2::4]).all()
        distance = folder.distance(item, mirrored, 4)
        assert (distance[target != 11] >= 1).all()


def test_features_are_kept(study, camvid, folder, tmp_path):
    class Dead(Backbone):
        def forward(self, images):
            raise AssertionError("features were there already")

    Dead.__name__ = "Backbone"
    cache = tmp_path / "cache"
    again = study.ImageFolder("camvid", camvid)
    again.extract(Backbone(), cache, lambda status: None)
    again.extract(Dead(), cache, lambda status: None)
    assert np.array_equal(again.features["val"][0], folder.features["val"][0])


def test_daylight_trains_without_the_dusk_clip_and_is_tested_on_it(study, folder):
    data = study.Data("daylight", folder)
    assert data.train == [("train", 2), ("train", 3), ("train", 4)]
    assert data.test == [("train", 0), ("train", 1), ("test", 0)]
    # Two splits in one batch.
    together = folder.features_of([(item, False) for item in data.test], CPU)
    for k, item in enumerate(data.test):
        alone = folder.features_of([(item, False)], CPU)
        assert all(torch.equal(x[k], y[0]) for x, y in zip(together, alone, strict=True))
    whole = study.Data("camvid", folder)
    assert (len(whole.train), len(whole.test)) == (5, 3)


def test_every_image_comes_once_before_any_comes_again(study, folder, run, monkeypatch):
    data, seen = study.Data("camvid", folder), []
    target = folder.target
    monkeypatch.setattr(folder, "target", lambda *view: seen.append(view) or target(*view))
    source = study.batches(data, replace(run, batch_size=5), CPU)
    for _ in range(8):
        next(source)
    items = [item for item, _, _ in seen]
    assert all(len(set(items[k : k + 5])) == 5 for k in range(0, 40, 5))
    assert len({tuple(items[k : k + 5]) for k in range(0, 40, 5)}) > 1
    assert 8 < sum(mirrored for _, mirrored, _ in seen) < 32


def test_images_of_several_sizes_are_refused(study, camvid, tmp_path):
    for kind in ("images", "labels"):
        for split in ("train", "val", "test"):
            (tmp_path / kind / split).mkdir(parents=True)
            for path in (camvid / kind / split).iterdir():
                image = Image.open(path)
                size = (64, 48) if path.stem == "0016E5_2" else image.size
                image.crop((0, 0, *size)).save(tmp_path / kind / split / path.name)
    (tmp_path / "classes.txt").write_text((camvid / "classes.txt").read_text())
    with pytest.raises(study.DataError, match="images of 64x48 and of 80x60, not of one size"):
        study.ImageFolder("camvid", tmp_path)


def test_a_broken_folder_and_a_missing_backbone_are_named_in_a_line(
    study, camvid, tmp_path, monkeypatch, capsys
):
    arguments = ["study.py", "train", "--output", str(tmp_path / "runs")]
    monkeypatch.setattr(sys, "argv", [*arguments, "--camvid", str(tmp_path / "nowhere")])
    assert study.main() == 2
    assert "error: there is no" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    monkeypatch.setattr(sys, "argv", [*arguments, "--camvid", str(camvid)])
    assert study.main() == 2
    assert "pip install --no-deps efficientnet_lite_pytorch" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit):
        study.main()


def test_a_crf_clears_a_speck_and_reads_an_image_that_it_may_not_write(study):
    pytest.importorskip("pydensecrf.densecrf")
    image = np.full((20, 30, 3), 200, np.uint8)
    image[:, 15:] = 20
    true = np.arange(30) // 15 * np.ones((20, 1), int)
    probs = np.where(true == np.arange(2)[:, None, None], 0.7, 0.3).astype(np.float32)
    probs[:, 8, 5] = probs[::-1, 8, 5]
    image.flags.writeable = False
    assert (sys.modules["crf"].refined(probs, image).argmax(axis=0) == true).all()


# ---------------------------------------------------------------------------- the whole study


def test_the_plan_follows_what_the_validation_split_says(study):
    results, planned = {}, 0
    while True:
        tables = study.plan.make_plan(["camvid", "isbi"], results)
        runs = list(dict.fromkeys(run for runs in tables.values() for run in runs))
        missing = [run for run in runs if run.name not in results]
        if not missing:
            break
        planned += len(missing)
        for run in missing:
            best = run.learning_rate == 1e-2 and (run.loss == "ce" or run.weight in (0.1, 3.0))
            results[run.name] = {"val": [{"miou": 0.9}, {"miou": 0.5 + 0.1 * best}]}
    assert planned == len(results) == len({run.name for run in runs}) == len(runs)
    for data in ("camvid", "isbi"):
        table = tables[data]
        assert len(table) == (1 + len(study.plan.WEIGHTS)) * len(study.plan.SEEDS)
        assert [run.loss for run in table[: 1 + len(study.plan.WEIGHTS)]] == [
            "ce",
            *study.plan.WEIGHTS,
        ]
        assert {run.learning_rate for run in table} == {1e-2}
        weights = {run.loss: run.weight for run in table}
        assert weights.pop("ce") == 1
        assert weights == {
            loss: 0.1 if 0.1 in given else 3 for loss, given in study.plan.WEIGHTS.items()
        }
        assert len({(run.steps, run.batch_size) for run in table}) == 1
    assert {run.data for run in tables["transfer"]} == {"daylight"}
    assert {run.resolution for run in tables["resolution"]} == {"logits", "image"}
    assert not study.is_choice("weightings")
    assert study.is_choice("isbi weights")


@pytest.fixture
def small(study, camvid, monkeypatch):
    """The study's commands on one data set, with few and short runs."""
    monkeypatch.setattr(study, "EfficientNetLite0", Backbone)
    monkeypatch.setattr(sys.modules["crf"], "refined", lambda probs, image: probs)
    base = study.plan.Run("camvid", "ce", steps=3, batch_size=2)
    monkeypatch.setattr(study.plan, "FULL", {"camvid": base})
    monkeypatch.setattr(study.plan, "SHORT", {"camvid": 2})
    monkeypatch.setattr(study.plan, "SEEDS", (0, 10))
    monkeypatch.setattr(study.plan, "LEARNING_RATES", (1e-3, 1e-2))
    weights = {"ce+aaf": (1.0,), "ce+ar": (0.1, 1.0), "ce+dilated": (0.1,)}
    monkeypatch.setattr(study.plan, "WEIGHTS", weights)
    monkeypatch.setattr(study.plan, "ablations", lambda chosen: {})

    def make(output, results=None):
        arguments = ["study.py", "train", "--camvid", str(camvid), "--output", str(output)]
        arguments += ["--results", str(results or output / "results"), "--no-compile"]
        monkeypatch.setattr(sys, "argv", arguments)
        bars = study.Progress("{task.fields[status]}", disable=True)
        return study.Study(study.parse_arguments(), bars)

    return make


def without_times(results):
    times = "compile_s", "step_ms", "seconds"
    return {
        name: {k: v for k, v in result.items() if k not in times}
        for name, result in results.items()
    }


def test_a_killed_training_goes_on_to_the_same_end(study, small, tmp_path, monkeypatch):
    whole = small(tmp_path / "whole")
    whole.train()
    results = whole.results()
    assert len(results) == 2 + 4 + 4 * 2
    chosen = study.plan.make_plan(["camvid"], results)["camvid"]
    assert [run.seed for run in chosen] == [0] * 4 + [10] * 4

    real, count = study.train, 0

    def dies(*arguments):
        nonlocal count
        count += 1
        if count in (2, 7):
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(study, "train", dies)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            small(tmp_path / "parts").train()
    parts = small(tmp_path / "parts")
    parts.train()
    assert count == len(results) + 2  # finished runs were not repeated
    assert without_times(parts.results()) == without_times(results)


def test_from_training_to_the_page(study, small, tmp_path, monkeypatch):
    one = small(tmp_path / "files", tmp_path / "runs")
    one.train()
    one.score()
    study.cost(one)
    again = small(tmp_path / "another machine", tmp_path / "runs")  # which has study.json alone
    with monkeypatch.context() as patch:
        patch.setattr(study, "train", None)
        again.train()
        again.score()
    assert again.collected["runs"] == again.results() == json.loads(again.path.read_text())["runs"]
    lost = next(x for x in again.collected["runs"].values() if "crf" in x.get("scores", ()))
    expected = lost["scores"].copy()
    del lost["scores"]["crf"]
    again.score()  # which trains this network again
    assert lost["scores"].keys() == expected.keys()
    assert lost["scores"]["crf"] == expected["crf"]
    study.propagation(one)
    networks = json.loads((tmp_path / "runs/propagation.json").read_text())["networks"]
    assert [network["seed"] for network in networks] == [0, 10]
    found = json.loads((tmp_path / "runs/study.json").read_text())
    assert list(found["tables"]) == ["camvid learning rate", "camvid weights", "camvid"]
    for name in found["tables"]["camvid"]:
        scores = found["runs"][name]["scores"]
        pixels = sum(map(sum, scores["test"]["confusion"]))
        assert pixels == 3 * (60 * 80 - 15)  # all pixels but the ignored ones
        assert ("propagated" in scores) == ("dilated" in name)
        if "-ce-" in name:
            assert scores["crf"] == scores["test"]  # of a stand-in that changes nothing
    costs = json.loads((tmp_path / "runs/cost.json").read_text())["losses"]
    assert costs.keys() == set(sys.modules["losses"].LOSSES)
    assert costs["ce+aaf"]["peak_bytes"] > costs["ce"]["peak_bytes"] > 0

    arguments = ["study.py", "report", "--results", str(tmp_path / "runs")]
    monkeypatch.setattr(sys, "argv", [*arguments, "--docs", str(tmp_path / "docs")])
    assert study.main() == 0
    page = (tmp_path / "docs/study.md").read_text()
    for heading in ("CamVid", "Cost of a step", "Propagation", "Failures"):
        assert f"## {heading}" in page
    assert "| CamVid, rate 16, n8 |" in page
    assert "| unsure: λ 6, μ 7, 3 iterations |" in page
    for picture in ("camvid", "sizes", "affinity"):
        assert f"(study-{picture}.png)" in page
        assert (tmp_path / f"docs/study-{picture}.png").stat().st_size > 0


def test_before_any_iteration_propagation_changes_nothing(study, tables, folder, run):
    data = study.Data("camvid", folder)
    one = replace(run, loss="ce+dilated")
    network, _ = study.make(one, data, Backbone(), CPU)
    with torch.no_grad():
        network.classify.weight *= (
            30  # sure of itself: logits and probabilities enlarge differently
        )
    scores = study.score(one, network, data, CPU, whole=True)
    (predicted, truth), miou = scores["propagation"], tables.METRICS["mIoU"]
    assert 100 * predicted[0] == 100 * truth[0] == pytest.approx(miou(scores["test"]), abs=0.006)
    assert 100 * predicted[-1] == pytest.approx(miou(scores["propagated"]), abs=0.006)
    assert len({*predicted, *truth}) == 9
    less = study.score(one, network, data, CPU, whole=False)
    assert less == {k: v for k, v in scores.items() if k != "propagation"}


def test_a_perfect_prediction_scores_all(study, tables, folder):
    score = sys.modules["scoring"].Score(folder)
    items = [("test", 0), ("test", 1)]
    labels = np.stack([folder.pairs[split][k][1] for split, k in items])
    score.update(torch.from_numpy(np.where(labels == 11, 3, labels)), items)
    scores = score.compute()
    for metric in tables.METRICS.values():
        assert metric(scores) == pytest.approx(100)


def test_instances_are_connected_parts(study, folder):
    ids, labels = folder.instances(("test", 2)), folder.pairs["test"][2][1]
    for number in np.unique(ids[labels != 11]):
        (label,) = np.unique(labels[ids == number])
        _, count = report_label(ids == number)
        assert count == 1
        grown = np.pad(ids == number, 1)
        near = np.zeros(labels.shape, bool)
        for dy in range(3):
            for dx in range(3):
                near |= grown[dy : dy + labels.shape[0], dx : dx + labels.shape[1]]
        assert (ids[near & (labels == label)] == number).all()


def report_label(mask):
    from scipy import ndimage

    return ndimage.label(mask, np.ones((3, 3)))


def test_a_search_along_the_true_affinity_and_along_none(study):
    propagation = sys.modules["propagation"]
    rng = torch.Generator().manual_seed(0)
    labels = torch.zeros(2, 16, 24, dtype=torch.int64)
    labels[:, :, 9:] = 1
    labels[0, :2, :3] = 255
    probs = (F.one_hot(labels.clamp(max=1), 2).movedim(-1, 1) * 0.2).float()
    probs = (probs + torch.rand(probs.shape, generator=rng)).softmax(dim=1)
    truth = tritonaff.dilated_affinity_target(labels, [(2, 2)]) == 1
    apart = torch.full(truth.shape, -30.0)
    names = [setting[-1] for setting in propagation.SETTINGS]
    first, *others = propagation.search([(probs, apart, labels)], [(2, 2)], 255)
    assert set(others) == {first} != {1.0}
    first, *others = propagation.search([(probs, 30.0 * truth - 15, labels)], [(2, 2)], 255)
    assert others[names.index("all") + 3] > others[names.index("all")] > first  # 3 iterations, 1
    assert any(x != first for x, name in zip(others, names, strict=True) if name == "inside")


def test_gates_by_category(study):
    by_category = sys.modules["propagation"].by_category
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 2, (1, 5, 6), generator=generator)
    labels[0, 2, 3] = 255
    affinity = torch.randn(1, 8, 5, 6, generator=generator)
    probs = torch.rand(1, 2, 5, 6, generator=generator)
    found = by_category([(probs, affinity, labels)], [(1, 1)], 255)
    steps = [(y, x) for y in (-1, 0, 1) for x in (-1, 0, 1) if (y, x) != (0, 0)]
    pixels, same, other = torch.zeros(3, 9, dtype=torch.float64)
    for y, x in np.ndindex(5, 6):
        gates = {True: 0.0, False: 0.0}
        category = 8
        for k, (dy, dx) in enumerate(steps):
            v, u = y + dy, x + dx
            if 0 <= v < 5 and 0 <= u < 6 and 255 not in (labels[0, y, x], labels[0, v, u]):
                alike = bool(labels[0, y, x] == labels[0, v, u])
                gates[alike] += 1 / (1 + 7 ** -affinity[0, k, y, x].item())
                category -= not alike
        if any(gates.values()):
            pixels[category] += 1
            same[category] += gates[True]
            other[category] += gates[False]
    assert found["pixels"] == [pixels.tolist()]
    assert found["same"] == [same.round().tolist()]
    assert found["other"] == [other.round().tolist()]
    assert sum(found["right"][0]) == ((probs.argmax(dim=1) == labels) & (labels != 255)).sum()


# -------------------------------------------------------------------------------- the report


def split_scores(miou):
    """Scores of two classes with this IoU each."""
    hits = round(2000 * miou / (1 + miou))
    wrong = 1000 - hits
    half = wrong // 2
    table = [[hits, wrong], [wrong, hits]] if half else [[1000, 0], [0, 1000]]
    ones = [0.5, 0.5]
    keys = "instance_iou", "boundary_precision", "boundary_recall", "boundary_f"
    return {"confusion": table, **{key: ones for key in keys}}


@pytest.mark.parametrize(
    ("values", "called"),
    [
        ([0.60, 0.61, 0.62], False),  # 0.5 to 1.5 more, a range of 2
        ([0.64, 0.65, 0.66], True),
        ([0.55, 0.66, 0.77], False),  # far more on average, and spread more
        ([0.54, 0.55, 0.56], True),
        ([0.595, 0.605, 0.615], False),
    ],
)
def test_a_difference_is_called_one_above_the_spread_alone(tables, values, called):
    base = [0.59, 0.60, 0.61]
    rows = {
        "ce": {seed: split_scores(x) for seed, x in enumerate(base)},
        "ce+aaf": {seed: split_scores(x) for seed, x in enumerate(values)},
    }
    metric = {"mIoU": tables.METRICS["mIoU"]}
    row = tables.difference_table(rows, metric).splitlines()[2]
    change = 100 * (np.mean(values) - np.mean(base))
    assert f"{change:+.1f}"[:3] in row
    assert ("**" in row) == called
    said = tables.verdict(tables.panels(rows, metric), "ce+aaf")
    if called:
        assert said == ("raises mIoU" if change > 0 else "lowers mIoU")
    else:
        assert said == "makes no difference"


def test_a_metric_is_named_once_with_its_sets(tables):
    titles = ["clDice (a)", "IoU", "clDice (b, frozen)", "F1 at 0.5 (a)"]
    assert tables.by_metric(titles) == ["clDice (a, b, frozen)", "IoU", "F1 at 0.5 (a)"]


def test_words_say_what_was_judged_and_where(tables):
    def rows(*values):
        return {name: dict(enumerate(v)) for name, v in zip(("ce", "a", "b"), values, strict=True)}

    panels = {
        "F1 (x)": (rows([1.0, 1.1], [3.0, 3.1], [9.0]), float),
        "IoU (x)": (rows([1.0, 1.1], [3.0, 3.1], [9.0]), float),
        "clDice (x)": (rows([1.0, 1.1], [3.0, 3.1], [9.0]), float),
        "F1 (y)": ({"ce": {0: 1.0, 1: 1.1}}, float),
    }
    assert tables.verdict(panels, "a") == "raises every score on x"
    assert tables.verdict(panels, "b") == "is not judged, with one seed"
    panels["IoU (x)"] = rows([1.0, 1.1], [0.0, 0.1], []), float
    assert tables.verdict(panels, "a") == "raises F1 (x) and clDice (x) and lowers IoU (x)"
    panels["F1 (y)"] = rows([1.0, 1.1], [3.0, 3.1], []), float
    assert tables.verdict(panels, "a") == "raises F1 (x, y) and clDice (x) and lowers IoU (x)"
    alike = {"F1 (x)": (rows([1.0, 1.1], [1.0, 1.1], []), float), "F1 (y)": ({}, float)}
    assert tables.verdict(alike, "a") == "makes no difference on x"


def test_one_seed_is_no_difference(tables):
    assert not tables.differs([0.9], [0.1])
    assert tables.difference_cell([0.9], [0.1]) == "+0.8"


def test_differences_are_of_the_seeds_that_both_have(tables):
    rows = {"ce": {0: 1.0, 1: 2.0}, "unet": {1: 5.0, 2: 9.0}}
    assert tables.paired(rows, "unet", lambda value: value) == ([5.0], [2.0])


@pytest.mark.parametrize(
    ("values", "rises", "said"),
    [
        ([[1.0, 1.1], [0.0, 0.1]], True, "held"),
        ([[1.0, 1.1], [0.0, 0.1]], False, "not held: the reverse"),
        ([[0.05, 0.1], [0.0, 0.1]], True, "not held, no difference"),
        ([[1.0], [0.0]], True, "not testable: one seed"),
    ],
)
def test_a_claim_is_held_where_it_differs_as_claimed(study, values, rises, said):
    claims = sys.modules["claims"]
    case = claims.Case("here", *values)
    assert claims.judged("paper", "claim", [case], rises)[-1] == said
    nothing = claims.Case("there", [0.0, 0.1], [0.0, 0.1])
    two = claims.judged("paper", "claim", [case, nothing], rises)[-1]
    assert two == {"held": "held in part"}.get(
        said, "not held" + ", no difference" * ("diff" in two)
    )
    assert claims.judged("paper", "claim", [], rises)[-1] == "not measured yet"
    if said == "held":
        opposite = claims.Case("there", [0.0, 0.1], [1.0, 1.1])
        assert claims.judged("paper", "claim", [case, opposite], rises)[-1] == "mixed"
        assert claims.judged("paper", "claim", [case, case], rises, every=True)[-1] == "held"
        assert claims.judged("paper", "claim", [case, nothing], rises, every=True)[-1] == "not held"
    alone = claims.Case("alone", [1.0], [3.0])
    *_, words, with_one_seed = claims.judged("paper", "claim", [case, alone], rises)
    assert with_one_seed == said
    assert words.endswith("alone -2.0 (one seed)")


def test_a_run_is_called_by_what_its_loss_was_told(study):
    frozen = sys.modules["frozen"]
    told = {"loss": "ce+aaf", "options": [["kernel_sizes", [3, 5]]]}
    assert frozen.sizes_of(told) == "{3, 5}"
    assert frozen.sizes_of({"loss": "ce+aaf", "options": []}) == "{3, 5, 7}"
    assert frozen.sizes_of({"loss": "ce", "options": []}) == "ce"
    assert frozen.rates_of({"options": [["rates", [8, [12, 24]]]]}) == "{8, (12, 24)}"


def result_of(weighting, weight, seed, val, miou, gate):
    options = [] if weighting == "sqrt" else [["weighting", weighting]]
    run = {"loss": "ce+dilated", "weight": weight, "options": options, "seed": seed}
    accuracy = [[gate] * 4 + [0.1] * 5] * 2  # the claim is about the first four categories
    scores = {"test": split_scores(miou), "affinity_accuracy": accuracy}
    return {"run": run, "val": [{"miou": 0.9}, {"miou": val}], "scores": scores}


def test_a_weighting_is_judged_at_the_strength_that_validation_chose(study, tables):
    claims, frozen = sys.modules["claims"], sys.modules["frozen"]
    results = [
        result_of(weighting, weight, seed, val, miou + 0.01 * seed, gate)
        for seed in (0, 1)
        for weighting, weight, val, miou, gate in (
            ("none", 0.1, 0.5, 0.50, 0.2),
            ("none", 0.5, 0.4, 0.90, 0.9),  # best on the test split, and not chosen
            ("sqrt", 0.1, 0.3, 0.20, 0.3),
            ("sqrt", 0.5, 0.6, 0.70, 0.5),
            ("neighbor", 0.1, 0.5, 0.60, 0.4),
        )
    ]
    page = type("Page", (), {"named": lambda self, name: results})()
    assert frozen.weighting_of(results[0]["run"]) == "none, β 0.1"
    miou, accuracy = claims.weighting_lines(page)
    assert miou[2:] == ['minus "neighbor" **+10.0**; minus "none" **+20.0**', "held"]
    assert accuracy[2:] == ['minus "none" **+20.0**; minus "sqrt" **-10.0**', "not held"]


def test_rates_are_judged_before_and_by_propagation(study):
    claims = sys.modules["claims"]
    results = []
    for seed in (0, 1):
        for rates, miou, after in (
            ([8, 16], 0.6, 0.5),
            ([8, 16, 32], 0.5, 0.6),
            ([8, [12, 24], 16], 0.6, 0.4),
        ):
            result = result_of("sqrt", 0.1, seed, 0.5, miou, 0.5)
            result["run"]["options"] = [["rates", rates]]
            result["scores"]["propagated"] = split_scores(after)
            results.append(result)
    page = type("Page", (), {"named": lambda self, name: results})()
    trained, spread = claims.rate_lines(page)
    assert trained[2:] == [
        "minus {8, 16, 32} **+10.0**; minus {8, (12, 24), 16} +0.0",
        "not held",
    ]
    # 0.1 off: split_scores() has whole pixels.
    more, between = (
        "{8, 16, 32} minus {8, 16} **+19.9**",
        "{8, (12, 24), 16} minus {8, 16} **-10.1**",
    )
    assert spread[2:] == [f"{more}; {between}", "mixed"]
