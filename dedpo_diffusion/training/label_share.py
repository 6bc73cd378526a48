"""data.label_share: what part of a run's visits goes to the pairs that people labelled, with targets of method adapted.

`debias.label_share` has the argument. Targets of other methods stay as they were merged: their weights make them unbiased.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from dedpo_diffusion.core.console import UserError, say
from dedpo_diffusion.core.records import Targets
from dedpo_diffusion.debias import Shares, share_labels
from dedpo_diffusion.labels.files import read_report, targets_path
from dedpo_diffusion.settings import TrainSettings
from dedpo_diffusion.weights.run_folder import read_identity

if TYPE_CHECKING:
    from accelerate import Accelerator

IDENTITY = "label_share"  # in a run's identity


def check_label_share(settings: TrainSettings) -> None:
    """Refuse a share that is none.

    Raises:
        UserError: a number outside [0, 1].
    """
    share = settings.data.label_share
    if not isinstance(share, str) and not 0 <= share <= 1:
        raise UserError(f"data.label_share is {share}: give a number from 0 to 1, auto, or merged")


def begun_share(out: Path) -> float | Literal["merged"] | None:
    """The share that a run began with, which a longer one keeps; None for one that has not begun."""
    identity = read_identity(out)
    return float(identity[IDENTITY]) if IDENTITY in identity else "merged" if identity else None


def shared_targets(settings: TrainSettings, merged: Targets, together: int, accelerator: Accelerator) -> tuple[Targets, dict[str, str]]:
    """The run's targets with its share of labelled pairs, as they are where they are to stay as they were merged; and its identity's part.

    Args:
        settings: of the run.
        merged: its targets.
        together: pairs of a step.
        accelerator: of the run, whose main process reads what it began with, and says what it takes.

    Raises:
        UserError: a share was given, and the targets are of another method, or do not say which pairs people labelled; or what the run
            began with, or the report of the merge, is damaged.
    """
    from accelerate.utils import broadcast_object_list

    data, path = settings.data, targets_path(settings.data.pairs, settings.data.targets)
    wanted: float | str = data.label_share
    if wanted == "auto":  # the main process reads, for the others may not see the folder
        [begun] = broadcast_object_list([begun_share(settings.out) if accelerator.is_main_process else None])
        wanted = "auto" if begun is None else begun
    if wanted == "merged":
        return merged, {}
    given = None if isinstance(wanted, str) else float(wanted)
    method = (read_report(data.pairs, data.targets) or {}).get("method")
    if method != "adapted":
        if data.label_share != "auto":
            raise UserError(
                f"data.label_share={data.label_share} is for targets of method adapted, and {path} is "
                f"{'of an unknown method' if method is None else f'of method {method}'}; leave it at auto"
            )
        return merged, {}
    visits = settings.optim.steps * together
    found = None
    if merged.human is not None and merged.judge is not None:
        found = share_labels(merged.weight, merged.human, np.asarray(merged.judge), visits=visits, share=given)
    if found is None:
        if data.label_share != "auto":
            raise UserError(
                f"data.label_share={data.label_share}: in {path} all of the pairs have a human label, or none; leave it at auto"
            )
        return merged, {}
    weight, shares = found
    if accelerator.is_main_process:
        say(share_words(shares, visits, chosen=data.label_share == "auto"))
    return dataclasses.replace(merged, weight=weight), {IDENTITY: repr(shares.share)}  # which a longer run keeps


def share_words(shares: Shares, visits: int, *, chosen: bool) -> str:
    """What a run says of it at its start; `chosen`: nobody gave the share."""
    told = (
        f"{shares.labelled} pairs that people labelled get {shares.share:.0%} of {visits:,} visits (merged with {shares.merged:.0%}), "
        f"{shares.judged} others the rest"
    )
    if chosen and shares.share == 1:
        told += ": in so short a run the judge's labels are worth less than people's again"
    return f"{told} (data.label_share)"
