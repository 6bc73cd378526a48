"""One GPU in eight minutes: pairs a second, memory and share of the peak rate, by model, weights, checkpointing and compilation.

    python eval/benchmarks/gpu.py --out eval/results/gpu.json
    python eval/benchmarks/gpu.py --out smoke.json --smoke true

Every row is a `throughput.py` of its own, the published step beside this project's in the same run. Rows come in the order of what they
tell; none is begun after `minutes`. Each is written when it is done, and one that fails, say for want of memory, is written with its
reason, so that a run cut short keeps what it has. `smoke` takes the same way on a processor with a small model, two rounds a row: its
numbers say nothing of a GPU.
"""

from __future__ import annotations

import gc
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from dedpo_diffusion.core.console import UserError, say, stage
from dedpo_diffusion.core.files import write_json
from dedpo_diffusion.evaluation.benchmarks.throughput import measure
from dedpo_diffusion.evaluation.benchmarks.throughput_arms import ThroughputSettings


@dataclass(frozen=True)
class Row:
    """What is trained, and how."""

    model: Literal["sdxl", "sd15", "small_sdxl"]
    pairs: int
    weights: Literal["lora", "full"] = "lora"
    gradient_checkpointing: bool | Literal["selective"] = False
    compile: bool = False

    @property
    def name(self) -> str:
        """In a few words."""
        kept = {False: "no checkpointing", True: "full checkpointing", "selective": "selective checkpointing"}
        compiled = ", compiled" if self.compile else ""
        return f"{self.model} {self.weights}, {self.pairs} pairs, {kept[self.gradient_checkpointing]}{compiled}"


ROWS = (
    Row("sdxl", 4, gradient_checkpointing=True),
    Row("sd15", 8),
    Row("sdxl", 4),
    Row("sdxl", 4, gradient_checkpointing="selective"),
    Row("sd15", 8, "full", gradient_checkpointing=True),
    Row("sdxl", 2, "full", gradient_checkpointing=True),
    Row("sdxl", 4, gradient_checkpointing=True, compile=True),
    Row("sd15", 8, compile=True),
)


@dataclass(frozen=True)
class GpuSettings:
    """Settings of the table.

    Args:
        out: file for the result (JSON).
        minutes: no row is begun after so many.
        rounds: of each row that are timed.
        smoke: on a processor, with a small model, to try the script.
        folder: where datasets and caches are made; None takes the system's temporary folder.
    """

    out: Path
    minutes: float = 8.0
    rounds: int = 6
    smoke: bool = False
    folder: Path | None = None


def rows(settings: GpuSettings) -> list[Row]:
    """Every row; on a processor small, and none compiled, which takes minutes there."""
    if not settings.smoke:
        return list(ROWS)
    small = [replace(row, model="small_sdxl", pairs=1, compile=False) for row in ROWS]
    return list(dict.fromkeys(small))


def measured(row: Row, settings: GpuSettings) -> dict[str, Any]:
    """One row: the arms' numbers, or why there are none."""
    import torch

    one = ThroughputSettings(
        out=settings.out, device="cpu" if settings.smoke else "cuda", dtype="float32" if settings.smoke else "bf16",
        rounds=2 if settings.smoke else settings.rounds, warmup=0 if settings.smoke else 2, steps=1 if settings.smoke else 2,
        dataset=row.pairs * 2, folder=settings.folder, **asdict(row),
    )  # fmt: skip
    try:
        found = measure(one)
    except (torch.OutOfMemoryError, RuntimeError) as error:
        return {"failed": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"}
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    keep = {"hardware", "matrix_peak_tflops", "arms"}
    return {key: value for key, value in found.items() if key in keep}


def line(row: Row, found: dict[str, Any]) -> str:
    """A row in words."""
    if "failed" in found:
        return f"{row.name}: {found['failed']}"
    arms = []
    for name, arm in found["arms"].items():
        share = arm["share_of_data_sheet"] or arm["share_of_matrix_peak"]
        arms.append(f"{name} {arm['pairs_a_second']:.2f} pairs/s, {arm['peak_bytes'] / 2**30:.1f} GiB, {share:.0%} of peak")
    return f"{row.name}: " + "; ".join(arms)


def run(settings: GpuSettings) -> None:
    """Measure row after row, and write each."""
    import torch

    if not settings.smoke and not torch.cuda.is_available():
        raise UserError("there is no CUDA device here; try the script with --smoke true")
    began, kept = time.monotonic(), {}
    for row in rows(settings):
        if time.monotonic() - began > 60 * settings.minutes:
            kept[row.name] = {"failed": f"not begun: {settings.minutes:g} minutes were over"}
        else:
            kept[row.name] = measured(row, settings)
        say(line(row, kept[row.name]))
        found = asdict(settings) | {"out": settings.out.name, "folder": None}
        write_json(settings.out, {"settings": found, "seconds": time.monotonic() - began, "rows": kept})
    if all("failed" in entry for entry in kept.values()):
        raise UserError(f"no row was measured; {settings.out} says why")


def main(argv: list[str] | None = None) -> int:
    """Entry point."""
    return stage(GpuSettings, run, argv, prog="gpu")


if __name__ == "__main__":
    sys.exit(main())
