"""The loss of images with masks: how much each latent counts, and what it should be.

With m the mask of a latent (1 inside, 0 outside) and w the weight outside, a latent counts
m + w (1 - m) times. Where the target outside is the frozen base's prediction, the two squared
errors of a latent on the edge, m (p - t)^2 + w (1 - m) (p - b)^2, have the gradient of one error
with that weight, towards the mean of both targets with those weights. That one is computed.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from gralora_diffusion.training.config.data_options import MaskOptions

#: ``mask_outside`` -> the default of ``mask_outside_weight``.
_WEIGHTS = {"ignore": 0.0, "weight": 0.1, "base": 1.0}


@dataclass(frozen=True)
class MaskedLoss:
    """How the loss counts what is outside of a mask. Masks are (batch, 1, h, w) of the latents.

    Attributes:
        outside: weight of a latent outside, relative to one inside.
        towards_base: the target outside is the frozen base's prediction.
        normalize: divide by the mean weight of each sample.
    """

    outside: float
    towards_base: bool
    normalize: bool

    @classmethod
    def of(cls, options: MaskOptions) -> MaskedLoss:
        """Return that of a run's options."""
        kind, weight = options.mask_outside, options.mask_outside_weight
        if weight is None or kind == "ignore":
            weight = _WEIGHTS[kind]
        return cls(weight, kind == "base", options.normalize_masked_area_loss)

    def __str__(self) -> str:
        if not self.outside:
            return "outside the mask, the loss counts nothing"
        if self.towards_base:
            what = "the target is the base's prediction,"
        else:
            what = "the loss counts the image"
        return f"outside the mask, {what} with weight {self.outside:g}"

    def weights(self, masks: Tensor) -> Tensor:
        """Return how much each latent counts, shaped as the masks.

        A sample of which nothing counts has weights of zero, also if they are normalized.
        """
        weights = masks + self.outside * (1 - masks)
        if not self.normalize:
            return weights
        mean = weights.mean((1, 2, 3), keepdim=True)
        return weights / mean.where(mean > 0, mean.new_ones(()))

    def target(self, masks: Tensor, target: Tensor, base: Tensor) -> Tensor:
        """Return what each latent should be predicted as.

        Args:
            target: of the image, (batch, C, h, w).
            base: the frozen base's prediction, as ``target``.
        """
        inside, outside = masks, self.outside * (1 - masks)
        total = inside + outside
        total = total.where(total > 0, total.new_ones(()))
        return (inside * target + outside * base) / total
