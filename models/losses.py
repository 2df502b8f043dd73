"""What is minimised: the objective's loss on latents, and a loss on the pixels of the mask that they decode to."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from models.objectives import LatentEstimate


def segmentation_loss(logits: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """Returns binary cross-entropy plus soft Dice loss, 1 - (2 |p t| + 1) / (|p| + |t| + 1), of each picture.

    Dice as a loss comes from V-Net (arXiv 1606.04797), there with squares in the denominator. The ones let an empty prediction
    of an empty truth cost nothing; a prediction that is not empty costs nearly 1 there, and cross-entropy does the teaching.

    Args:
        logits: (B, H, W), float32.
        truth: (B, H, W), float32 in {0, 1}.

    Returns:
        (B,), float32.
    """
    soft = logits.sigmoid()
    overlap, total = (soft * truth).sum(dim=(1, 2)), (soft + truth).sum(dim=(1, 2))
    entropy = F.binary_cross_entropy_with_logits(logits, truth, reduction="none").mean(dim=(1, 2))
    return entropy + 1 - (2 * overlap + 1) / (total + 1)


def weighted_losses(
    estimate: LatentEstimate,
    labels: torch.Tensor,
    read_logits: Callable[[torch.Tensor], torch.Tensor],
    latent_weight: float,
    pixel_weight: float,
) -> dict[str, torch.Tensor]:
    """Returns the named losses of a batch, each (B,): `loss`, which is minimised, and its unweighted parts.

    Args:
        estimate: of the objective.
        labels: (B, H, W) in {0, 1}, on its device.
        read_logits: latents (B, C, h, w) to logits (B, H, W) of the mask, with their gradient; not called at weight 0.
        latent_weight: of the latent loss.
        pixel_weight: of the pixel loss.
    """
    loss = latent_weight * estimate.latent_loss
    if not pixel_weight:
        return {"loss": loss, "latent_loss": estimate.latent_loss}
    pixel_loss = segmentation_loss(read_logits(estimate.clean_latents), labels.float())
    return {"loss": loss + pixel_weight * pixel_loss, "latent_loss": estimate.latent_loss, "pixel_loss": pixel_loss}
