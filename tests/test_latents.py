"""Pixels to latents and back: the mode, the normalisation, the gradient."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from models.latents import LatentCodec, cut_and_mix, feature_channels
from tests.conftest import make_vae


class FoldingVae:
    """A lossless stand-in for a VAE: space folded into channels, and a posterior whose sample differs from its mode."""

    def __init__(self, shift_factor: float | None = 0.25) -> None:
        self.config = SimpleNamespace(scaling_factor=2.0, shift_factor=shift_factor)
        self.dtype = torch.float32

    def encode(self, pixels: torch.Tensor) -> SimpleNamespace:
        mode = torch.nn.functional.pixel_unshuffle(pixels, 8)
        posterior = SimpleNamespace(mode=lambda: mode, sample=lambda: mode + torch.randn_like(mode))
        return SimpleNamespace(latent_dist=posterior)

    def decode(self, z: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(sample=torch.nn.functional.pixel_shuffle(z, 8))


def pixels(batch: int = 2, height: int = 16, width: int = 24) -> torch.Tensor:
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_decoding_undoes_encoding() -> None:
    codec = LatentCodec(FoldingVae())
    torch.testing.assert_close(codec.decode(codec.encode(pixels())), pixels())


def test_latents_are_shifted_then_scaled() -> None:
    latents = LatentCodec(FoldingVae()).encode(torch.full((1, 3, 8, 8), 0.75))
    assert latents.shape == (1, 192, 1, 1)
    assert torch.equal(latents, torch.full_like(latents, (0.75 - 0.25) * 2.0))


def test_a_vae_without_a_shift_factor_is_only_scaled() -> None:
    codec = LatentCodec(FoldingVae(shift_factor=None))
    assert codec.encode(torch.ones(1, 3, 8, 8)).unique().tolist() == [2.0]
    assert codec.decode(torch.ones(1, 192, 1, 1)).unique().tolist() == [0.5]


def test_encoding_takes_the_mode_and_is_deterministic() -> None:
    vae = make_vae()
    codec = LatentCodec(vae)
    torch.manual_seed(1)
    first = codec.encode(pixels())
    torch.manual_seed(2)
    assert torch.equal(codec.encode(pixels()), first)
    mode = vae.encode(pixels()).latent_dist.mode()
    torch.testing.assert_close(first, (mode - 0.1) * 1.5)
    assert first.shape == (2, 16, 2, 3)


def test_a_real_vae_decodes_to_pixels_at_eight_times_the_side() -> None:
    vae, latents = make_vae(), torch.randn(2, 16, 2, 3)
    decoded = LatentCodec(vae).decode(latents)
    assert decoded.shape == (2, 3, 16, 24)
    torch.testing.assert_close(decoded, vae.decode(latents / 1.5 + 0.1).sample)


def test_gradients_flow_through_decode_even_of_a_frozen_vae() -> None:
    codec = LatentCodec(make_vae().requires_grad_(False))
    latents = torch.randn(1, 16, 2, 2, requires_grad=True)
    codec.decode(latents).square().mean().backward()
    assert latents.grad is not None
    assert latents.grad.isfinite().all()
    assert latents.grad.abs().sum() > 0


@pytest.mark.parametrize("pixels_per_call", [1, 10**6])
def test_features_are_what_the_encoder_hands_on_at_each_resolution(
    monkeypatch: pytest.MonkeyPatch, pixels_per_call: int
) -> None:
    monkeypatch.setattr("models.latents.PIXELS_PER_CALL", pixels_per_call)
    vae = make_vae()
    latents, features = LatentCodec(vae).encode_with_features(pixels())
    torch.testing.assert_close(latents, LatentCodec(vae).encode(pixels()))
    assert [tuple(each.shape) for each in features] == [(2, 8, 16, 24), (2, 8, 8, 12), (2, 8, 4, 6)]
    assert feature_channels(vae) == [8, 8, 8]
    x = vae.encoder.conv_in(pixels())
    for block, found in zip(vae.encoder.down_blocks, features, strict=False):
        x = block.resnets[0](x, None)
        torch.testing.assert_close(found, torch.nn.functional.group_norm(x, 4))
        x = block.downsamplers[0](x)
    assert not any(block.resnets[-1]._forward_hooks for block in vae.encoder.down_blocks)


def test_a_compiled_encoder_gives_features_every_time() -> None:
    vae = make_vae()
    expected = LatentCodec(vae).encode_with_features(pixels())[1]
    vae.encoder.compile(backend="eager")
    codec = LatentCodec(vae)
    for _ in range(3):  # pictures and masks in turn, as in training
        for found, wanted in zip(codec.encode_with_features(pixels())[1], expected, strict=True):
            torch.testing.assert_close(found, wanted)
        codec.encode(pixels())


def test_encoding_builds_no_graph() -> None:
    assert not LatentCodec(make_vae()).encode(pixels().requires_grad_()).requires_grad


def test_a_half_precision_vae_still_gives_float32() -> None:
    codec = LatentCodec(make_vae().to(torch.bfloat16))
    latents = codec.encode(pixels())
    assert latents.dtype == torch.float32
    assert codec.decode(latents.to(torch.bfloat16)).dtype == torch.float32


@pytest.mark.parametrize("shape", [(3, 16, 16), (1, 1, 16, 16), (1, 4, 16, 16), (1, 3, 12, 16), (1, 3, 16, 20)])
def test_pixels_of_another_shape_are_refused_with_their_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"\(B, 3, H, W\).*multiples of 8") as caught:
        LatentCodec(FoldingVae()).encode(torch.zeros(shape))
    assert str(shape) in str(caught.value)


def make_batch(count: int = 64) -> dict[str, Any]:
    """A batch whose latents and labels say which sample they come from."""
    number = torch.arange(count)
    latents = number.float().view(-1, 1, 1, 1).expand(-1, 2, 10, 20)
    labels = number.to(torch.uint8).view(-1, 1, 1).expand(-1, 80, 160)
    features = [latents.repeat_interleave(factor, 2).repeat_interleave(factor, 3) for factor in (8, 2)]
    batch = {"image_latents": latents, "mask_latents": -latents, "label": labels, "features": features}
    return {**batch, "epoch": [3] * count, "index": list(range(count))}


def test_cutmix_takes_one_rectangle_of_the_next_sample_at_the_same_place_everywhere() -> None:
    batch = make_batch()
    mixed = cut_and_mix(batch, 1.0, seed=1)
    places = set()
    for number in range(64):
        image, mask, label = (mixed[name][number] for name in ("image_latents", "mask_latents", "label"))
        foreign = image[0] != number
        assert (image[0][foreign] == (number + 1) % 64).all()
        assert torch.equal(mask, -image)
        assert torch.equal(label, image[0].to(torch.uint8).repeat_interleave(8, 0).repeat_interleave(8, 1))
        for feature, factor in zip(mixed["features"], (8, 2), strict=True):
            assert torch.equal(feature[number], image.repeat_interleave(factor, 1).repeat_interleave(factor, 2))
        rows, columns = foreign.any(dim=1).sum().item(), foreign.any(dim=0).sum().item()
        assert rows * columns == foreign.sum().item()  # a rectangle
        assert 3 <= rows <= 7
        assert 6 <= columns <= 14
        places.add((foreign.any(dim=1).tolist().index(True), foreign.any(dim=0).tolist().index(True)))
    assert len(places) > 30


def test_cutmix_mixes_its_share_and_repeats_itself() -> None:
    batch = make_batch()
    mixed = cut_and_mix(batch, 0.5, seed=1)
    changed = [not mixed["label"][number].equal(batch["label"][number]) for number in range(64)]
    assert 20 < sum(changed) < 44
    again = cut_and_mix(make_batch(), 0.5, seed=1)
    assert all(again[name].equal(mixed[name]) for name in ("image_latents", "mask_latents", "label"))
    other = cut_and_mix({**make_batch(), "epoch": [4] * 64}, 0.5, seed=1)
    assert not other["label"].equal(mixed["label"])
    assert cut_and_mix(batch, 0.0, seed=1)["label"].equal(batch["label"])


def test_the_vae_keeps_its_own_precision_under_autocast() -> None:
    codec = LatentCodec(make_vae())
    pixels = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents = codec.encode(pixels)
    decoded = codec.decode(latents)
    with torch.autocast("cpu", torch.bfloat16):
        assert codec.encode(pixels).equal(latents)
        assert codec.decode(latents).equal(decoded)
