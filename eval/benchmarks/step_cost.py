"""What a training step on Shapes costs, by the number of its pairs: do several seeds in one batch pay, and stored reference errors?

    python eval/benchmarks/step_cost.py --out step_cost.json

Several seeds share the base model, so their pairs could go through it in one batch. That pays if a batch of twice the pairs takes much
less than twice the time. The parts are timed in turn, round after round, so that other load falls on all alike; medians are reported.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dedpo_diffusion.core.console import say, stage, track


@dataclass(frozen=True)
class CostSettings:
    """Settings of the benchmark.

    Args:
        out: file for the result (JSON).
        pairs: batch sizes.
        rounds: how often each part is timed.
        threads: of torch.
    """

    out: Path
    pairs: list[int] = field(default_factory=lambda: [8, 16, 32, 64])
    rounds: int = 9
    threads: int = 1


def parts(pairs: int) -> dict[str, Callable[[], Any]]:
    """The reference's forward pass, and the policy's forward and backward pass with the optimizer's step, on random latents."""
    import torch

    from dedpo_diffusion.models.backbone import Backbone

    model = Backbone("shapes", device=torch.device("cpu"))
    model.add_lora(rank=8, alpha=8)
    latents = torch.randn(pairs, 2, *model.latent_shape(64))
    text = model.encode_prompts(["a large red circle on a white background"] * pairs)
    timesteps = torch.randint(0, 1000, (pairs,))
    optimizer = torch.optim.AdamW(model.trainable().values())

    def policy() -> None:
        model.predict(latents, timesteps, text).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return {"reference": lambda: model.predict(latents, timesteps, text, reference=True), "policy": policy}


def run(settings: CostSettings) -> None:
    """Time both parts of a step at every batch size."""
    import torch

    from dedpo_diffusion.core.files import write_json

    torch.set_num_threads(settings.threads)
    work = {(pairs, name): part for pairs in settings.pairs for name, part in parts(pairs).items()}
    seconds: dict[tuple[int, str], list[float]] = {key: [] for key in work}
    for turn in track(range(settings.rounds + 1), "timing", settings.rounds + 1):
        for key, part in work.items():
            began = time.perf_counter()
            part()
            if turn:  # the first warms up
                seconds[key].append(time.perf_counter() - began)
    median = {key: statistics.median(values) for key, values in seconds.items()}
    rows = [{"pairs": pairs} | {name: median[pairs, name] for name in ("reference", "policy")} for pairs in settings.pairs]
    for row, double in itertools.pairwise(rows):
        if double["pairs"] == 2 * row["pairs"]:
            row["two_seeds_together_over_apart"] = double["policy"] / (2 * row["policy"])
    for row in rows:
        row["with_stored_reference_over_without"] = row["policy"] / (row["policy"] + row["reference"])
        say(", ".join(f"{name} {value:.3f}" if isinstance(value, float) else f"{name} {value}" for name, value in row.items()))
    write_json(settings.out, {"threads": settings.threads, "rounds": settings.rounds, "median_seconds": rows})


if __name__ == "__main__":
    raise SystemExit(stage(CostSettings, run, None, prog="step_cost"))
