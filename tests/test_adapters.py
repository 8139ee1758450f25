"""The losses in the calling conventions of other libraries, with the real libraries where they are
installed: docs/training-loops.md.
"""

import copy
import importlib.util
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from vision import import_torchvision

import tritonaff
import tritonaff.nnunet
from tritonaff.hf import SegmentationLoss
from tritonaff.nnunet import WithAffinityField


@pytest.fixture(autouse=True)
def portable():
    """Adapters are about arguments: one implementation stands for all."""
    with tritonaff.use_backend("portable"):
        yield


@pytest.fixture
def batch():
    """Logits and labels of four classes; a few pixels are ignored."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 4, 8, 12, generator=generator)
    labels = torch.randint(0, 4, (2, 4, 6), generator=generator)
    labels = labels.repeat_interleave(2, dim=1).repeat_interleave(2, dim=2)
    labels[0, :2, :5] = 255
    return logits.requires_grad_(), labels


# --------------------------------------------------------------------------------------- MONAI


def one_hot(labels, num_classes=4):
    return F.one_hot(labels, num_classes).permute(0, 3, 1, 2).float()


def test_words_of_monai(batch):
    from tritonaff.monai import AffinityFieldLoss, AffinityRegressionLoss

    logits, labels = batch
    known = labels.clamp(max=3)
    for theirs, ours, options in (
        (AffinityFieldLoss, tritonaff.AffinityFieldLoss, {"cross_entropy": True}),
        (AffinityRegressionLoss, tritonaff.AffinityRegressionLoss, {}),
    ):
        softmax = theirs(softmax=True, to_onehot_y=True, ignore_index=255, **options)
        expected = ours(**options)(logits, labels)
        torch.testing.assert_close(softmax(logits, labels[:, None].float()), expected)
        softmax = theirs(softmax=True, **options)
        expected = ours(ignore_index=None, **options)(logits, known)
        torch.testing.assert_close(softmax(logits, one_hot(known)), expected)

        sigmoid = theirs(sigmoid=True, **options)
        expected = ours(activation="sigmoid", **options)(logits, one_hot(known))
        torch.testing.assert_close(sigmoid(logits, one_hot(known).bool()), expected)
        sigmoid = theirs(sigmoid=True, to_onehot_y=True, ignore_index=255, **options)
        by_channel = one_hot(known).masked_fill((labels == 255)[:, None], 255)
        expected = ours(activation="sigmoid", **options)(logits, by_channel)
        torch.testing.assert_close(sigmoid(logits, labels[:, None]), expected)

        one, binary = logits[:, :1], known[:, None].clamp(max=1)
        for to_onehot_y in (False, True):  # MONAI takes no notice of it with one channel
            of_one = theirs(sigmoid=True, to_onehot_y=to_onehot_y, **options)
            expected = ours(activation="sigmoid", **options)(one, binary)
            torch.testing.assert_close(of_one(one, binary), expected)


def test_adaptive_sizes_in_words_of_monai(batch):
    from tritonaff.monai import AdaptiveAffinityFieldLoss

    logits, labels = batch
    loss = AdaptiveAffinityFieldLoss(4, softmax=True, to_onehot_y=True, ignore_index=255)
    loss(logits, labels[:, None], progress=0.5).backward()
    assert loss.edge_scores.grad.any()
    assert "to_onehot_y=True" in repr(loss)


def test_background_of_monai(batch):
    from tritonaff.monai import AffinityFieldLoss, AffinityRegressionLoss

    logits, labels = batch
    truth = one_hot(labels.clamp(max=3))
    without = {"sigmoid": True, "include_background": False}
    for loss in (AffinityFieldLoss, AffinityRegressionLoss):
        expected = loss(sigmoid=True)(logits[:, 1:], truth[:, 1:])
        torch.testing.assert_close(loss(**without)(logits, truth), expected)
    field = AffinityFieldLoss(softmax=True, include_background=False)
    tables = [t[1:] for t in tritonaff.affinity_field_terms(logits, labels.clamp(max=3))]
    expected = (tables[0].sum() / tables[2].sum()) + (tables[1].sum() / tables[3].sum())
    torch.testing.assert_close(field(logits, truth), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "one of sigmoid and softmax must be True, got sigmoid=False and softmax=False"),
        ({"sigmoid": True, "softmax": True}, "one of sigmoid and softmax must be True"),
        ({"softmax": True, "to_onehot_y": 1}, "to_onehot_y must be a bool"),
        ({"softmax": True, "include_background": False}, "sum over all classes"),
    ],
)
def test_what_is_refused_in_words_of_monai(options, message):
    from tritonaff.monai import AffinityRegressionLoss

    with pytest.raises((TypeError, ValueError), match=message):
        AffinityRegressionLoss(**options)


def test_a_target_of_monai_that_is_not_one_hot(batch):
    from tritonaff.monai import AffinityFieldLoss

    logits, labels = batch
    truth = one_hot(labels.clamp(max=3))
    truth[0, :, 0, 0] = torch.tensor([1, 1, 0, 0])
    truth[1, :, 0, 0] = 0
    with pytest.raises(ValueError, match="single 1 at every pixel, got 2 other pixels"):
        AffinityFieldLoss(softmax=True)(logits, truth)
    with pytest.raises(ValueError, match=r"target must have shape \(N, 4, H, W\)"):
        AffinityFieldLoss(softmax=True)(logits, labels[:, None])
    with pytest.raises(ValueError, match=r"target must have shape \(N, H, W\)"):
        AffinityFieldLoss(softmax=True, to_onehot_y=True)(logits, truth)


@pytest.mark.parametrize("sigmoid", [False, True])
def test_deep_supervision_of_monai(batch, sigmoid):
    """MONAI samples the target at each resolution, as floats."""
    losses = pytest.importorskip("monai.losses")
    from tritonaff.monai import AffinityFieldLoss

    logits, labels = batch
    target = labels.clamp(max=3)[:, None].float()
    options = {"sigmoid": sigmoid, "softmax": not sigmoid, "to_onehot_y": True}
    ours = AffinityFieldLoss(**options, cross_entropy=True)
    outputs = [logits, F.avg_pool2d(logits, 2), F.avg_pool2d(logits, 4)]
    for loss in (losses.DiceLoss(**options), ours):
        total = losses.DeepSupervisionLoss(loss)(outputs, target)
        sampled = [F.interpolate(target, x.shape[2:], mode="nearest-exact") for x in outputs]
        levels = [loss(x, y) for x, y in zip(outputs, sampled, strict=True)]
        torch.testing.assert_close(total, levels[0] + 0.5 * levels[1] + 0.25 * levels[2])
        assert torch.autograd.grad(total, logits, retain_graph=True)[0].abs().sum() > 0


# ---------------------------------------------------------------------------------- transformers


@pytest.fixture(scope="module")
def transformers():
    module = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    import_torchvision()
    return module


def segformer(transformers, num_labels=3):
    """A tiny SegFormer with random weights."""
    config = transformers.SegformerConfig(
        num_labels=num_labels,
        depths=[1] * 4,
        hidden_sizes=[4, 4, 8, 8],
        num_attention_heads=[1] * 4,
        decoder_hidden_size=8,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        classifier_dropout_prob=0.0,
        drop_path_rate=0.0,
    )
    torch.manual_seed(0)
    return transformers.SegformerForSemanticSegmentation(config)


class Images(torch.utils.data.Dataset):
    """Random images with labels in rectangles, 255 among them."""

    def __init__(self, count, num_labels=3):
        generator = torch.Generator().manual_seed(1)
        self.pixels = torch.randn(count, 3, 32, 32, generator=generator)
        blocks = torch.randint(0, num_labels, (count, 4, 4), generator=generator)
        self.labels = blocks.repeat_interleave(8, dim=1).repeat_interleave(8, dim=2)
        self.labels[:, :4, :6] = 255

    def __len__(self):
        return len(self.pixels)

    def __getitem__(self, i):
        return {"pixel_values": self.pixels[i], "labels": self.labels[i]}


def arguments(folder, **options):
    import transformers

    return transformers.TrainingArguments(
        output_dir=folder, use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True,
        remove_unused_columns=False, logging_strategy="no", **options,
    )  # fmt: skip


@pytest.mark.parametrize("resolution", ["labels", "logits"])
def test_trainer_of_transformers(transformers, tmp_path, resolution):
    """Two steps of three images, in parts of two images and of one, are two steps of the batch."""
    data = Images(6)
    network, expected = segformer(transformers), segformer(transformers)
    loss = tritonaff.AffinityFieldLoss((3, 5), cross_entropy=True)

    class InOrder(transformers.Trainer):
        def get_train_dataloader(self):
            return [self.data_collator([data[i] for i in part]) for part in PARTS]

    PARTS = (0, 1), (2,), (3, 4), (5,)
    sgd = torch.optim.SGD(network.parameters(), lr=0.1)
    constant = torch.optim.lr_scheduler.LambdaLR(sgd, lambda step: 1.0)
    trainer = InOrder(
        network,
        arguments(tmp_path, max_steps=2, gradient_accumulation_steps=2, max_grad_norm=0),
        train_dataset=data,
        compute_loss_func=SegmentationLoss(loss, resolution),
        optimizers=(sgd, constant),
    )
    trainer.train()

    sgd = torch.optim.SGD(expected.train().parameters(), lr=0.1)
    for first in (0, 3):
        sgd.zero_grad()
        for images, share in (
            (slice(first, first + 2), 2 / 3),
            (slice(first + 2, first + 3), 1 / 3),
        ):
            logits, labels = expected(data.pixels[images]).logits, data.labels[images]
            assert logits.shape[-1] == labels.shape[-1] // 4
            if resolution == "labels":
                logits = F.interpolate(logits, (32, 32), mode="bilinear", align_corners=False)
            else:
                labels = tritonaff.resize_labels(labels, (8, 8))
            (share * loss(logits, labels)).backward()
        sgd.step()
    start = segformer(transformers).state_dict()
    for name, value in network.state_dict().items():
        torch.testing.assert_close(value, expected.state_dict()[name], msg=name)
    weight = "decode_head.classifier.weight"
    assert (network.state_dict()[weight] - start[weight]).abs().max() > 1e-4


def test_weights_of_the_sizes_and_progress_in_a_trainer(transformers, tmp_path):
    """The code of docs/training-loops.md."""
    network = segformer(transformers)
    network.aaf = tritonaff.AdaptiveAffinityFieldLoss(3, cross_entropy=True)

    class Trainer(transformers.Trainer):
        def get_decay_parameter_names(self, model):
            names = super().get_decay_parameter_names(model)
            return [name for name in names if "edge_scores" not in name]

    class Progress(transformers.TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            model.aaf.set_progress(state.global_step / state.max_steps)

    trainer = Trainer(
        network,
        arguments(tmp_path, max_steps=2, per_device_train_batch_size=2, weight_decay=0.1),
        train_dataset=Images(4),
        compute_loss_func=SegmentationLoss(network.aaf),
        callbacks=[Progress()],
    )
    trainer.train()
    groups = {id(p): group for group in trainer.optimizer.param_groups for p in group["params"]}
    for weight in (network.aaf.edge_scores, network.aaf.non_edge_scores):
        assert groups[id(weight)]["weight_decay"] == 0
        assert weight.abs().max() > 0
    assert groups[id(network.decode_head.classifier.weight)]["weight_decay"] == 0.1
    assert float(network.aaf.progress) == 0.5


def test_one_label_of_transformers(transformers):
    network, data = segformer(transformers, num_labels=1), Images(2, num_labels=2)
    outputs = network(data.pixels)
    loss = tritonaff.AffinityFieldLoss(activation="sigmoid", cross_entropy=True)
    large = F.interpolate(outputs.logits, (32, 32), mode="bilinear")
    torch.testing.assert_close(
        SegmentationLoss(loss)(outputs, data.labels), loss(large, data.labels)
    )


def test_calling_convention_of_a_trainer(batch):
    logits, labels = batch
    loss = tritonaff.AffinityFieldLoss()
    ours, expected = SegmentationLoss(loss), loss(logits, labels)
    for outputs in ({"logits": logits}, (logits, "hidden states")):
        torch.testing.assert_close(ours(outputs, labels), expected)
    share = ours((logits,), labels, num_items_in_batch=torch.tensor(4 * labels.numel()))
    torch.testing.assert_close(share, expected / 4)
    enlarged = F.interpolate(logits, (19, 30), mode="bilinear")
    more = labels.new_zeros(len(labels), 19, 30)
    torch.testing.assert_close(ours((logits,), more), loss(enlarged, more))
    coarse = SegmentationLoss(loss, "logits")((logits[..., ::2, ::2],), labels)
    nearest = tritonaff.resize_labels(labels, logits[..., ::2, ::2].shape[-2:])
    torch.testing.assert_close(coarse, loss(logits[..., ::2, ::2], nearest))
    with pytest.raises(TypeError, match="labels must be a tensor, got NoneType: the data set"):
        ours({"logits": logits}, None)
    with pytest.raises(TypeError, match="loss must be a module, got str"):
        SegmentationLoss("aaf")
    with pytest.raises(ValueError, match=r"resolution must be one of .* got 'image'"):
        SegmentationLoss(loss, "image")


# --------------------------------------------------------------------------------------- nnU-Net


def own_loss(net_output, target):
    return net_output.square().mean()


def test_field_beside_a_loss_of_nnunet(batch):
    logits, labels = batch
    field = tritonaff.AffinityFieldLoss((3, 5))
    ours = WithAffinityField(own_loss, field)
    expected = own_loss(logits, None) + field(logits, labels)
    torch.testing.assert_close(ours(logits, labels[:, None].short()), expected)

    volume = logits.view(1, 2, 4, 8, 12).transpose(1, 2)  # two images are two slices
    torch.testing.assert_close(ours(volume, labels.view(1, 1, 2, 8, 12).short()), expected)

    regions, ignored = one_hot(labels.clamp(max=3)), (labels == 255)[:, None]
    field = tritonaff.AffinityFieldLoss(activation="sigmoid")
    ours = WithAffinityField(own_loss, field)
    expected = own_loss(logits, None) + field(logits, regions.masked_fill(ignored, 255))
    for dtype in (torch.bool, torch.int16):
        target = torch.cat((regions, ignored), dim=1).to(dtype)
        torch.testing.assert_close(ours(logits, target), expected)


class DeepSupervisionWrapper(nn.Module):
    """As nnU-Net 2.8 wraps a loss."""

    def __init__(self, loss, weight_factors):
        super().__init__()
        self.loss, self.weight_factors = loss, weight_factors

    def forward(self, outputs, targets):
        levels = zip(self.weight_factors, outputs, targets, strict=True)
        return sum(weight * self.loss(x, y) for weight, x, y in levels)


class StandIn:
    """The part of nnU-Net's trainer that the trainer with an affinity field builds on."""

    current_epoch, num_epochs = 250, 1000

    def __init__(self, has_regions, enable_deep_supervision):
        self.enable_deep_supervision = enable_deep_supervision
        self.label_manager = SimpleNamespace(has_regions=has_regions, ignore_label=255)

    def _build_loss(self):
        if not self.enable_deep_supervision:
            return own_loss
        return DeepSupervisionWrapper(own_loss, (0.75, 0.25))

    def on_train_epoch_start(self):
        pass


