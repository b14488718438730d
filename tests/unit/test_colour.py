"""Changes of colour as one matrix: against torchvision's operations, and numpy's own YIQ."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.transforms import functional

from tidali.config import Augment, Preprocess
from tidali.errors import UsageError
from tidali.loading import native
from tidali.loading.augment import colour_matrices
from tidali.loading.resample import Resample

SAMPLES = torch.arange(64)


def images() -> Tensor:
    """(64, 3, 8, 8) in 0.3..0.7, so that no operation below leaves 0..1 and none of torchvision's clamps."""
    return 0.3 + 0.4 * torch.rand(64, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def apply(matrices: Tensor, pixels: Tensor) -> Tensor:
    """By einsum, in float64."""
    pixels = pixels.double()
    return torch.einsum("nij,njhw->nihw", matrices[:, :, :3].double(), pixels) + matrices[:, :, 3].double()[..., None, None]


def factors(**strength: float) -> tuple[Tensor, Tensor]:
    """Matrices of one change, and each one's factor: the scale of a pixel's distance from what it is blended with."""
    matrices = colour_matrices(Augment(**strength), SAMPLES, seed=3, epoch=1)  # type: ignore[arg-type]
    if "saturation" in strength:  # its matrix has the eigenvalues 1 for grey, and twice the factor
        return matrices, (matrices[:, 0, 0] + matrices[:, 1, 1] + matrices[:, 2, 2] - 1) / 2
    return matrices, matrices[:, 0, 0]


# Both compute in float32 values up to 1: a few roundings of 6e-8, and torchvision's luma has four digits (0.2989).
CLOSE = 2e-4


def test_brightness_is_torchvisions() -> None:
    matrices, factor = factors(brightness=0.3)
    assert 0.7 <= factor.min() < 0.75 < 1.25 < factor.max() <= 1.3
    expected = torch.stack([functional.adjust_brightness(x, f) for x, f in zip(images(), factor.tolist(), strict=True)])
    assert (apply(matrices, images()) - expected).abs().max() < CLOSE


def test_saturation_is_torchvisions() -> None:
    matrices, factor = factors(saturation=0.3)
    assert factor.min() < 0.75 < 1.25 < factor.max()
    expected = torch.stack([functional.adjust_saturation(x, f) for x, f in zip(images(), factor.tolist(), strict=True)])
    assert (apply(matrices, images()) - expected).abs().max() < CLOSE


def test_contrast_is_torchvisions_about_the_middle_grey() -> None:
    """torchvision blends with the image's mean luma: an image whose mean is the middle grey gets the same from both."""
    matrices, factor = factors(contrast=0.3)
    pixels = images()
    luma = functional.rgb_to_grayscale(pixels).mean(dim=(1, 2, 3), keepdim=True)
    centred = pixels - luma + 0.5
    expected = torch.stack([functional.adjust_contrast(x, f) for x, f in zip(centred, factor.tolist(), strict=True)])
    assert (apply(matrices, centred) - expected).abs().max() < CLOSE


def test_hue_turns_i_and_q_and_keeps_luma() -> None:
    matrices = colour_matrices(Augment(hue=0.5), SAMPLES, seed=3, epoch=1)
    # FCC 1953, by numpy and independent of the code's decomposition.
    yiq = np.array([[0.299, 0.587, 0.114], [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]])
    before = np.einsum("ij,njhw->nihw", yiq, images().double().numpy())
    after = np.einsum("ij,njhw->nihw", yiq, apply(matrices, images()).numpy())
    # The rows' digits leave the inverse 1e-4 from exact.
    assert np.abs(after[:, 0] - before[:, 0]).max() < CLOSE
    turned = (after[:, 1] + 1j * after[:, 2]) / (before[:, 1] + 1j * before[:, 2])
    strong = np.hypot(before[:, 1], before[:, 2]) > 0.02
    assert np.abs(np.abs(turned[strong]) - 1).max() < 0.02
    angles = np.array([np.angle(turned[n][strong[n]]).mean() for n in range(8)])
    assert len(np.unique(angles.round(3))) == 8  # each sample has its own
    for n in range(8):
        assert np.abs(np.exp(1j * np.angle(turned[n][strong[n]])) - np.exp(1j * angles[n])).max() < 0.05 or abs(angles[n]) > 3
    assert torch.allclose(matrices.sum(2), torch.ones(64, 3), atol=CLOSE)  # grey stays grey


def test_the_order_is_brightness_contrast_saturation_hue() -> None:
    strengths = {"brightness": 0.3, "contrast": 0.2, "saturation": 0.4, "hue": 0.2}
    together = apply(colour_matrices(Augment(**strengths), SAMPLES, seed=5, epoch=0), images())
    one_by_one = images()
    for name, strength in strengths.items():
        one_by_one = apply(colour_matrices(Augment(**{name: strength}), SAMPLES, seed=5, epoch=0), one_by_one)
    assert (together - one_by_one).abs().max() < CLOSE


def test_a_sample_has_its_own_draw_each_epoch_and_seed() -> None:
    def drawn(samples: Tensor, seed: int = 0, epoch: int = 0) -> Tensor:
        return colour_matrices(Augment(brightness=0.5), samples, seed=seed, epoch=epoch)[:, 0, 0]

    first = drawn(SAMPLES)
    assert torch.equal(drawn(SAMPLES.flip(0)).flip(0), first)
    assert not torch.equal(drawn(SAMPLES, epoch=1), first)
    assert not torch.equal(drawn(SAMPLES, seed=1), first)
    assert torch.equal(colour_matrices(Augment(), SAMPLES, seed=0, epoch=0)[:, :, :3], torch.eye(3).expand(64, 3, 3))


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("res", [16, 24])
def test_resampling_applies_it_before_the_normalisation(
    monkeypatch: pytest.MonkeyPatch, compiled: bool, dtype: torch.dtype, res: int
) -> None:
    if not compiled:
        monkeypatch.setattr(native, "load", lambda: None)
    elif native.load() is None:
        pytest.skip("no C compiler here")
    pixels = torch.randint(0, 256, (64, 16, 16, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    mean, std = torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.2, 0.3, 0.25])
    matrices = colour_matrices(Augment(brightness=0.3, contrast=0.3, saturation=0.3, hue=0.1), SAMPLES, seed=0, epoch=0)
    plain = Resample((16, 16), Preprocess(res=res, mean=(0.0,) * 3, std=(1.0,) * 3))
    # Linear as the resize is, it may come after it; the cubic's overshoot is clamped at the end alone, so not before.
    smooth = (pixels // 8 + 112).contiguous()
    expected = ((apply(matrices, plain(smooth)).clamp(0, 1).float() - mean[:, None, None]) / std[:, None, None]).to(dtype)
    images = Resample((16, 16), Preprocess(res=res, mean=mean.tolist(), std=std.tolist()), dtype=dtype)(smooth, None, matrices)
    assert images.dtype == dtype
    assert images.is_contiguous(memory_format=torch.channels_last)
    # Of float32 some roundings of values up to 5; bfloat16 has 8 bits.
    assert (images.float() - expected.float()).abs().max() <= (1e-4 if dtype == torch.float32 else 2**-6)


def test_colours_stay_within_what_0_and_255_become() -> None:
    pixels = torch.randint(0, 256, (64, 8, 8, 3), dtype=torch.uint8)
    matrices = colour_matrices(Augment(brightness=1.0, contrast=1.0), SAMPLES, seed=0, epoch=0)
    images = Resample((8, 8), Preprocess(res=8, mean=(0.5,) * 3, std=(0.25,) * 3))(pixels, None, matrices)
    assert -2 <= images.min() < -1.9
    assert 1.9 < images.max() <= 2


@pytest.mark.parametrize("wrong", [{"brightness": -0.1}, {"hue": 0.6}, {"contrast": float("inf")}])
def test_strengths_that_cannot_be(wrong: dict[str, float]) -> None:
    with pytest.raises(UsageError, match=next(iter(wrong))):
        Augment(**wrong)  # type: ignore[arg-type]
