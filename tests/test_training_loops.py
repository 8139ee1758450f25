"""The losses in other training loops: the code of docs/training-loops.md, with the real libraries
where they are installed.
"""

import io

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from vision import import_torchvision

import tritonaff


class Step(nn.Module):
    """A network, cross-entropy and AAF."""

    def __init__(self, num_classes=4):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.net = nn.Conv2d(3, num_classes, 3, padding=1)
        for parameter in self.net.parameters():
            nn.init.normal_(parameter, std=0.5, generator=generator)
        self.aaf = tritonaff.AdaptiveAffinityFieldLoss(num_classes, (3, 5))

    def forward(self, images, target):
        logits = self.net(images)
        return F.cross_entropy(logits, target, ignore_index=255) + self.aaf(logits, target)


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(2, 3, 8, 12, generator=generator)
    target = torch.randint(0, 4, (2, 4, 6), generator=generator)
    target = target.repeat_interleave(2, dim=1).repeat_interleave(2, dim=2)
    target[0, :2, :5] = 255
    return images, target


def grads_of(step):
    return {name: parameter.grad.clone() for name, parameter in step.named_parameters()}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_and_grad_scaler(batch, dtype):
    exact = Step()
    exact(*batch).backward()
    expected = grads_of(exact)

    step = Step()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    optimizer = torch.optim.SGD(
        [{"params": step.net.parameters()}, step.aaf.optimizer_group(lr=0.1)], lr=0.1
    )
    with torch.autocast("cpu", dtype=dtype):
        assert step.net(batch[0]).dtype == dtype
        loss = step(*batch)
    assert loss.dtype == torch.float32
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    for name, grad in grads_of(step).items():
        # The network itself rounds at every pixel; sums of roundings, so relative to the norm.
        error = (grad - expected[name]).norm() / expected[name].norm()
        assert error < 4 * torch.finfo(dtype).eps, name
    before = step.net.weight.detach().clone()
    scaler.step(optimizer)
    scaler.update()
    assert not torch.equal(step.net.weight, before)
    assert scaler.get_scale() == 2.0**12


def test_a_gradient_that_overflows_is_skipped(batch):
    step = Step()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    optimizer = torch.optim.SGD(step.parameters(), lr=0.1)
    with torch.autocast("cpu", dtype=torch.float16):
        loss = step(*batch)
    scaler.scale(loss).backward()
    before = step.net.weight.detach().clone()
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(step.net.weight, before)
    assert scaler.get_scale() == 2.0**39


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(batch, use_reentrant):
    images, target = batch
    expected, step = Step(), Step()
    expected(images, target).backward()
    checkpoint(step, images.requires_grad_(), target, use_reentrant=use_reentrant).backward()
    torch.testing.assert_close(grads_of(step), grads_of(expected))


def test_gradient_accumulation(batch):
    images, target = batch
    expected, step = Step(), Step()
    expected(images, target).backward()
    # Labels of all micro-batches, before the first of them is computed.
    parts = [(images[i : i + 1], target[i : i + 1]) for i in range(2)]
    normalizer = sum(step.aaf.normalizer(labels) for _, labels in parts)
    counted = sum((labels != 255).sum() for _, labels in parts)
    for part, labels in parts:
        logits = step.net(part)
        loss = F.cross_entropy(logits, labels, ignore_index=255, reduction="sum") / counted
        (loss + step.aaf(logits, labels, normalizer=normalizer)).backward()
    torch.testing.assert_close(grads_of(step), grads_of(expected))


