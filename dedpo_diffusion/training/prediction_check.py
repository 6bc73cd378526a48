"""Whether a model predicts what its files say, told from one pair of images: noise or v, and from which noise schedule.

A checkpoint that lost its marks loads as a model of noise, and training it as one teaches it nonsense. What a UNet gives back at mid and
high noise is close to what it was trained to predict and far from the other: a model of noise explains nearly all of the noise there, and
none of v (arXiv 2202.00512), and the other way round. A model that explains neither is one that nothing can be told of.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from dedpo_diffusion.core.console import UserError, say
from dedpo_diffusion.core.records import Conditioning
from dedpo_diffusion.dpo.noising import ForwardProcess, step_generator
from dedpo_diffusion.models.backbone import Backbone, Network
from dedpo_diffusion.models.marks import WORDS, schedule

if TYPE_CHECKING:
    from dedpo_diffusion.training.sources import Source

PLACES = (0.5, 0.7, 0.85)  # of the schedule: mid and high noise, where the two targets differ most
ENOUGH, CLEAR = 0.15, 0.3  # share of the target's mean square that the better hypothesis must explain, and be ahead of the other by
LARGEST = 64  # latents of a side that are looked at
LEAST = 32  # of a side, below which a shift of the whole image is lost in the noise of the last timestep
SEEN, UNSEEN = 0.5, 0.2  # share of such a shift that a model follows that was trained without, and with zero SNR
STREAM = 1003
Predict = Callable[[Tensor, Tensor], Tensor]  # of x_t (N, 2, C, h, w) at t (N,)


@dataclass(frozen=True)
class Evidence:
    """What one look at a model shows.

    Attributes:
        explained: by prediction type and whether the schedule is taken to end at zero SNR, the share of the target's mean square that
            the model's output explains, the median over timesteps: 1 is an exact prediction, 0 no better than none.
        follows: share of a shift of the clean image that the model follows at the last timestep of the schedule without zero SNR, None
            where the latents are too small to tell.
    """

    explained: Mapping[tuple[str, bool], float]
    follows: float | None

    @property
    def prediction(self) -> str | None:
        """What the model predicts, None where that cannot be told."""
        best = {kind: max(value for (own, _), value in self.explained.items() if own == kind) for kind in WORDS}
        found, other = sorted(best, key=lambda kind: -best[kind])
        return found if best[found] >= ENOUGH and best[found] - best[other] >= CLEAR else None

    @property
    def zero_snr(self) -> bool | None:
        """Whether its schedule ends at zero SNR, None where that cannot be told."""
        if self.prediction != "v_prediction" or self.follows is None or UNSEEN < self.follows < SEEN:
            return None
        return self.follows <= UNSEEN


def look(
    unet: nn.Module, dtype: torch.dtype, schedules: Mapping[bool, Tensor], latents: Tensor, conditioning: Conditioning, told_sizes: bool
) -> Evidence:
    """What a UNet gives back of one pair.

    Args:
        unet: not changed; what it drops out is left in.
        dtype: compute precision.
        schedules: cumulated alphas (T,) without and with zero terminal SNR.
        latents: scaled (1, 2, C, h, w), on the UNet's device.
        conditioning: of that pair.
        told_sizes: whether the UNet is told the images' sizes.
    """
    network, training = Network(unet, dtype), unet.training
    sizes = conditioning.sizes if told_sizes else None

    def predict(noisy: Tensor, timesteps: Tensor) -> Tensor:
        count = len(timesteps)
        given = (conditioning.text, conditioning.pooled, sizes)
        return network(noisy, timesteps, *(None if value is None else value.expand(count, *value.shape[1:]) for value in given)).float()

    unet.eval()
    try:
        with torch.no_grad():
            explained = {
                key: value for zero, alphas in schedules.items() for key, value in _explained(predict, alphas, zero, latents).items()
            }
            return Evidence(explained, _follows(predict, schedules[False], latents))
    finally:
        unet.train(training)


def _noise(latents: Tensor, count: int) -> Tensor:
    generator = step_generator(0, 0, STREAM)
    return torch.randn(count, 1, *latents.shape[2:], generator=generator).to(latents.device)


def _explained(predict: Predict, alphas: Tensor, zero: bool, latents: Tensor) -> dict[tuple[str, bool], float]:
    """The share of each target that is explained, with x_t of this schedule."""
    timesteps = torch.tensor([int(place * len(alphas)) for place in PLACES], device=latents.device)
    clean = latents.expand(len(timesteps), *latents.shape[1:])
    noise = _noise(latents, len(timesteps))
    found = predict(ForwardProcess(alphas, "epsilon").add_noise(clean, noise, timesteps), timesteps)
    shares = {}
    for kind in WORDS:
        wanted = ForwardProcess(alphas, kind).target(clean, noise, timesteps)
        size, left = (values.square().flatten(1).mean(dim=1) for values in (wanted, found - wanted))
        shares[kind, zero] = float((1 - left / size).median())  # one timestep at which the model is weak decides nothing
    return shares


def _follows(predict: Predict, alphas: Tensor, latents: Tensor) -> float | None:
    """The largest share, over the latents' channels, of a shift of x_0 that v follows at the last timestep.

    The last alpha of the usual schedule is 0.07, so that x_T still tells the mean of an image, and a model that was trained on it reads it
    there. One that was trained on pure noise at T has no use for it.
    """
    if min(latents.shape[-2:]) < LEAST:
        return None
    channels = latents.shape[2]
    one = torch.eye(channels, device=latents.device)[:, :, None, None]
    shift = torch.stack([one, -one], dim=1)
    timesteps = torch.full((channels,), len(alphas) - 1, device=latents.device)
    process = ForwardProcess(alphas, "v_prediction")
    clean = latents[:, :1].expand(channels, 2, *latents.shape[2:]) + shift
    found = predict(process.add_noise(clean, _noise(latents, 1), timesteps), timesteps)
    means = found.mean(dim=(-2, -1))  # (channels, 2, channels)
    moved = torch.diagonal(means[:, 0] - means[:, 1]) / 2  # -sigma_T where all of the shift is followed
    sigma = float((1 - alphas[-1].double()).sqrt())
    return float((-moved / sigma).max())


def check_prediction(model: Backbone, name: str, source: Source, row: int, *, overruled: bool = False, tell: bool = True) -> None:
    """Look whether a model predicts what it is taken to predict, and say or refuse what does not fit.

    Args:
        model: before it is trained, on its device.
        name: of it, for messages.
        source: of encoded pairs.
        row: of the pair that is looked at.
        overruled: what it predicts was given by hand, so that a misfit is told and not refused.
        tell: whether this process speaks.

    Raises:
        UserError: it clearly predicts the other of noise and v, and nobody said otherwise.
    """
    found = _look_at(model, source, row)
    if found is None:
        return
    declared, zero = model.process.prediction, bool(model.process.alphas_cumprod[-1] == 0)
    words = ""
    if found.prediction is None:
        if not overruled:
            words = f"{name}: one forward pass cannot tell whether it predicts noise or v; it is taken to predict {WORDS[declared]}"
    elif found.prediction != declared:
        if not overruled:
            raise UserError(_misfit(name, declared, found))
        words = f"Warning: {_misfit(name, declared, found)}"
    elif found.zero_snr is not None and found.zero_snr != zero:
        words = _other_schedule(name, found)
    if words and tell:
        say(words)


def _other_schedule(name: str, found: Evidence) -> str:
    ends, trained, option = ("does not end", "with", "v_zero_snr") if found.zero_snr else ("ends", "without", "v")
    return (
        f"Warning: {name}: its noise schedule {ends} at zero SNR, but it seems to have been trained {trained} it: at the last timestep "
        f"of the usual schedule it follows {found.follows:.0%} of a shift of the image. Try --model_prediction {option}"
    )


def _misfit(name: str, declared: str, found: Evidence) -> str:
    other = str(found.prediction)
    shares = {kind: max(value for (own, _), value in found.explained.items() if own == kind) for kind in WORDS}
    option = "epsilon" if other == "epsilon" else "v_zero_snr" if found.zero_snr else "v, or v_zero_snr if its schedule ends at zero SNR"
    return (
        f"{name}: it is taken to predict {WORDS[declared]}, but at mid and high noise its output explains {shares[other]:.0%} of "
        f"{WORDS[other]} and {max(shares[declared], 0):.0%} of {WORDS[declared]}, so it predicts {WORDS[other]}; "
        f"give --model_prediction {option}"
    )


def _look_at(model: Backbone, source: Source, row: int) -> Evidence | None:
    """None where the scheduler's configuration has no betas to compare."""
    config = {key: value for key, value in model.scheduler.config.items() if key != "prediction_type"}
    found = {zero: schedule({**config, "rescale_betas_zero_snr": zero}) for zero in (False, True)}
    schedules = {zero: alphas.to(model.device) for zero, alphas in found.items() if alphas is not None}
    if len(schedules) < len(found):
        return None
    encoded = source.fetch([row], [0], torch.tensor([False]))
    mean = encoded.mean.to(model.device)
    rows, columns = (_kept(side) for side in mean.shape[-2:])
    latents = model.latents(mean, torch.zeros_like(mean), torch.zeros_like(mean))[..., :rows, :columns].contiguous()
    unet = model.unet if model.frozen is None else model.frozen
    return look(unet, model.dtype, schedules, latents, encoded.conditioning.to(model.device), model.told_sizes)


def _kept(side: int) -> int:
    """Latents of a side that are looked at: all of few, and of many a number that every UNet can shrink."""
    return min(side, LARGEST)