@pytest.mark.parametrize("has_regions", [False, True])
@pytest.mark.parametrize("deep", [False, True])
def test_trainer_of_nnunet_on_a_stand_in(batch, monkeypatch, has_regions, deep):
    name = "nnunetv2.training.nnUNetTrainer.nnUNetTrainer"
    monkeypatch.setitem(sys.modules, name, SimpleNamespace(nnUNetTrainer=StandIn))
    while "." in name:
        name = name.rpartition(".")[0]
        monkeypatch.setitem(sys.modules, name, SimpleNamespace())
    source = importlib.util.spec_from_file_location("with_stand_in", tritonaff.nnunet.__file__)
    module = importlib.util.module_from_spec(source)
    source.loader.exec_module(module)

    logits, labels = batch
    target = labels[:, None].short()
    options = {}
    if has_regions:
        options = {"activation": "sigmoid"}
        target = one_hot(labels.clamp(max=3)).short()
    outputs, targets = [logits, logits[..., ::2]], [target, target[..., ::2]]
    trainer = module.nnUNetTrainerAffinityField(has_regions, deep)
    loss = trainer._build_loss()
    trainer.on_train_epoch_start()
    field = tritonaff.AffinityFieldLoss(**options)
    expected = [
        own_loss(x, y) + field(x, y, progress=0.25) for x, y in zip(outputs, targets, strict=True)
    ]
    if deep:
        torch.testing.assert_close(loss(outputs, targets), 0.75 * expected[0] + 0.25 * expected[1])
    else:
        torch.testing.assert_close(loss(logits, target), expected[0])


