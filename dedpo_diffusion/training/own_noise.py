"""data.noise=own and inverted: each image with the noise that it comes from, at the stored draws' own timesteps.

An image of `dedpo propose` says which seed it was sampled from; that noise is its own at every timestep (as in PNAPO). Any other is
inverted by DDIM with the reference, once, at exactly the timesteps of its draws (as in InPO and SmPO-Diffusion, see `dpo.inversion`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from dedpo_diffusion.core.console import Progress, UserError, say
from dedpo_diffusion.dpo.inversion import TOLERANCE, implied_noise, invert, knots_through, noise_levels
from dedpo_diffusion.sampling.png import told_facts
from dedpo_diffusion.sampling.sampler import initial_noise
from dedpo_diffusion.settings import TrainSettings
from dedpo_diffusion.training.cache import Rows, write_rows
from dedpo_diffusion.training.pair_sampler import alike

if TYPE_CHECKING:
    from dedpo_diffusion.models.backbone import Backbone
    from dedpo_diffusion.pairs.dataset import PairReader
    from dedpo_diffusion.training.sources import Source

SEEDS, LEFT = "seeds", "left"  # tensors of a file of noises: seeds of a shard's images, and what iterations left unsolved
FAR = 10.0  # tolerances beyond which an image is told to be poorly inverted


def check_noise(settings: TrainSettings) -> None:
    """Refuse settings that the noise does not go with.

    Raises:
        UserError: what stands against it, and what to do.
    """
    data, objective = settings.data, settings.objective
    if data.noise == "shared":
        return
    for name, asked, instead in (
        ("power", "measured", "fixed"),
        ("timestep_sampling", "measured", "uniform"),
        ("timestep_weighting", "equal_noise", "none"),
    ):
        if getattr(objective, name) == asked:
            raise UserError(
                f"objective.{name}={asked} measures gradients at noise that both images share, not at data.noise={data.noise}; set "
                f"objective.{name} to {instead}, or data.noise to shared"
            )
    if data.noise == "independent":
        return
    if data.reference_draws is None:
        raise UserError(f"data.noise={data.noise} needs data.reference_draws (as 8), for whose timesteps the noise of each image is kept")
    if data.flip or data.crop != "centre":
        raise UserError(f"data.noise={data.noise} is the noise of an image as it is; it does not go with data.flip or data.crop=random")
    if data.inversion_steps < 2:
        raise UserError(f"data.inversion_steps is {data.inversion_steps}; it must be at least 2")


def sampled_seed(image: bytes, model: str, height: int, width: int) -> int | None:
    """The seed of whose `initial_noise` this model made this image file, as it says itself; None where it says nothing of the kind.

    Images of a LoRA, of another size, or of a sampler that adds noise on its way have no such seed.
    """
    facts = told_facts(image)
    try:
        scheduler = facts["scheduler"]
        random = "Ancestral" in scheduler["class"] or str(scheduler["config"].get("algorithm_type")).startswith("sde")
        fits = facts["model"] == model and not facts["lora"] and (facts["height"], facts["width"]) == (height, width)
        return int(facts["seed"]) if fits and not random else None
    except (KeyError, TypeError, ValueError, AttributeError):  # another program's
        return None


@dataclass
class OwnNoise:
    """The noises of every image of a dataset at its K stored draws, in one file a shard of the grid that has them.

    Attributes:
        kind: "own" or "inverted".
        name: the model as it was given, which images know their sampler by.
        reader: the dataset.
        levels: how many steps the trajectories have, beside the draws' own timesteps.
    """

    kind: str
    name: str
    reader: PairReader
    levels: int

    @property
    def key(self) -> list[Any]:
        """What the noises depend on."""
        return [self.kind, self.levels] + ([self.name] if self.kind == "own" else [])

    def begin(self, folder: Path, shard: int) -> None:
        """Keep the files in a folder, of shards of so many pairs."""
        self.folder, self.shard = folder, shard
        self._open: dict[int, tuple[Rows, dict[int, tuple[str, int]], Tensor]] = {}

    @staticmethod
    def file(folder: Path, shard: int) -> Path:
        """Where a shard's noises are."""
        return folder / f"noise-{int(shard):05d}.safetensors"

    def fill(
        self, shard: int, rows: np.ndarray, model: Backbone, source: Source, *, images: Callable[[int], np.ndarray],
        timesteps: Callable[[int], Tensor], batch: int, progress: Progress,
    ) -> tuple[int, int, int]:  # fmt: skip
        """Find or invert the noises of a shard's rows, and write them.

        Args:
            shard: its number.
            rows: of the dataset, those that are visited.
            model, source: whose reference inverts, and where encoded pairs come from.
            images: of a visit of a row, (K, 2) rows and sides.
            timesteps: of a row's draws, (K,).
            batch: pairs inverted at once.
            progress: advanced by each pair.

        Returns:
            How many rows' noises were known by their seeds, inverted, and inverted poorly.
        """
        shapes = source.shapes(rows)
        seeds = torch.full((self.shard, max((len(images(int(row))) for row in rows), default=2)), -1)
        for row, (_, height, width) in zip(rows.tolist(), shapes.tolist(), strict=True):
            found = self._seeds(images(row), height * model.factor, width * model.factor)
            seeds[row % self.shard, : len(found)] = torch.tensor(found)
        foreign = (seeds[rows % self.shard] < 0).all(dim=1).numpy()
        progress.advance(int((~foreign).sum()))
        groups, extra, left = {}, {SEEDS: seeds}, []
        keys = np.column_stack([shapes, [len(images(int(row))) for row in rows]])[foreign]
        for (_, height, width, count), some in alike(keys) if foreign.any() else ():
            there, name = rows[foreign][some], f"{height}x{width}x{count}"
            noises = []
            for first in range(0, len(there), batch):
                part = there[first : first + batch].tolist()
                t = torch.stack([timesteps(row) for row in part])
                noise, change = self.inverted(part, np.stack([images(row) for row in part]), t, model, source)
                noises.append(noise.flatten(0, 1).cpu())
                left += change.amax(dim=1).tolist()
                progress.advance(len(part))
            groups[name], extra[f"rows of {name}"] = {"noise": torch.cat(noises)}, torch.from_numpy(there)
        write_rows(self.file(self.folder, shard), groups, extra | {LEFT: torch.tensor(left)})
        return int((~foreign).sum()), int(foreign.sum()), sum(change > FAR * self._tolerance(model) for change in left)

    def _seeds(self, images: np.ndarray, height: int, width: int) -> list[int]:
        """The seeds of a visit's images, or -1 for each unless all are known."""
        unknown = [-1] * len(images)
        if self.kind == "inverted":
            return unknown
        pairs = {row: self.reader.pair(int(row)) for row in dict.fromkeys(images[:, 0].tolist())}
        files = [(pairs[row].image_0, pairs[row].image_1)[side] for row, side in images.tolist()]
        found = [seed for file in files if (seed := sampled_seed(file, self.name, height, width)) is not None]
        return found if len(found) == len(files) else unknown

    @staticmethod
    def _tolerance(model: Backbone) -> float:
        return max(TOLERANCE, torch.finfo(model.dtype).eps)

    @torch.no_grad()
    def inverted(self, rows: list[int], images: np.ndarray, timesteps: Tensor, model: Backbone, source: Source) -> tuple[Tensor, Tensor]:
        """Noises (B, K, images, C, h, w) of B rows at timesteps (B, K), by their prompts, and what was left unsolved (B, images)."""
        encoded = source.fetch(rows, [0] * len(rows), torch.zeros(len(rows), dtype=torch.bool), images)
        given, timesteps = encoded.conditioning.to(model.device), timesteps.to(model.device)
        clean = encoded.mean.to(model.device) * model.scale
        knots = knots_through(noise_levels(model.process, self.levels).to(model.device), timesteps)
        noisy, left = invert(
            model.process, lambda x, t: model.predict(x, t, given, reference=True).float(), clean, knots, tolerance=self._tolerance(model)
        )
        at = torch.searchsorted(knots, timesteps)
        found = noisy[torch.arange(len(rows), device=at.device)[:, None], at]  # (B, K, images, C, h, w)
        noise = [implied_noise(model.process, clean, found[:, k], timesteps[:, k]) for k in range(timesteps.shape[1])]
        return torch.stack(noise, dim=1), left

    def at(self, row: int, number: int, images: int, draws: int, shape: tuple[int, int, int]) -> Tensor:
        """The noises (images, C, h, w) of a row's draw with this number of `draws`."""
        shard = row // self.shard
        if shard not in self._open:
            self._open[shard] = self._read(shard)
        held, places, seeds = self._open[shard]
        if row in places:
            group, place = places[row]
            return held.at(place * draws + number, group)["noise"]
        return initial_noise(seeds[row % self.shard, :images].tolist(), shape)[0]

    def _read(self, shard: int) -> tuple[Rows, dict[int, tuple[str, int]], Tensor]:
        held, places = Rows(self.file(self.folder, shard)), dict[int, tuple[str, int]]()
        for name in held.parts:
            if name.startswith("rows of "):
                group = name.removeprefix("rows of ")
                places |= {row: (group, place) for place, row in enumerate(held.parts[name][:].tolist())}
        return held, places, held.parts[SEEDS][:]


def say_noises(known: int, inverted: int, poorly: int) -> None:
    """Tell where the noises of a dataset's pairs came from."""
    say(f"own noise: {known} pairs by the seeds that their images tell, {inverted} inverted with the reference")
    if poorly:
        say(f"Warning: {poorly} of {inverted} pairs could not be inverted exactly; more data.inversion_steps may help")
