"""The loss on pixels has its known values, and the parts are weighted as asked."""

from __future__ import annotations

import pytest
import torch

from models.losses import edges, segmentation_loss, weighted_losses
from models.objectives import LatentEstimate


def halves() -> torch.Tensor:
    """Two truths of 16 pixels: the left half, and nothing."""
    truth = torch.zeros(2, 4, 4)
    truth[0, :, :2] = 1
    return truth


def test_loss_is_zero_for_the_truth_and_has_its_known_value_at_one_half() -> None:
    truth = halves()
    assert segmentation_loss(truth * 200 - 100, truth).tolist() == pytest.approx([0, 0], abs=1e-6)
    # p = 1/2 everywhere: cross-entropy ln 2; Dice 1 - 9 / 17 with 8 of 16 pixels true, 1 - 1 / 9 with none.
    expected = [0.693147 + 8 / 17, 0.693147 + 8 / 9]
    assert segmentation_loss(torch.zeros(2, 4, 4), truth).tolist() == pytest.approx(expected, abs=1e-5)


def test_edges_are_where_the_other_class_is_near() -> None:
    truth = torch.zeros(1, 128, 128)
    truth[..., 64:] = 1
    near = edges(truth)[0, 60]
    # Squares of 5 x 5: two fifths of the other class at the edge, one fifth a pixel further, none beyond.
    assert near[[60, 61, 62, 63, 64, 65, 66, 67]].tolist() == pytest.approx([0, 0, 0.4, 0.8, 0.8, 0.4, 0, 0])
    assert not edges(torch.ones(1, 64, 64)).any()  # the picture's own edge is none


def test_a_mistake_at_the_edge_costs_more_than_one_far_from_it() -> None:
    truth = torch.zeros(2, 128, 128)
    truth[..., 64:] = 1
    logits = truth * 20 - 10
    logits[0, :, 63] = 10  # a column too many, at the edge and far from it
    logits[1, :, 5] = 10
    plain, weighted = segmentation_loss(logits, truth), segmentation_loss(logits, truth, 4.0)
    assert plain[0].item() == pytest.approx(plain[1].item(), rel=1e-4)
    assert weighted[0] > 2 * weighted[1]
    assert weighted[1] < plain[1]
    assert segmentation_loss(logits, torch.zeros(2, 128, 128), 4.0).equal(
        segmentation_loss(logits, torch.zeros(2, 128, 128))
    )


def test_the_parts_are_weighted_and_named() -> None:
    estimate = LatentEstimate(torch.tensor([1.0, 3.0]), torch.zeros(2, 1, 4, 4))
    losses = weighted_losses(estimate, halves().to(torch.uint8), lambda z: z[:, 0], 0.5, 2.0)
    assert losses["latent_loss"].tolist() == [1, 3]
    pixel = losses["pixel_loss"].tolist()
    assert pixel == pytest.approx([0.693147 + 8 / 17, 0.693147 + 8 / 9], abs=1e-5)
    assert losses["loss"].tolist() == pytest.approx([0.5 + 2 * pixel[0], 1.5 + 2 * pixel[1]])


def test_without_a_weight_pixels_are_not_decoded() -> None:
    def fail(latents: torch.Tensor) -> torch.Tensor:
        raise AssertionError

    losses = weighted_losses(LatentEstimate(torch.ones(2), torch.zeros(2, 1, 4, 4)), halves(), fail, 1.0, 0.0)
    assert losses["loss"].tolist() == [1, 1]
    assert losses.keys() == {"loss", "latent_loss"}
