"""Balanced-DPO for diffusion: equal gradient pull on both images of a pair, at the pair's own timestep.

DPO pushes the rejected answer down harder than it pulls the chosen one up (Balanced-DPO, arXiv 2502.20847). The
coefficients below are this project's derivation for diffusion: at a timestep t, the gradients of the two errors with
respect to the model's output have norms in the ratio sqrt(e_0) : sqrt(e_1), so the image with the larger error pulls
harder; a_0 : a_1 = sqrt(e_1) : sqrt(e_0) makes the norms equal. No label is needed, so soft targets and targets outside
[0, 1] keep their meaning.
"""

from __future__ import annotations

import torch
from torch import Tensor


def balance_coefficients(
    policy_errors: Tensor,
    reference_errors: Tensor | None = None,
    *,
    mode: str = "output",
    clip: float = 10.0,
    scale: Tensor | None = None,
) -> Tensor:
    """Gradient factors (a_0, a_1) of the two errors of each pair: 2 sigmoid(+-u), which sum to 2.

    Args:
        policy_errors: e (B, 2).
        reference_errors: r (B, 2); needed by "relative" alone.
        mode: "none": a = 1. "output": u = (ln e_1 - ln e_0) / 2, equal output-space gradient norms.
            "relative": u = [ln(e_1 / r_1) - ln(e_0 / r_0)] / 2, which equals "none" while policy = reference.
            "probability": u = scale (e_1 - e_0) / 2, the difference of the two reverse steps' log-probabilities, tempered.
            Errors of 0 count as the least float32 in the logarithms, so that two of them balance, and one alone gives the clip.
        clip: bound of |u|.
        scale: (B,), of `probability_scale`; needed by "probability" alone.

    Returns:
        (B, 2), detached.

    Raises:
        ValueError: an unknown mode, "relative" without reference errors, or "probability" without a scale.
    """
    errors = policy_errors.detach()
    if mode == "none":
        return torch.ones_like(errors)
    u = _log_ratio(errors, reference_errors, mode, scale).clamp(-clip, clip)
    return 2 * torch.sigmoid(torch.stack([u, -u], dim=1))


def _log_ratio(errors: Tensor, reference_errors: Tensor | None, mode: str, scale: Tensor | None) -> Tensor:
    """u (B,) of each mode but "none"."""
    if mode == "probability":
        if scale is None:
            raise ValueError('mode "probability" needs a scale, see probability_scale')
        return 0.5 * scale * (errors[:, 1] - errors[:, 0])
    if mode == "relative":
        if reference_errors is None:
            raise ValueError('mode "relative" needs the reference errors')
        logs = _logs(errors) - _logs(reference_errors.detach())
    elif mode == "output":
        logs = _logs(errors)
    else:
        label = "; adadpo looks at the label, see adadpo.adadpo_loss" if mode == "adadpo" else ""
        raise ValueError(f"unknown balance mode {mode!r}; known: none, output, relative, probability{label}")
    return 0.5 * (logs[:, 1] - logs[:, 0])


def _logs(errors: Tensor) -> Tensor:
    """ln e, finite at 0: at zero SNR a model that gives back x_t predicts the noise without error."""
    return errors.clamp(min=torch.finfo(torch.float32).tiny).log()


def probability_scale(alphas_cumprod: Tensor, timesteps: Tensor, elements: int, *, tempering: float, prediction: str = "epsilon") -> Tensor:
    """The scale with which -scale e / 2 is the log-probability of the reverse step, up to a constant, times `tempering`.

    The reverse step at t is a Gaussian of variance s_t^2 whose mean is off by beta_t / sqrt(alpha_t (1 - abar_t)) times the
    error of eps. Its log-probability is therefore -kappa_t D e / 2 up to a constant, kappa_t = beta_t^2 / (s_t^2 alpha_t
    (1 - abar_t)), D the number of elements and e the mean squared error. s_t^2 is the posterior variance
    beta_t (1 - abar_{t-1}) / (1 - abar_t), so that kappa_t = beta_t / (alpha_t (1 - abar_{t-1})). At t = 0 the variance is 0 and kappa
    infinite; there the variance of t = 1 is used, as DDPM samplers do.

    At zero terminal SNR, abar_t = alpha_t = 0: an error of v has the finite kappa_t abar_t = beta_t abar_{t-1} / (1 - abar_{t-1}). For
    one of eps kappa is infinite, as x_0 = (x_t - sigma_t eps) / alpha_t is; the largest float32 stands for it, with which a clipped u has
    its limit: the clip with the sign of the gap, and 0 where there is none.

    Args:
        alphas_cumprod: abar (T,), T >= 2.
        timesteps: (B,) int64.
        elements: D, the elements of one latent.
        tempering: positive factor; 1 is the probability itself, with which u is huge at small t: for an SD1.5 latent and an
            error gap of 0.01, 17 at t = 5 and 1.1 at t = 100.
        prediction: what the errors are of; an error of "v_prediction" is that of eps divided by abar_t.

    Returns:
        (B,) float32, on the device of `timesteps`.

    Raises:
        ValueError: tempering is not positive, or another prediction.
    """
    if not tempering > 0:
        raise ValueError(f"tempering must be positive; got {tempering}")
    if prediction not in ("epsilon", "v_prediction"):
        raise ValueError(f"prediction type {prediction!r} is not supported; supported: epsilon, v_prediction")
    now = alphas_cumprod.double()
    before = torch.cat([torch.ones_like(now[:1]), now[:-1]])
    beta = (before - now) / before
    kappa = beta / (1 - before)  # of eps, times alpha_t
    kappa[0] = beta[0] * (1 - now[1]) / (beta[1] * (1 - now[0]))
    kappa = kappa * before if prediction == "v_prediction" else kappa * before / now
    return (tempering * elements * kappa).clamp(max=torch.finfo(torch.float32).max).float().to(timesteps.device)[timesteps]


def scale_gradients(errors: Tensor, factors: Tensor) -> Tensor:
    """sg(e) + a (e - sg(e)): the values of `errors` bit for bit, their gradients multiplied by `factors` of that shape."""
    frozen = errors.detach()
    return frozen + factors * (errors - frozen)


def balance_errors(
    policy_errors: Tensor,
    reference_errors: Tensor | None = None,
    *,
    mode: str = "output",
    clip: float = 10.0,
    scale: Tensor | None = None,
) -> Tensor:
    """The same errors, bit for bit, with gradients multiplied by `balance_coefficients`.

    Args, Raises: as `balance_coefficients`.

    Returns:
        (B, 2): sg(e) + a (e - sg(e)), sg being stop-gradient.
    """
    return scale_gradients(policy_errors, balance_coefficients(policy_errors, reference_errors, mode=mode, clip=clip, scale=scale))
