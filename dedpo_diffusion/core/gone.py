"""Options, and values of options, that earlier versions had, and what to give in their place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dedpo_diffusion.core.errors import UserError
from dedpo_diffusion.core.recipes import find_config

_ROUNDS = "is gone; train, export the adapter, and train another run with it as lora.start"
_OBJECTIVES = "is gone; objective.kind takes sigmoid, linear, ipo, cdpo, dr_dpo, kto, mapo or sft"
GONE = {  # "option" or "option=value" -> the rest of the sentence
    "objective.power=follow": "is now objective.power=adaptive",
    "channels_last": "is gone; leave it out: it won nothing where it was measured",
    "objective.guard": "is gone; objective.balance=output does what it was for, without a look at the labels",
    "optim.optimizer=adafactor": "is gone; optim.optimizer takes adamw, or adamw_8bit, whose moments take a quarter of the memory",
    "method=isotonic": "is gone; --method takes temperature, stack or adapt",
    "data.sampling=stratified": "is gone; data.sampling=importance, the default, visits stretched targets more often too",
    "strata": "is gone; leave it out, or merge with --propensities estimate where people were asked about some kinds of pairs more often",
    "optim.rounds": _ROUNDS,
    "optim.extrapolation": _ROUNDS,
    **{
        f"objective.kind={kind}": _OBJECTIVES
        for kind in (
            "hinge", "robust", "alpha_dpo", "bounded", "uncertainty", "rpo", "h_dpo", "dmpo", "poly", "self_npo",
        )
    },
}  # fmt: skip


def first_gone(arguments: Sequence[str]) -> str | None:
    """In a sentence, the first option or value that is gone: of a command line, or of a YAML file that it names; None for none."""
    return next((f"{name} {GONE[name]}" for name in _given(arguments) if name in GONE), None)


def _given(arguments: Sequence[str]) -> Iterator[str]:
    """Every option as "optim.steps", and with its value as "optim.steps=100"."""
    for word, following in zip(arguments, [*arguments[1:], ""], strict=False):
        if not word.startswith("--"):
            continue
        name, equals, inline = word.removeprefix("--").partition("=")
        value = inline if equals else following
        if name == "config":
            yield from _flat("", _held(value))
        else:
            yield from _flat(name, _held(value) if value.startswith("{") else value)


def _flat(name: str, value: Any) -> Iterator[str]:
    yield from (name, f"{name}={value}")
    for key, part in value.items() if isinstance(value, Mapping) else ():
        yield from _flat(f"{name}.{key}".lstrip("."), part)


def _held(source: str) -> Any:
    """What a YAML file or text holds; nothing where it is none, which the parser of the settings says."""
    import yaml

    try:
        text = find_config(source).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError, UserError):
        text = source
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return None
