"""Draws that are fixed beforehand for every pair, and the reference's errors at them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dedpo_diffusion.core.console import Progress, UserError, say
from dedpo_diffusion.core.files import atomic_file, remove_leftovers
from dedpo_diffusion.core.texts import size_words
from dedpo_diffusion.dpo.noising import Draws, TimestepDraw, draw, image_noise, step_generator
from dedpo_diffusion.training.cache import rows_digest
from dedpo_diffusion.training.groups import Groups
from dedpo_diffusion.training.pair_sampler import alike

if TYPE_CHECKING:
    from dedpo_diffusion.models.backbone import Backbone
    from dedpo_diffusion.training.own_noise import OwnNoise
    from dedpo_diffusion.training.sources import Source

CHOICE = 1001  # stream of `step_generator` for which of a pair's pre-drawn noises a visit gets
GRID = 1002  # for the pre-drawn noises
GRID_TIMESTEPS = 1007  # for the pre-drawn timesteps of a pair, where they are drawn in strata


class ReferenceGrid:
    """A fixed set of draws for every pair, with the reference's errors at them, kept beside the cache and shared by all runs on it
    that compute alike.

    With timesteps in strata each of a pair's K draws has its timestep in another K-th of their distribution, in an order of the pair's
    own, and the visits of a step take draws from each K-th as evenly as they can. With groups a group has the place of its first pair.

    Args:
        folder: of the cache; the grid gets a folder of its own there, by what it depends on.
        source: encoded pairs.
        model: the model, whose reference is its base.
        pairs: pairs of the dataset.
        rows: those that will be visited; only theirs are computed, with progress, and only once.
        draws: K, draws of each pair.
        timesteps: how they are drawn.
        caption_dropout: share of draws with the empty prompt.
        batch: draws predicted at once: the pairs of a forward pass of the run, so that both round alike.
        kernels: what else the errors' rounding depends on.
        groups: the groups that are visited instead of the pairs at `rows`.
        noise: "shared" by the images of a visit; "independent"; or each image's own, kept beside the errors. With the last, latents are the
            means of the VAE's posterior, from which the noises were found.
    """

    SHARD = 64

    def __init__(
        self, folder: Path, source: Source, model: Backbone, rows: np.ndarray, *, pairs: int, draws: int,
        timesteps: TimestepDraw, caption_dropout: float, batch: int = 8, kernels: Sequence[object] = (), groups: Groups | None = None,
        noise: str | OwnNoise = "shared",
    ) -> None:  # fmt: skip
        if draws < 1:
            raise UserError(f"data.reference_draws is {draws}; it must be at least 1")
        drawn = {name: getattr(timesteps, name) for name in ("first", "last", "sampling", "location", "spread")}
        drawn |= {"strata": True} if timesteps.strata else {}
        precision = [str(model.dtype), str(next(model.unet.parameters()).dtype)]
        rounding = [batch, model.device.type, *kernels]
        parts = [model.reference_fingerprint(), precision, drawn, draws, caption_dropout, rounding]
        parts += [] if groups is None else [groups.digest()]
        self.own = noise if not isinstance(noise, str) else None
        self.independent = noise == "independent"
        parts += [] if noise == "shared" else [noise if isinstance(noise, str) else noise.key]
        rows = rows if groups is None else groups.rows
        if self.own is not None and groups is None and len(rows) < pairs:  # a file of noises is of the rows that it was made for
            parts += [rows_digest(rows)]
        key = json.dumps(parts, sort_keys=True)
        self.groups, self._group = groups, {} if groups is None else {int(row): k for k, row in enumerate(rows)}
        self.draws, self.timesteps, self.source, self.caption_dropout, self.batch = draws, timesteps, source, caption_dropout, batch
        self.folder = folder / f"reference-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
        self.folder.mkdir(exist_ok=True)
        remove_leftovers(self.folder)
        self._visited = np.zeros(pairs, dtype=bool)
        self._visited[rows] = True
        most = 2 if groups is None else int(groups.sizes.max(initial=2))
        self.errors = torch.full((pairs, draws, most), torch.nan)
        shards = np.unique(rows // self.SHARD).tolist()
        for shard in shards:
            if self._file(shard).is_file():
                self.errors[self._part(shard)] = load_file(self._file(shard))["errors"]
        if self.own is not None:
            self._find_noises(self.own, [shard for shard in shards if not self.own.file(self.folder, shard).is_file()], model)
        missing = {shard: some for shard in shards if len(some := self._missing(shard))}
        if missing:
            with Progress("reference errors", sum(map(len, missing.values()))) as progress:
                for shard, some in missing.items():
                    self._fill(some, model)
                    with atomic_file(self._file(shard)) as temporary:
                        save_file({"errors": self.errors[self._part(shard)].clone()}, temporary)
                    progress.advance(len(some))

    def _part(self, shard: int) -> slice:
        return slice(int(shard) * self.SHARD, min((int(shard) + 1) * self.SHARD, len(self.errors)))

    def _there(self, part: slice) -> np.ndarray:
        """The rows of a shard that are visited."""
        return part.start + np.flatnonzero(self._visited[part])

    def _missing(self, shard: int) -> np.ndarray:
        """Those of a shard whose errors are not there."""
        rows = self._there(self._part(shard))
        return rows[self.errors[rows, 0, 0].isnan().numpy()]

    def _find_noises(self, own: OwnNoise, shards: Sequence[int], model: Backbone) -> None:
        """Each image's own noise, of these shards."""
        from dedpo_diffusion.training.own_noise import say_noises

        own.begin(self.folder, self.SHARD)
        if not shards:
            return
        found, every = np.zeros(3, dtype=int), [self._there(self._part(shard)) for shard in shards]
        numbers = sum(int(self.source.shapes(np.array([row])).prod()) * len(self.images(int(row))) for rows in every for row in rows)
        say(f"each image's own noise is kept in {self.folder}: up to {size_words(4 * numbers * self.draws)}")
        with Progress("own noise", sum(map(len, every))) as progress:
            for shard, rows in zip(shards, every, strict=True):
                found += own.fill(
                    shard, rows, model, self.source, images=self.images, timesteps=self._timesteps, batch=self.batch, progress=progress
                )
        say_noises(*found.tolist())

    def _timesteps(self, row: int) -> Tensor:
        """Of all draws of a row, (K,)."""
        if self.timesteps.strata:
            return self._strata(row)
        return torch.cat([self._drawn(row, number).timesteps for number in range(self.draws)])

    def _fill(self, rows: np.ndarray, model: Backbone) -> None:
        """The errors at all draws of these rows."""
        keys = np.column_stack([self.source.shapes(rows), [len(self.images(int(row))) for row in rows]])
        for (*_, images), some in alike(keys):
            found = self._errors([(int(rows[place]), number) for place in some for number in range(self.draws)], model)
            self.errors[rows[some], :, :images] = found.view(len(some), self.draws, images)

    def images(self, row: int) -> np.ndarray:
        """Where the images of a visit of this row are, (K, 2) rows and sides: those of its pair, or of the group that it stands for."""
        return np.array([(row, 0), (row, 1)]) if self.groups is None else self.groups.images_of(self._group[row])

    def _file(self, shard: int) -> Path:
        return self.folder / f"shard-{int(shard):05d}.safetensors"

    def _drawn(self, row: int, number: int) -> Draws:
        """A draw as it is without strata and own noise."""
        shape = self.source.shapes(np.array([row]))[0].tolist()
        images, dropout = len(self.images(row)), self.caption_dropout
        how = self.timesteps
        return draw(
            row, number, 1, shape, timesteps=how, caption_dropout=dropout, stream=GRID, images=images, independent=self.independent
        )  # fmt: skip

    def _draw(self, row: int, number: int) -> Draws:
        drawn = self._drawn(row, number)
        if self.timesteps.strata:
            drawn = replace(drawn, timesteps=self._strata(row)[number : number + 1])
        if self.own is None:
            return drawn
        _, images, c, h, w = drawn.posterior.shape
        noise = self.own.at(row, number, images, self.draws, (c, h, w))
        return replace(drawn, noise=noise[None], posterior=torch.zeros_like(drawn.posterior))

    def _strata(self, row: int) -> Tensor:
        """The timesteps (K,) of a pair's draws, one in each K-th of their distribution."""
        return self.timesteps.draw(self.draws, step_generator(row, 0, GRID_TIMESTEPS))

    def choose(self, rows: Sequence[int], visits: Sequence[int], *, seed: int, together: int) -> list[int]:
        """Which draw each visit of a pair takes, each of the K equally often on average; `together` visits make a step."""
        if not self.timesteps.strata:
            return [int(step_generator(seed, visit, CHOICE).initial_seed()) % self.draws for visit in visits]
        steps = {visit // together for visit in visits}
        shares = {step: self.timesteps.shares(together, step_generator(seed, step, CHOICE)) for step in steps}
        parts = [int(self.draws * shares[visit // together][visit % together]) for visit in visits]
        # the draw that lies in a part, whose number differs from pair to pair: so no view of the pairs goes with some timesteps
        return [int(self._strata(row).argsort(stable=True)[part]) for row, part in zip(rows, parts, strict=True)]

    def _errors(self, wanted: Sequence[tuple[int, int]], model: Backbone) -> Tensor:
        """The reference's errors (N, images) at N draws, (pair, its number), of one shape.

        `batch` are predicted at a time, so that they round as in a step of the run.
        """
        found = []
        for first in range(0, len(wanted), self.batch):
            part = wanted[first : first + self.batch]
            rows, numbers = zip(*(*part, *[part[-1]] * (self.batch - len(part))), strict=True)
            draws = Draws.join([self._draw(row, number) for row, number in zip(rows, numbers, strict=True)])
            encoded = self.source.fetch(rows, numbers, draws.drop_caption, np.stack([self.images(row) for row in rows]))
            draws, given = draws.to(model.device), encoded.conditioning.to(model.device)
            latents = model.latents(encoded.mean.to(model.device), encoded.std.to(model.device), draws.posterior)
            errors = model.errors(latents, image_noise(draws.noise), draws.timesteps, given, reference=True)
            found.append(errors[: len(part)].cpu())
        return torch.cat(found)

    def at(self, rows: Sequence[int], numbers: Sequence[int]) -> tuple[Draws, Tensor]:
        """The draws with these numbers of these pairs, and the reference's errors (B, images) at them."""
        draws = Draws.join([self._draw(row, number) for row, number in zip(rows, numbers, strict=True)])
        return draws, self.errors[list(rows), list(numbers), : draws.posterior.shape[1]]
