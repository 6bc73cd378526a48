"""Which command comes next for a pair dataset, by what lies in it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dedpo_diffusion.labels.files import CALIBRATED, label_names, label_origin


def next_stage(pairs: Path, *, human: str = "human", judges: Sequence[str] = ()) -> list[str]:
    """The words of the next command: people's labels first, then a judge's, then the merge of both.

    Args:
        pairs: the pair dataset.
        human: name of the human label file.
        judges: label files to merge; empty takes all but the human one, and those that are made of others.
    """
    held = label_names(pairs)
    if human not in held:
        return ["vote", str(pairs), *([] if human == "human" else ["--name", human])]
    chosen = list(judges) or [name for name in held if name != human and label_origin(pairs, name) != CALIBRATED]
    if not chosen:
        return ["label", str(pairs), "--with", "pickscore"]
    named = ["--judge", *chosen] if len(chosen) == 1 else ["--judges", *chosen]
    return ["merge", str(pairs), *([] if human == "human" else ["--human", human]), *named]


def train_words(pairs: Path, targets: str) -> list[str]:
    """The words of a training run on merged targets, with the usual recipe."""
    return ["train", "--config", "sdxl_lora.yaml", "--data.pairs", str(pairs), "--data.targets", targets, "--out", f"runs/{targets}"]