PLANS = {
    "dataset_name": "Dataset001_Drawn",
    "plans_name": "nnUNetPlans",
    "configurations": {
        "2d": {
            "data_identifier": "nnUNetPlans_2d",
            "batch_size": 2,
            "batch_dice": True,
            "patch_size": [32, 32],
            "architecture": {"arch_kwargs": {"strides": [[1, 1], [2, 2], [2, 2]]}},
        }
    },
}


@pytest.mark.parametrize("regions", [False, True])
def test_trainer_of_nnunet(tmp_path, monkeypatch, regions):
    """Found by name through a file in a folder; the loss is made from plans of nnU-Net's form."""
    import_torchvision()
    pytest.importorskip("nnunetv2.training.nnUNetTrainer.nnUNetTrainer")
    finding = pytest.importorskip("nnunetv2.utilities.find_objects")
    (tmp_path / "affinity_field.py").write_text(
        "from tritonaff.nnunet import nnUNetTrainerAffinityField\n"
    )
    monkeypatch.setenv("nnUNet_extTrainer", str(tmp_path))
    monkeypatch.setenv("nnUNet_results", str(tmp_path))
    find = finding.recursive_find_trainer_class_by_name
    labels = {"background": 0, "rim": [1, 2] if regions else 1, "core": 2, "ignore": 3}
    data = {"labels": labels, "channel_names": {"0": "gray"}, "file_ending": ".png"}
    if regions:
        data["regions_class_order"] = [1, 2]

    def loss_of(name):
        plans = {**copy.deepcopy(PLANS), "continue_training": False}
        trainer = find(name)(plans, "2d", 0, data, device=torch.device("cpu"))
        return trainer, trainer._build_loss()

    trainer, ours = loss_of("nnUNetTrainerAffinityField")
    _, theirs = loss_of("nnUNetTrainer")
    channels = trainer.label_manager.num_segmentation_heads
    assert channels == (2 if regions else 3)
    generator = torch.Generator().manual_seed(0)
    outputs = [
        torch.randn(2, channels, size, size, generator=generator).requires_grad_()
        for size in (32, 16)
    ]
    high = 2 if regions else 4  # regions and their channel of ignored pixels, or labels
    shape = (2, channels + 1) if regions else (2, 1)
    targets = [
        torch.randint(0, high, (*shape, size, size), generator=generator, dtype=torch.int16)
        for size in (32, 16)
    ]
    trainer.field.set_progress(0.5)
    field = tritonaff.AffinityFieldLoss(
        activation="sigmoid" if regions else "softmax", ignore_index=255 if regions else 3
    )
    truth = targets[0]
    if regions:
        truth = truth[:, :2].masked_fill(truth[:, 2:] == 1, 255)
    # nnU-Net gives the lowest resolution the weight 0.
    expected = theirs(outputs, targets) + field(outputs[0], truth, progress=0.5)
    total = ours(outputs, targets)
    torch.testing.assert_close(total, expected)
    total.backward()
    assert outputs[0].grad.any()


