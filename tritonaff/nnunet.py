"""A trainer of nnU-Net whose loss has an affinity field beside Dice and cross-entropy. Without
nnU-Net this module has the loss alone.

nnU-Net finds the trainer through a file in a folder of your own:

    echo "from tritonaff.nnunet import nnUNetTrainerAffinityField" > FOLDER/affinity_field.py
    nnUNet_extTrainer=FOLDER nnUNetv2_train DATASET 2d 0 -tr nnUNetTrainerAffinityField
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor, nn

from tritonaff import AffinityFieldLoss

# In a target of regions, whose labels are 0 and 1; nnU-Net keeps ignored pixels in a channel.
IGNORED = 255


class WithAffinityField(nn.Module):
    """A loss of nnU-Net plus an affinity field, for logits of one resolution.

    Args:
        own: a loss of nnU-Net, called with its arguments as they are.
        field: of the activation "softmax" for classes, "sigmoid" for regions.

    Shapes:
        ``forward(net_output, target)`` with logits (N, C, H, W) and a target (N, 1, H, W), or
        (N, C, H, W) of regions, with one more channel that is 1 where pixels are ignored, gives a
        scalar. Volumes (N, C, D, H, W) are taken slice by slice: pairs lie in the last two axes.

    Example:
        >>> import torch, tritonaff
        >>> from tritonaff.nnunet import WithAffinityField
        >>> own = lambda net_output, target: torch.nn.functional.cross_entropy(
        ...     net_output, target[:, 0].long())
        >>> loss_fn = WithAffinityField(own, tritonaff.AffinityFieldLoss(ignore_index=None))
        >>> net_output = torch.randn(1, 3, 4, 16, 16, requires_grad=True)
        >>> loss_fn(net_output, torch.randint(0, 3, (1, 1, 4, 16, 16)).short()).backward()
    """

    def __init__(self, own: Callable[[Tensor, Tensor], Tensor], field: AffinityFieldLoss) -> None:
        super().__init__()
        self.own = own
        self.field = field

    def forward(self, net_output: Tensor, target: Tensor) -> Tensor:
        """The sum of both losses: net_output (N, C, H, W) or (N, C, D, H, W), target likewise with
        one channel, or with a channel for each region.
        """
        labels, num_channels = target, net_output.shape[1]
        if self.field.activation == "sigmoid" and target.shape[1] == num_channels + 1:
            ignored = target[:, num_channels:] != 0
            labels = target[:, :num_channels].int().masked_fill(ignored, IGNORED)
        field: Tensor = self.field(_slices(net_output), _slices(labels))
        loss: Tensor = self.own(net_output, target) + field
        return loss


def _slices(volume: Tensor) -> Tensor:
    """Images (N D, C, H, W) of volumes (N, C, D, H, W); images as they are."""
    return volume.transpose(1, 2).flatten(0, 1) if volume.dim() == 5 else volume


try:
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
except ImportError:
    pass
else:

    class nnUNetTrainerAffinityField(nnUNetTrainer):  # type: ignore[misc]
        """nnU-Net's trainer with an affinity field beside its own loss, at every resolution of its
        deep supervision. The field decays over the epochs as the paper's authors let it.

        For other options derive a class from this one: ``field_options`` are the arguments of
        :class:`tritonaff.AffinityFieldLoss`.
        """

        field_options: ClassVar[dict[str, Any]] = {}

        def _build_loss(self) -> Any:
            loss = super()._build_loss()
            labels = self.label_manager
            self.field = AffinityFieldLoss(
                **self.field_options,
                activation="sigmoid" if labels.has_regions else "softmax",
                ignore_index=IGNORED if labels.has_regions else labels.ignore_label,
            )
            if not self.enable_deep_supervision:
                return WithAffinityField(loss, self.field)
            loss.loss = WithAffinityField(loss.loss, self.field)
            return loss

        def on_train_epoch_start(self) -> None:
            super().on_train_epoch_start()
            self.field.set_progress(self.current_epoch / self.num_epochs)
