"""What a single file says of itself beside its weights: what the UNet predicts, and the noise schedule it was trained with.

A checkpoint of SDXL that predicts v has the same names and shapes as one that predicts noise. Files of the NoobAI family carry the empty
tensors `v_pred` and `ztsnr` (zero terminal SNR), which ComfyUI and Forge look for; sd-scripts and `dedpo export` also write
`modelspec.prediction_type`; files of the original training code keep their `alphas_cumprod`. A mark wins over the configuration that a
file is loaded with. Two marks that contradict each other are refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dedpo_diffusion.core.console import UserError, say
from dedpo_diffusion.models.single_file import opened

PREDICTIONS: dict[str, tuple[str, bool | None]] = {  # of the option model_prediction: what is predicted, and whether the last SNR is 0
    "epsilon": ("epsilon", False),
    "v": ("v_prediction", False),
    "v_zero_snr": ("v_prediction", True),
}
TOLD = {"epsilon": "epsilon", "eps": "epsilon", "v": "v_prediction", "v_prediction": "v_prediction", "v-prediction": "v_prediction"}
WORDS = {"epsilon": "noise (epsilon)", "v_prediction": "v"}
OPTION = "--model_prediction epsilon, v or v_zero_snr"
SAME = 3e-3  # of alphas_cumprod in half precision; the schedules with and without zero SNR differ by 0.04


@dataclass(frozen=True)
class Marks:
    """What is said of a model.

    Attributes:
        prediction: "epsilon" or "v_prediction", None where nothing says it.
        zero_snr: whether the schedule ends at SNR 0, None where nothing says it.
        alphas: the schedule's cumulated alphas (T,), where they are stored.
        by: what says it, in words.
    """

    prediction: str | None = None
    zero_snr: bool | None = None
    alphas: Tensor | None = None
    by: str = ""


def chosen(option: str | None) -> Marks | None:
    """The option `model_prediction` in the form of marks, which it stands in for; None where it was not given.

    Raises:
        UserError: another word.
    """
    if option is None:
        return None
    if option not in PREDICTIONS:
        raise UserError(f"model_prediction is {option!r}; give {OPTION}")
    prediction, zero = PREDICTIONS[option]
    return Marks(prediction, zero, by=f"--model_prediction {option}")


def read_marks(path: Path) -> Marks:
    """The marks of a single file.

    Raises:
        UserError: it cannot be read, its marks contradict each other, or a mark means what is not known here.
    """
    with opened(path) as file:
        names, metadata = set(file.keys()), file.metadata() or {}
        alphas = file.get_tensor("alphas_cumprod").float() if "alphas_cumprod" in names else None
    by_name = Marks("v_prediction" if "v_pred" in names else None, True if "ztsnr" in names else None)
    by_name = replace(by_name, by=" and ".join(f"the tensor {name}" for name in ("v_pred", "ztsnr") if name in names))
    told = _told(path, metadata)
    if by_name.prediction and told.prediction and by_name.prediction != told.prediction:
        raise UserError(
            f"{path}: {by_name.by} marks a model that predicts v, and {told.by} one that predicts noise; say which it is with {OPTION}"
        )
    zero = True if True in (by_name.zero_snr, told.zero_snr) else None
    by = " and ".join(filter(None, (by_name.by, told.by)))
    return Marks(by_name.prediction or told.prediction, zero, alphas, by)


def _told(path: Path, metadata: Mapping[str, str]) -> Marks:
    """What the metadata say."""
    said = [(key, metadata[key]) for key in ("modelspec.prediction_type", "prediction_type") if metadata.get(key)]
    if metadata.get("ss_v_parameterization") == "True":
        said.append(("ss_v_parameterization", "v"))
    found: dict[str, str] = {}
    for key, value in said:
        if value.lower() not in TOLD:
            raise UserError(
                f"{path}: its metadata say that it predicts {value!r} ({key}), and only noise and v are known here; "
                f"give another model, or say what it predicts with {OPTION}"
            )
        found[key] = TOLD[value.lower()]
    if len(set(found.values())) > 1:
        raise UserError(f"{path}: its metadata contradict each other ({', '.join(f'{k} is {v}' for k, v in said)}); give {OPTION}")
    zero = True if metadata.get("ss_zero_terminal_snr") == "True" else None
    by = " and ".join([*found, *(["ss_zero_terminal_snr"] if zero else [])])
    return Marks(next(iter(found.values()), None), zero, by=f"its {by}" if by else "")


def configure(pipe: Any, marks: Marks, name: str, config: str = "its configuration") -> None:
    """Set a pipeline's scheduler as the marks say, and say what that changed.

    Args:
        pipe: of the model.
        marks: of its file, or of the option in their place.
        name: of the model, for messages.
        config: what the scheduler comes from, for messages.

    Raises:
        UserError: the marks are of no model that can be trained and sampled.
    """
    have = pipe.scheduler.config
    prediction = marks.prediction or have.get("prediction_type", "epsilon")
    zero = marks.zero_snr if marks.zero_snr is not None else _stored_zero(marks, have, name, config)
    held = bool(have.get("rescale_betas_zero_snr"))
    zero = held if zero is None else zero
    if zero and prediction == "epsilon" and (marks.zero_snr or not held):
        what = marks.by or "its tensor alphas_cumprod"
        raise UserError(
            f"{name}: {what} marks zero terminal SNR, but nothing says that it predicts v, and a model of noise starts from nothing there; "
            "if it predicts v, give --model_prediction v_zero_snr, else --model_prediction epsilon"
        )
    changed = []
    if prediction != have.get("prediction_type", "epsilon"):
        changed.append(f"it predicts {WORDS[prediction]}")
    if zero != held:
        changed.append("its noise schedule ends at zero SNR" if zero else "its noise schedule does not end at zero SNR")
    if changed:
        _reset(pipe, prediction, zero)
        what = marks.by or "its tensor alphas_cumprod"
        say(f"{name}: {' and '.join(changed)}, by {what}; {config} says otherwise and is overruled")


def _reset(pipe: Any, prediction: str, zero: bool) -> None:
    """Give the scheduler another prediction and schedule; from zero SNR sampling must start at the last step (Lin et al., section 3.3)."""
    changes: dict[str, Any] = {"prediction_type": prediction, "rescale_betas_zero_snr": zero}
    if zero:
        changes["timestep_spacing"] = "trailing"
    pipe.scheduler = type(pipe.scheduler).from_config({**pipe.scheduler.config, **changes})


def _stored_zero(marks: Marks, have: Mapping[str, Any], name: str, config: str) -> bool | None:
    """Whether the schedule that the file holds ends at zero SNR; None where it holds none."""
    if marks.alphas is None:
        return None
    kinds = (False, True) if not have.get("rescale_betas_zero_snr") else (True, False)
    for zero in kinds:
        known = schedule({**have, "rescale_betas_zero_snr": zero})
        if known is None:
            return None
        if known.shape == marks.alphas.shape and bool(((known - marks.alphas).abs() <= SAME).all()):
            return zero
    raise UserError(
        f"{name}: its tensor alphas_cumprod is another noise schedule than {config} says; give --model_config, "
        "a diffusers folder whose scheduler has its betas"
    )


def schedule(config: Mapping[str, Any]) -> Tensor | None:
    """The cumulated alphas (T,) of a scheduler's configuration; None where it has no betas, as those of flow models."""
    from diffusers import DDPMScheduler

    if not (config.get("beta_schedule") or config.get("trained_betas")):
        return None
    return DDPMScheduler.from_config(dict(config)).alphas_cumprod


def settle(pipe: Any, name: str) -> None:
    """See to it that the scheduler samples the schedule that its configuration names, from its last step on.

    Some of diffusers' schedulers pass over `rescale_betas_zero_snr`. DDIM divides by alpha_T where the model predicts noise; the others
    put 2^-24 for an alpha_bar of 0, and so does this.
    """
    from diffusers import DDIMScheduler

    config = pipe.scheduler.config
    if not config.get("rescale_betas_zero_snr"):
        return
    if "rescale_betas_zero_snr" not in _takes(pipe.scheduler):
        say(f"{name}: its {type(pipe.scheduler).__name__} cannot start from zero SNR, as its configuration asks; DDIM takes its place")
        pipe.scheduler = DDIMScheduler.from_config({**config, "timestep_spacing": "trailing", "clip_sample": False})
    if config.get("prediction_type") == "epsilon" and pipe.scheduler.alphas_cumprod[-1] == 0:
        pipe.scheduler.alphas_cumprod = torch.cat([pipe.scheduler.alphas_cumprod[:-1], torch.tensor([2.0**-24])])


def _takes(scheduler: Any) -> set[str]:
    import inspect

    return set(inspect.signature(type(scheduler)).parameters)