# ----------------------------------------------------------------------- MMSegmentation, kornia


def test_one_channel_of_mmsegmentation(batch):
    """``out_channels=1``, whose labels are 0, 1 and 255."""
    from tritonaff.mmseg import AAFLoss

    logits, labels = batch[0][:, :1], torch.where(batch[1] == 255, 255, batch[1] % 2)
    loss = AAFLoss(num_classes=1, use_sigmoid=True, kernel_sizes=(3, 5))
    expected = tritonaff.AdaptiveAffinityFieldLoss(1, (3, 5), activation="sigmoid")
    value = loss(logits, labels, weight=None, ignore_index=255)
    torch.testing.assert_close(value, expected(logits, labels))
    loss.set_progress(0.5)
    torch.testing.assert_close(loss(logits, labels), expected(logits, labels, progress=0.5))


def test_argument_order_of_kornia(batch):
    losses = pytest.importorskip("kornia.losses")
    logits, labels = batch
    labels = torch.where(labels == 255, -100, labels)
    ours = tritonaff.AffinityFieldLoss(ignore_index=-100)
    for loss in (losses.DiceLoss(), losses.FocalLoss(alpha=0.5, reduction="mean"), ours):
        (grad,) = torch.autograd.grad(loss(logits, labels), logits)
        assert grad.any()


def test_groups_of_timm():
    """The line of docs/training-loops.md: the weights of the sizes do not decay."""
    import_torchvision()
    optim = pytest.importorskip("timm.optim")
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    aaf = tritonaff.AdaptiveAffinityFieldLoss(4)
    groups = [*optim.param_groups_weight_decay(network, 0.05), aaf.optimizer_group(lr=0.01)]
    optimizer = optim.create_optimizer_v2(groups, opt="adamw", lr=1e-3, weight_decay=0.05)
    group_of = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    decays = [group_of[id(p)]["weight_decay"] for p in (*network.parameters(), *aaf.parameters())]
    assert decays == [0.05, 0, 0, 0, 0, 0]
