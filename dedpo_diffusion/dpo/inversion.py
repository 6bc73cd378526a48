"""The noise that an image comes from: the steps of DDIM solved backwards, from the image to chosen timesteps.

DDIM without added noise (Song et al., arXiv 2010.02502) goes from t to an earlier s by

    x_s = alpha_s clean(x_t) + sigma_s eps(x_t),    clean(x_t) = (x_t - sigma_t eps(x_t)) / alpha_t,    eps predicted at (x_t, t)

Inverting it means to find x_t for a known x_s. What is often done takes eps at x_s in place of x_t, or at the timestep s in place of t;
sampling from what comes out gives another image. Here the equation itself is solved, by fixed-point iteration with Anderson's acceleration
(Walker & Ni, SIAM J. Numer. Anal. 49, 2011), without which it goes round in circles where the model is steep.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from dedpo_diffusion.dpo.noising import ForwardProcess

Predict = Callable[[Tensor, Tensor], Tensor]  # x_t (B, K, C, h, w) and timesteps (B,) -> what the model predicts there, of that shape
TOLERANCE, MOST = 1e-6, 40  # of the root mean square of x_t's change in an iteration, and iterations of a step
MEMORY = 6  # iterations that Anderson's acceleration looks back on


def predicted_noise(process: ForwardProcess, prediction: Tensor, noisy: Tensor, timesteps: Tensor) -> Tensor:
    """The noise implied by a prediction at x_t, of its shape; timesteps (B,)."""
    if process.prediction == "epsilon":
        return prediction
    alpha, sigma = process.scales(timesteps, noisy)
    return alpha * prediction + sigma * noisy


def implied_noise(process: ForwardProcess, clean: Tensor, noisy: Tensor, timesteps: Tensor) -> Tensor:
    """The noise (B, ..., C, h, w) with which `ForwardProcess.add_noise` makes x_t of x_0, both of that shape; timesteps (B,)."""
    alpha, sigma = process.scales(timesteps, clean)
    return (noisy - alpha * clean) / sigma


def _scales(process: ForwardProcess, timesteps: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """alpha and sigma as `ForwardProcess.scales`; a timestep of -1 is the image itself, alpha 1 and sigma 0."""
    alpha, sigma = process.scales(timesteps.clamp(min=0), like)
    image = (timesteps < 0).view(-1, *[1] * (like.ndim - 1))
    return torch.where(image, 1.0, alpha), torch.where(image, 0.0, sigma)


def ddim_step(process: ForwardProcess, predict: Predict, noisy: Tensor, timesteps: Tensor, earlier: Tensor) -> Tensor:
    """x at `earlier` (B,) from x_t at `timesteps` (B,), of the shape of x_t; -1 is the image itself.

    At alpha_t = 0, where the noise tells nothing of the image, the model must predict v.
    """
    prediction = predict(noisy, timesteps)
    noise, clean = predicted_noise(process, prediction, noisy, timesteps), process.clean(prediction, noisy, timesteps)
    alpha, sigma = _scales(process, earlier, noisy)
    return alpha * clean + sigma * noise


def noise_levels(process: ForwardProcess, count: int) -> Tensor:
    """Timesteps (N,), `count` or fewer, at which sigma / alpha grows by about equal factors, over the whole schedule."""
    cumulated = process.alphas_cumprod.double().cpu()
    ratio = ((1 - cumulated) / cumulated).sqrt()
    ratio = ratio[ratio.isfinite()]  # not the end of a schedule of zero terminal SNR
    wanted = torch.logspace(float(ratio[0].log10()), float(ratio[-1].log10()), count, dtype=torch.float64)
    return torch.searchsorted(ratio, wanted).clamp(max=len(ratio) - 1).unique()


def knots_through(levels: Tensor, timesteps: Tensor) -> Tensor:
    """For each of B images the levels (N,) and its own timesteps (B, K) in one rising order, (B, M), up to its last timestep, which fills
    up the rest."""
    every = torch.cat([levels.expand(len(timesteps), -1), timesteps], dim=1)
    return torch.minimum(every, timesteps.amax(dim=1, keepdim=True)).sort(dim=1).values


def invert(
    process: ForwardProcess, predict: Predict, clean: Tensor, knots: Tensor, *, tolerance: float = TOLERANCE, most: int = MOST
) -> tuple[Tensor, Tensor]:
    """x_t at every knot, such that DDIM from the last knot over all the others leads back to x_0.

    Args:
        process: the forward process.
        predict: the model that is inverted, without a graph.
        clean: x_0 (B, K, C, h, w).
        knots: (B, N) int64 timesteps that never fall; one that repeats the one before it has the same x_t.
        tolerance: iterations of a step end for an image once x_t changes by less, in root mean square.
        most: iterations of a step.

    Returns:
        x_t (B, N, K, C, h, w), and (B, K) the largest change in the last iteration of any step: below the tolerance where all was solved.
    """
    x, before = clean, torch.full_like(knots[:, 0], -1)
    found, left = [], torch.zeros(clean.shape[:2], device=clean.device)
    for t in knots.unbind(dim=1):
        if bool((t != before).any()):
            x, change = _solve(process, predict, x, before, t, tolerance, most)
            left = torch.maximum(left, change)
        found.append(x)
        before = t
    return torch.stack(found, dim=1), left


def _slope(process: ForwardProcess, earlier: Tensor, later: Tensor, like: Tensor) -> Tensor:
    """By what x_earlier moves with x_later, about: the middle of sigma_s / sigma_t and alpha_s / alpha_t.

    The first is right along directions that the model takes for noise, the second along those that it takes for image.
    """
    (a, s), (b, t) = _scales(process, earlier, like), _scales(process, later, like)
    by_noise, by_image = s / t, a / b
    return torch.where(s == 0, by_image, torch.where(b == 0, by_noise, (by_noise + by_image) / 2))


def _solve(
    process: ForwardProcess, predict: Predict, x: Tensor, before: Tensor, t: Tensor, tolerance: float, most: int
) -> tuple[Tensor, Tensor]:
    """x_t from which a step of DDIM leads to x, and how much each image changed last (B, K)."""
    moves = (before != t).view(-1, 1, 1, 1, 1)
    (a, s), (b, u) = _scales(process, before, x), _scales(process, t, x)
    noise = predicted_noise(process, predict(x, t), x, t)  # a first guess, as others leave it
    guess = torch.where(moves, (b / a) * (x - s * noise) + u * noise, x)
    slope = torch.where(moves, _slope(process, before, t, x), 1.0)
    moving = moves.expand(*x.shape[:2], 1, 1, 1)
    change = torch.zeros(x.shape[:2], device=x.device)
    guesses: list[Tensor] = []
    steps: list[Tensor] = []
    for _ in range(most):
        step = (x - ddim_step(process, predict, guess, t, before)) / slope
        guesses, steps = [*guesses, guess][-MEMORY:], [*steps, step][-MEMORY:]
        guess = torch.where(moving, guess + _accelerated(guesses, steps), guess)
        size = step.square().mean(dim=(-3, -2, -1)).sqrt()
        change = torch.where(moving[..., 0, 0, 0], size, change)
        moving = moving & (size > tolerance)[..., None, None, None]
        if not moving.any():
            break
    return guess, change


def _accelerated(guesses: list[Tensor], steps: list[Tensor]) -> Tensor:
    """The step to take for the newest guess: of the mixtures of the last iterations that with the least residual, for each image."""
    if len(steps) == 1:
        return steps[-1]
    flat = [value.flatten(2).double() for value in (*guesses, *steps)]
    given, taken = flat[: len(guesses)], flat[len(guesses) :]
    moved = torch.stack([later - earlier for earlier, later in pairwise(given)], dim=-1)  # (B, K, C h w, M - 1)
    changed = torch.stack([later - earlier for earlier, later in pairwise(taken)], dim=-1)
    squares = (changed.mT @ changed).cpu()  # a few numbers; once an image no longer changes they are 0
    share = torch.linalg.pinv(squares, hermitian=True, rtol=1e-10).to(changed.device) @ (changed.mT @ taken[-1][..., None])
    return steps[-1] - ((moved + changed) @ share)[..., 0].view_as(steps[-1]).to(steps[-1].dtype)
