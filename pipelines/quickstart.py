"""The whole journey on the embedded world: scarce labels, three ways to merge them, three LoRAs, each at its best strength.

    dedpo quickstart --out quickstart

`dedpo align` on Shapes, with settings that fit minutes on a CPU; configs/align_shapes.yaml are the same in a file.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from typing import Any

from dedpo_diffusion.core.console import stage
from dedpo_diffusion.core.defaults import DEFAULT_METHOD
from dedpo_diffusion.pipelines import align
from dedpo_diffusion.settings import AlignSettings, QuickstartSettings

PLAIN = ("human_only", "naive")  # what the default is compared with


def arms(default: str) -> list[str]:
    """The ways to merge, the default first, always three: where it is a plain one, the taught judge is the third."""
    others = [name for name in PLAIN if name != default]
    return [default, *others] if default not in PLAIN else [default, *others, "adapted"]


def as_align(settings: QuickstartSettings) -> AlignSettings:
    """The settings of `dedpo align`."""
    judge = f"pickscore={files('dedpo_diffusion.shapes') / 'model' / 'judge'}"
    return AlignSettings(
        model="shapes", out=settings.out, prompts="shapes", limit=settings.pairs, judges=[judge], people="simulated",
        human_share=settings.human_share, methods=arms(DEFAULT_METHOD), recipe="shapes_lora.yaml", steps=settings.steps,
        strengths=settings.strengths, eval_prompts="shapes", eval_limit=settings.eval_prompts, eval_seeds=settings.eval_seeds,
        scorers=["oracle_reward", judge], held_out=["oracle_reward"], sampler_steps=12, guidance=1.5, batch=48, device="cpu",
        seed=settings.seed, dry_run=settings.dry_run,
    )  # fmt: skip


def run(settings: QuickstartSettings) -> dict[str, Any] | None:
    """The whole journey on the embedded world, on a CPU, in minutes."""
    return align.run(as_align(settings))


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    return stage(QuickstartSettings, run, argv, prog="dedpo quickstart", flags={"strengths": "strengths"})


if __name__ == "__main__":
    raise SystemExit(main())
