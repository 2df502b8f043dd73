"""What is minimised: the objective's loss on latents, and a loss on the pixels of the mask that they decode to."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from models.objectives import LatentEstimate

EDGE_SHARE = 64


def segmentation_loss(logits: torch.Tensor, truth: torch.Tensor, edge_weight: float = 0.0) -> torch.Tensor:
    """Returns binary cross-entropy plus soft Dice loss, 1 - (2 |p t| + 1) / (|p| + |t| + 1), of each picture.

    Dice as a loss comes from V-Net (arXiv 1606.04797), there with squares in the denominator. The ones let an empty prediction
    of an empty truth cost nothing; a prediction that is not empty costs nearly 1 there, and cross-entropy does the teaching.

    Args:
        logits: (B, H, W), float32.
        truth: (B, H, W), float32 in {0, 1}.
        edge_weight: times `edges`, added to the weight 1 of every pixel; the weights are scaled to a mean of 1.

    Returns:
        (B,), float32.
    """
    soft = logits.sigmoid()
    entropy = F.binary_cross_entropy_with_logits(logits, truth, reduction="none")
    if edge_weight:
        weights = 1 + edge_weight * edges(truth)
        weights = weights / weights.mean(dim=(1, 2), keepdim=True)
        entropy, overlap, total = entropy * weights, soft * truth * weights, (soft + truth) * weights
    else:
        overlap, total = soft * truth, soft + truth
    dice = 1 - (2 * overlap.sum(dim=(1, 2)) + 1) / (total.sum(dim=(1, 2)) + 1)
    return entropy.mean(dim=(1, 2)) + dice


def edges(truth: torch.Tensor) -> torch.Tensor:
    """Returns how near each pixel is to the border of its mask: nearly 1 at a straight edge, 0 beyond 1/64 of the picture's height.

    Twice the share of the other class in the square around a pixel, after the weights of F3Net (arXiv 1911.11445, section 3.3).

    Args:
        truth: (B, H, W), float32 in {0, 1}.
    """
    reach = max(1, truth.shape[-2] // EDGE_SHARE)
    mean = F.avg_pool2d(truth[:, None], 2 * reach + 1, stride=1, padding=reach, count_include_pad=False)[:, 0]
    return 2 * (mean - truth).abs()


def weighted_losses(
    estimate: LatentEstimate,
    labels: torch.Tensor,
    read_logits: Callable[[torch.Tensor], torch.Tensor],
    latent_weight: float,
    pixel_weight: float,
    edge_weight: float = 0.0,
) -> dict[str, torch.Tensor]:
    """Returns the named losses of a batch, each (B,): `loss`, which is minimised, and its unweighted parts.

    Args:
        estimate: of the objective.
        labels: (B, H, W), on its device; any but 0 is glass.
        read_logits: latents (B, C, h, w) to logits (B, H, W) of the mask, with their gradient; not called at weight 0.
        latent_weight: of the latent loss.
        pixel_weight: of the pixel loss.
        edge_weight: of pixels near edges in it.
    """
    loss = latent_weight * estimate.latent_loss
    if not pixel_weight:
        return {"loss": loss, "latent_loss": estimate.latent_loss}
    pixel_loss = segmentation_loss(read_logits(estimate.clean_latents), (labels > 0).float(), edge_weight)
    return {"loss": loss + pixel_weight * pixel_loss, "latent_loss": estimate.latent_loss, "pixel_loss": pixel_loss}
