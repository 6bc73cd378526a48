"""README's picture: gain against drift of a quickstart's LoRAs, beside a few of their images.

    python eval/benchmarks/readme_picture.py --quickstart quickstart --out eval/results/quickstart/picture.png

The prompts are picked by place in the list, never by their images.
"""

from __future__ import annotations

import json
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dedpo_diffusion.core.console import stage
from dedpo_diffusion.core.files import atomic_file
from dedpo_diffusion.evaluation.comparison.arms import load_arms
from dedpo_diffusion.evaluation.comparison.at_best import shown_arms
from dedpo_diffusion.evaluation.comparison.samples import load_images
from dedpo_diffusion.evaluation.report.frontier import fill_frontier
from dedpo_diffusion.evaluation.report.gallery import evenly_spaced

if TYPE_CHECKING:
    from dedpo_diffusion.evaluation.comparison.arms import Arm

INCHES, DOTS = (13.0, 5.6), 130
ROWS = 4


@dataclass(frozen=True)
class ReadmePicture:
    """Settings of the picture.

    Args:
        quickstart: a finished quickstart's folder.
        out: the picture.
        rows: prompts shown.
    """

    quickstart: Path
    out: Path
    rows: int = ROWS


def run(settings: ReadmePicture) -> None:
    """Draw and write the picture."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    results = json.loads((settings.quickstart / "results.json").read_text())
    arms = shown_arms(load(settings.quickstart, results), results)
    figure = Figure(figsize=INCHES, dpi=DOTS, facecolor="white", layout="constrained")
    canvas = FigureCanvasAgg(figure)
    left, right = figure.subfigures(1, 2, width_ratios=(1.15, 1.0))
    fill_frontier(left.add_subplot(), results)
    images(right, arms, results["primary"], settings.rows)
    with atomic_file(settings.out) as temporary:
        canvas.print_png(str(temporary))
    print(f"wrote {settings.out}")


def load(quickstart: Path, results: dict[str, Any]) -> list[Arm]:
    """The base and every strength of every LoRA."""
    samples = quickstart / "samples"
    return load_arms([samples / results["base"], *(samples / lora for lora in results["loras"])])[0]


def images(figure: Any, arms: list[Arm], scorer: str, rows: int) -> None:
    """A grid: a prompt a row, an arm a column; below each image its score."""
    picked = evenly_spaced(arms[0], rows)
    grid = figure.subplots(len(picked), len(arms), squeeze=False)
    for column, arm in enumerate(arms):
        for axes, row, image in zip(grid[:, column], picked, load_images(arm.folder, [arm.rows[row] for row in picked]), strict=True):
            axes.imshow(image)
            axes.set_xticks([], [])
            axes.set_yticks([], [])
            axes.spines[:].set_visible(False)
            axes.set_xlabel(f"{arm.scores[scorer][row]:.2f}", fontsize=10, labelpad=3)
        grid[0, column].set_title(arm.name.replace(" at ", "\nat "), fontsize=10.5)
    for axes, row in zip(grid[:, 0], picked, strict=True):
        axes.set_ylabel(textwrap.fill(arms[0].rows[row]["prompt"], 18), fontsize=10, rotation=0, ha="right", va="center", labelpad=8)


def main(argv: list[str] | None = None) -> int:
    """Entry point."""
    return stage(ReadmePicture, run, argv, prog="readme_picture")


if __name__ == "__main__":
    raise SystemExit(main())
