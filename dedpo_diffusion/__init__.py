"""Align diffusion models with few human and many machine preference labels.

The public names below are imported when first used, so `import dedpo_diffusion` is instant.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dedpo_diffusion.debias import Merged as Merged
    from dedpo_diffusion.debias import merge_labels as merge_labels
    from dedpo_diffusion.dpo.balance import balance_errors as balance_errors
    from dedpo_diffusion.dpo.losses import implicit_rewards as implicit_rewards
    from dedpo_diffusion.dpo.losses import margin as margin
    from dedpo_diffusion.dpo.losses import preference_loss as preference_loss
    from dedpo_diffusion.dpo.step import preference_step as preference_step

_HOME = {
    "Merged": "debias",
    "balance_errors": "dpo.balance",
    "implicit_rewards": "dpo.losses",
    "margin": "dpo.losses",
    "merge_labels": "debias",
    "preference_loss": "dpo.losses",
    "preference_step": "dpo.step",
}

__all__ = [
    "Merged",
    "balance_errors",
    "implicit_rewards",
    "margin",
    "merge_labels",
    "preference_loss",
    "preference_step",
]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)