def test_lightning(batch):
    lightning = pytest.importorskip("pytorch_lightning")

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = Step()
            self.losses = []

        def training_step(self, batch):
            loss = self.model(*batch)
            self.losses.append(loss.item())
            return loss

        def configure_optimizers(self):
            return optimizer_of(self.model)

    def optimizer_of(step):
        groups = [{"params": step.net.parameters()}, step.aaf.optimizer_group(lr=0.1)]
        return torch.optim.SGD(groups, lr=0.1)

    module = Module()
    trainer = lightning.Trainer(
        max_steps=3,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, torch.utils.data.DataLoader([batch] * 3, batch_size=None))

    step, losses = Step(), []
    optimizer = optimizer_of(step)
    for _ in range(3):
        loss = step(*batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert module.losses == pytest.approx(losses)
    assert losses[2] < losses[0]
    torch.testing.assert_close(module.model.state_dict(), step.state_dict())


def test_terratorch(batch):
    """A task that takes a module as its loss."""
    import_torchvision()
    tasks = pytest.importorskip("terratorch.tasks", exc_type=ImportError)
    from lightning.pytorch import Trainer
    from terratorch.models.model import ModelOutput

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = Step().net

        def forward(self, images):
            return ModelOutput(self.net(images))

    network, expected = Network(), Network()
    loss = tritonaff.AffinityFieldLoss((3, 5), cross_entropy=True)
    task = tasks.SemanticSegmentationTask(
        model_args={"num_classes": 4},
        model=network,
        loss=loss,
        ignore_index=255,
        optimizer="SGD",
        lr=0.1,
    )
    trainer = Trainer(
        max_steps=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    images, target = batch
    data = [{"image": images, "mask": target}] * 2
    trainer.fit(task, torch.utils.data.DataLoader(data, batch_size=None))

    optimizer = torch.optim.SGD(expected.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        loss(expected(images).output, target).backward()
        optimizer.step()
    torch.testing.assert_close(network.state_dict(), expected.state_dict())


# -------------------------------------------------------------------------------- Apple's GPUs


class NoFloat64(TorchDispatchMode):
    """The meta device without float64, like MPS."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.device.type == "meta":
                assert tensor.dtype != torch.float64, func
        return result


def test_a_head_is_made_on_a_device_without_float64():
    with torch.device("meta"), NoFloat64():
        head = tritonaff.DilatedAffinityHead(6, [1, 2], [0.9, 0.8])
    assert head.bias.device.type == "meta"


# --------------------------------------------------------------- segmentation_models_pytorch


def test_losses_of_segmentation_models_pytorch_take_the_same_tensors(batch):
    import_torchvision()
    smp = pytest.importorskip("segmentation_models_pytorch", exc_type=ImportError)
    from tritonaff.smp import SegmentationModelsLoss

    network = smp.Unet("resnet18", encoder_weights=None, classes=4)
    images = F.interpolate(batch[0], (64, 96))
    target = batch[1].repeat_interleave(8, dim=1).repeat_interleave(8, dim=2)
    logits = network(images)
    truth = torch.stack([target == k for k in range(4)], dim=1).float()
    for mode, activation, y_pred, y_true in (
        (smp.losses.MULTICLASS_MODE, "softmax", logits, target),
        (smp.losses.BINARY_MODE, "softmax", logits[:, :1], truth[:, :1]),
        (smp.losses.BINARY_MODE, "sigmoid", logits[:, :1], truth[:, :1]),
        (smp.losses.MULTILABEL_MODE, "sigmoid", logits, truth),
    ):
        theirs = smp.losses.DiceLoss(mode, from_logits=True, ignore_index=255)
        loss = tritonaff.AffinityFieldLoss(activation=activation, cross_entropy=True)
        ours = SegmentationModelsLoss(loss, mode, from_logits=True, ignore_index=255)
        for loss_fn in (theirs, ours):
            (grad,) = torch.autograd.grad(loss_fn(y_pred, y_true), logits, retain_graph=True)
            assert grad.abs().sum() > 0


def test_calling_convention_of_segmentation_models_pytorch(batch):
    from tritonaff.smp import SegmentationModelsLoss

    loss = tritonaff.AffinityFieldLoss((3, 5))
    logits, target = torch.randn(2, 4, 8, 12, dtype=torch.float64), batch[1]
    expected = loss(logits, target)
    multiclass = SegmentationModelsLoss(loss, ignore_index=255)
    torch.testing.assert_close(multiclass(logits, target), expected)
    probs = SegmentationModelsLoss(loss, "multiclass", from_logits=False, ignore_index=255)
    torch.testing.assert_close(probs(logits.softmax(dim=1), target), expected)

    one = logits[:, :1]
    expected = loss(torch.cat((torch.zeros_like(one), one), dim=1), target.clamp(max=1))
    y_true = target.clamp(max=1)[:, None].float()
    binary = SegmentationModelsLoss(loss, "binary")
    torch.testing.assert_close(binary(one, y_true), expected)
    torch.testing.assert_close(binary(one, y_true[:, 0]), expected)
    binary = SegmentationModelsLoss(loss, "binary", from_logits=False)
    torch.testing.assert_close(binary(one.sigmoid(), y_true), expected)

    with pytest.raises(ValueError, match=r"mode must be one of .* got 'instances'"):
        SegmentationModelsLoss(loss, "instances")
    with pytest.raises(ValueError, match=r"activation 'sigmoid' with mode 'multilabel', got 'soft"):
        SegmentationModelsLoss(loss, "multilabel")
    by_channel = tritonaff.AffinityFieldLoss(activation="sigmoid")
    with pytest.raises(ValueError, match=r"activation 'softmax' with mode 'multiclass', got 'sigm"):
        SegmentationModelsLoss(by_channel, "multiclass")
    with pytest.raises(TypeError, match="loss must be a module, got str"):
        SegmentationModelsLoss("aaf")
    with pytest.raises(TypeError, match="loss must have an ignore_index, got Identity"):
        SegmentationModelsLoss(nn.Identity())
    with pytest.raises(TypeError, match="loss must have an activation, got DilatedAffinityLoss"):
        SegmentationModelsLoss(tritonaff.DilatedAffinityLoss([1]))
    with pytest.raises(TypeError, match="ignore_index must be an int, got float"):
        SegmentationModelsLoss(loss, ignore_index=255.0)
    torch.testing.assert_close(multiclass(logits, target.float()), multiclass(logits, target))
    with pytest.raises(ValueError, match=r"y_pred must have shape \(N, 1, H, W\)"):
        binary(logits, y_true)
    with pytest.raises(TypeError, match="y_pred must be a tensor"):
        binary([], y_true)
    with pytest.raises(ValueError, match=r"y_true must have shape \(N, H, W\), got"):
        binary(one, y_true.expand(-1, 2, -1, -1))
    with pytest.raises(ValueError, match="y_true must hold whole numbers, got"):
        binary(one, 0.7 * y_true)
    with pytest.raises(TypeError, match="y_true must be a tensor, got ndarray"):
        binary(one, y_true.numpy())
    with pytest.raises(
        ValueError, match=r"loss\.ignore_index must be a label with ignore_index 255"
    ):
        SegmentationModelsLoss(tritonaff.AffinityFieldLoss(ignore_index=None), ignore_index=255)(
            logits, target
        )


@pytest.mark.parametrize("channels", [1, 3])
def test_several_labels_in_segmentation_models_pytorch(batch, channels):
    """Modes "binary" and "multilabel" with sigmoid; pixels may be ignored in one channel alone."""
    from tritonaff.smp import SegmentationModelsLoss

    loss = tritonaff.AffinityFieldLoss((3, 5), activation="sigmoid", cross_entropy=True)
    logits = torch.randn(2, channels, 8, 12, dtype=torch.float64)
    target = torch.stack([batch[1] == k for k in range(channels)], dim=1).float()
    target[0, -1, :3] = -1
    expected = loss(logits, target.masked_fill(target == -1, 255))
    mode = "binary" if channels == 1 else "multilabel"
    ours = SegmentationModelsLoss(loss, mode, ignore_index=-1)
    torch.testing.assert_close(ours(logits, target), expected)
    ours = SegmentationModelsLoss(loss, mode, from_logits=False, ignore_index=-1)
    torch.testing.assert_close(ours(logits.sigmoid(), target), expected)
    with pytest.raises(
        ValueError, match=r"y_true must hold classes in \[0, 2\) or ignore_index -1"
    ):
        ours(logits.sigmoid(), target + 2)
    if channels == 3:
        with pytest.raises(ValueError, match=r"y_true must have shape \(N, 3, H, W\)"):
            ours(logits.sigmoid(), target[:, 0])


@pytest.mark.parametrize(
    ("ignore_index", "ignored_by_loss"), [(255, 255), (255, -1), (-100, 255), (0, 7)]
)
def test_ignore_index_of_segmentation_models_pytorch(batch, ignore_index, ignored_by_loss):
    """The library's ignore_index applies, for any ignore_index of the loss."""
    from tritonaff.smp import SegmentationModelsLoss

    logits, target = torch.randn(2, 4, 8, 12), batch[1].clamp(max=3)
    target[0, :3, :5] = ignore_index
    expected = tritonaff.AffinityFieldLoss(ignore_index=ignore_index)(logits, target)
    loss = tritonaff.AffinityFieldLoss(ignore_index=ignored_by_loss)
    ours = SegmentationModelsLoss(loss, ignore_index=ignore_index)
    torch.testing.assert_close(ours(logits, target), expected, rtol=0, atol=0)
    assert loss.ignore_index == ignored_by_loss


@pytest.mark.parametrize("mode", ["binary", "multiclass"])
@pytest.mark.parametrize("ignored_by_loss", [255, -1])
def test_by_default_no_label_is_ignored_as_in_segmentation_models_pytorch(mode, ignored_by_loss):
    from tritonaff.smp import SegmentationModelsLoss

    logits = torch.randn(2, 1 if mode == "binary" else 2, 8, 12)
    mask = torch.randint(0, 2, (2, 8, 12), dtype=torch.uint8)
    ours = SegmentationModelsLoss(tritonaff.AffinityFieldLoss(ignore_index=ignored_by_loss), mode)
    assert ours(logits, mask) > 0.1
    message = (
        r"y_true must hold classes in \[0, 2\) or ignore_index None, got \[255\] at "
        rf"{mask.sum()} pixels: divide a mask of 0 and 255 by 255, or pass ignore_index"
    )
    with pytest.raises(ValueError, match=message):
        ours(logits, 255 * mask)
    of_a_class = SegmentationModelsLoss(tritonaff.AffinityFieldLoss(ignore_index=1), mode)
    with pytest.raises(ValueError, match=r"loss.ignore_index must be no class .* None, got 1"):
        of_a_class(logits, mask)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("mode", ["binary", "multiclass"])
def test_half_probabilities_are_read_in_float32(mode, dtype):
    """Down to the smallest number of half precision, and for 1 - p too."""
    from tritonaff.smp import SegmentationModelsLoss

    generator = torch.Generator().manual_seed(0)
    probs = torch.rand(2, 2, 8, 12, generator=generator).clamp_min(0.01)
    probs[:, 0, ::2] *= 1e-5
    probs = (probs[:, :1] if mode == "binary" else probs).to(dtype)
    target = torch.randint(0, 2, (2, 8, 12), generator=generator)
    loss = tritonaff.AffinityRegressionLoss(grid_sizes=None)
    ours = SegmentationModelsLoss(loss, mode, from_logits=False)
    values = []
    for p in (probs.requires_grad_(), probs.detach().float().requires_grad_()):
        loss = ours(p, target)
        values.append((loss, torch.autograd.grad(loss, p)[0]))
    (loss, grad), (expected, expected_grad) = values
    torch.testing.assert_close(loss, expected, rtol=0, atol=0)
    torch.testing.assert_close(grad, expected_grad.to(dtype), rtol=0, atol=0)
    assert (probs < 6e-5).any()
    assert (grad[probs < 6e-5] != 0).all()


# ----------------------------------------------------------------------------- MMSegmentation


def test_calling_convention_of_mmsegmentation(batch):
    from tritonaff.mmseg import AAFLoss

    logits, target = torch.randn(2, 4, 8, 12), batch[1]
    loss_fn = AAFLoss(num_classes=4, loss_weight=0.5, kernel_sizes=(3, 5), ignore_index=0)
    expected = 0.5 * tritonaff.AdaptiveAffinityFieldLoss(4, (3, 5))(logits, target)
    alone = tritonaff.AdaptiveAffinityFieldLoss(4, (3, 5), ignore_index=0)
    known = target.clamp(max=3)
    torch.testing.assert_close(loss_fn(logits, known), 0.5 * alone(logits, known))
    value = loss_fn(logits, target, weight=None, ignore_index=255)  # the head's own
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(loss_fn(logits, target, reduction_override="mean"), expected)
    assert loss_fn.ignore_index == 255
    assert loss_fn.loss_name == "loss_aaf"
    assert AAFLoss(4, loss_name="loss_affinity").loss_name == "loss_affinity"
    weighted = AAFLoss(4, class_weight=[1.0, 2.0, 0.0, 1.0], cross_entropy=True)
    assert weighted.weight.tolist() == [1, 2, 0, 1]
    with pytest.raises(ValueError, match=r"weight must be None, got Tensor.*masked_fill\(~mask"):
        loss_fn(logits, target, weight=torch.ones(2, 8, 12))
    with pytest.raises(ValueError, match="avg_factor must be None, got int"):
        loss_fn(logits, target, avg_factor=3)
    with pytest.raises(ValueError, match=r"reduction_override must be one of .* got 'sum'"):
        loss_fn(logits, target, reduction_override="sum")


def test_the_registry_of_mmengine():
    registry = pytest.importorskip("mmengine.registry")
    from tritonaff.mmseg import AAFLoss

    config = {"type": "AAFLoss", "num_classes": 4, "loss_name": "loss_affinity"}
    built = registry.MODELS.build(config)
    assert isinstance(built, AAFLoss)
    assert built.loss_name == "loss_affinity"


def test_the_registry_of_mmsegmentation():
    registry = pytest.importorskip("mmseg.registry", exc_type=ImportError)
    pytest.importorskip("mmcv.ops", exc_type=ImportError)  # the registry imports all models
    from tritonaff.mmseg import AAFLoss

    assert isinstance(registry.MODELS.build({"type": "AAFLoss", "num_classes": 4}), AAFLoss)


# ------------------------------------------------------------------------------- torch.export


def saved_and_loaded(program):
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    return torch.export.load(buffer)


def test_export_of_a_training_step(batch):
    images, target = batch
    step = Step()
    step(images, target).backward()
    sizes = {2: torch.export.Dim("height"), 3: torch.export.Dim("width")}
    shapes = {"images": sizes, "target": {1: sizes[2], 2: sizes[3]}}
    program = torch.export.export(Step(), (images, target), dynamic_shapes=shapes)
    exported = saved_and_loaded(program).module()
    exported(images, target).backward()
    torch.testing.assert_close(grads_of(exported), grads_of(step))
    smaller = images[:, :, :7, :9], target[:, :7, :9]
    torch.testing.assert_close(exported(*smaller), Step()(*smaller))


class Refined(nn.Module):
    def __init__(self):
        super().__init__()
        self.features = nn.Conv2d(3, 6, 3, padding=1)
        self.classify = nn.Conv2d(6, 4, 1)
        self.affinity = tritonaff.DilatedAffinityHead(6, rates=[1, 2])
        self.propagate = tritonaff.AffinityPropagation(rates=[1, 2], iterations=3)

    def forward(self, images):
        features = self.features(images).relu()
        probs = self.classify(features).softmax(dim=1)
        return self.propagate(probs, self.affinity(features))


def test_export_of_a_network_with_propagation(batch):
    images, _ = batch
    network = Refined().eval()
    shape = {0: torch.export.Dim("batch")}
    with tritonaff.use_backend("portable"):  # interpreted tiles would take long
        program = torch.export.export(network, (images,), dynamic_shapes={"images": shape})
    exported = saved_and_loaded(program).module()
    more = torch.cat((images, images, images))
    with tritonaff.use_backend("portable"):
        torch.testing.assert_close(exported(images), network(images))
        torch.testing.assert_close(exported(more), network(more))
