"""From a pair dataset and its targets to the batches of a step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dedpo_diffusion.core.console import UserError, say
from dedpo_diffusion.core.records import PairBatch, Targets, Tensors
from dedpo_diffusion.dpo.adaptive_power import LEAST_POWER, Parts, loss_parts, retarget, visited_pairs
from dedpo_diffusion.dpo.noising import Draws
from dedpo_diffusion.labels.files import read_targets, targets_path
from dedpo_diffusion.models.backbone import Backbone
from dedpo_diffusion.pairs.dataset import PairReader
from dedpo_diffusion.training.cluster_weights import cluster_factors, say_cluster_weights
from dedpo_diffusion.training.groups import Groups, group_pairs, group_sizes
from dedpo_diffusion.training.pair_sampler import BucketedPairSampler, Order, PairSampler, alike, gradient_size, visit_probability
from dedpo_diffusion.training.reference_grid import ReferenceGrid
from dedpo_diffusion.training.sources import Encoded, Pictures, Source


def targets_of(reader: PairReader, name: str, merged: Targets | None = None) -> Targets:
    """The targets of this name in the dataset's folder, or what was made of them; a UserError where they are not of its pairs."""
    merged = read_targets(reader.folder, name) if merged is None else merged
    if not reader.has_ids(merged.pair_id):
        reader.ids()  # which tells of one that comes twice
        raise UserError(f"{targets_path(reader.folder, name)}: its pairs are not the dataset's; run `dedpo merge` again")
    return merged


def visited_rows(merged: Targets, path: Path, *, adaptive: bool) -> np.ndarray:
    """The dataset's rows that `visited_pairs` names, rising; a UserError where there are none."""
    rows = np.flatnonzero(visited_pairs(merged, path, adaptive=adaptive))
    if not len(rows):
        raise UserError(f"{path}: no pair carries any weight, so there is nothing to learn")
    return rows


@dataclass(frozen=True)
class Loaded(Tensors):
    """B consecutive visits before the model sees them.

    `places` of the visited pairs, `draws`, `encoded` as the source loads it, `target` and `weight` (B,), `known`: the reference's
    errors (B, 2), if they are, `labelled` (B,) bool. Of B groups of K images and P pairs each: `places`, `target`, `weight` and `labelled`
    are of their B P pairs, `known` is (B, K); `members` and `there` as in `PairBatch`.
    """

    places: list[int]
    draws: Draws
    encoded: Encoded | Pictures
    target: Tensor
    weight: Tensor
    known: Tensor | None
    labelled: Tensor | None
    members: Tensor | None = None
    there: Tensor | None = None


class PairLoader:
    """Batches of weighted pairs.

    Pairs of weight 0 are never visited. The others are visited with probability p and weighted by 1 / (N p), N being
    all pairs of the pool, so that the mean over visits estimates the mean over the pool without bias. With groups a visit is of a group,
    and its pairs have their group's probability.

    Args:
        reader: the pair dataset.
        source: where encoded pairs come from.
        targets: name of the targets in the dataset's folder.
        seed: the run's seed.
        together: visits in a step, over all its micro-batches and processes; they are of one shape.
        sampling: "uniform" or "importance", see `visit_probability`.
        adaptive: the power will change: pairs that weigh nothing at the present one are visited too, see `visited_pairs`.
        merged: targets of the dataset's pairs to take in place of those in the file; the visits that follow from them can change again,
            see `retarget`.
        grouped: numbers (N, 2) of the dataset's images, and how many of them make a group at most, see `group_pairs`; None visits pairs.
        cluster_weights: what prompts of many pairs count, see `training.cluster_weights`; not with a power that changes.

    Attributes:
        rows: the dataset's rows that are visited.
        groups: what is visited in place of single pairs, if it is.
        shapes: (C, h, w) of the latents of each bucket, and how many images its visits have; a single one without buckets and groups.
        grid: pre-drawn timesteps and noises with the reference's errors, if there are any.
        merged: target and weight (n,) float64 of the rows as they were merged, without the visits' part in the weights.
        labelled: (n,) bool, which of the rows people labelled, None where the targets do not say.
        parts, power: what the rows' targets are made of, and the power they were merged with, for one that follows; else None and NaN.

    Raises:
        UserError: targets that are not this dataset's or lack a column, or no pair that carries weight.
    """

    def __init__(
        self, reader: PairReader, source: Source, *, targets: str, seed: int, sampling: str, together: int, adaptive: bool = False,
        merged: Targets | None = None, grouped: tuple[np.ndarray, int] | None = None, cluster_weights: str = "none",
    ) -> None:  # fmt: skip
        merged = targets_of(reader, targets) if merged is None else merged
        self.source, self.seed, self.sampling, self.together = source, seed, sampling, together
        self.path = targets_path(reader.folder, targets)
        self.grid: ReferenceGrid | None = None
        self.grouped, self.cluster_weights = grouped, cluster_weights
        self.prompts = reader.prompts() if cluster_weights != "none" else []
        self.groups: Groups | None = None
        self.retarget(merged, adaptive=adaptive)

    def retarget(self, merged: Targets, *, adaptive: bool = False) -> None:
        """Take other targets of the same pairs: which pairs are visited, how often, and what is learned from each."""
        path = self.path
        if self.cluster_weights != "none":
            factor = cluster_factors(self.prompts, self.cluster_weights, merged.weight)
            say_cluster_weights(self.prompts, self.cluster_weights, merged.weight, factor)
            merged = replace(merged, weight=merged.weight * factor)
        self.rows = visited_rows(merged, path, adaptive=adaptive)
        self.parts: Parts | None
        self.parts, self.power = loss_parts(merged, path, self.rows) if adaptive else (None, math.nan)
        target, weight, pool = merged.target[self.rows], merged.weight[self.rows], len(merged.weight)
        planned = (target, weight) if self.parts is None else _planned(self.parts, max(self.power, LEAST_POWER))
        if self.grouped is not None:
            images, most = self.grouped
            self.groups = group_pairs(self.rows, images[self.rows], self.source.shapes(self.rows), most)
        self.visits: Order = self._order(self._probability(*planned))
        probability = self.visits.probability if self.groups is None else self.visits.probability[self.groups.group_of]
        visit = 1 / (pool * probability)
        self.target = torch.tensor(target, dtype=torch.float32)
        self.weight = torch.tensor(weight * visit, dtype=torch.float32)
        self.merged = torch.tensor(target), torch.tensor(weight)
        self.labelled = None if merged.human is None else torch.tensor(~np.isnan(merged.human[self.rows]))
        if self.parts is not None:
            self.parts = replace(self.parts, visit=self.parts.visit * torch.tensor(visit))
        idle = pool - len(self.rows)
        if idle:
            say(f"{idle} of {pool} pairs carry no weight in {path.stem!r} and are not visited")

    def _probability(self, target: np.ndarray, weight: np.ndarray) -> np.ndarray:
        """Of a visit to each pair, or to each group."""
        if self.groups is None:
            return visit_probability(target, weight, self.sampling)
        size = np.ones(len(self.groups)) if self.sampling == "uniform" else group_sizes(self.groups, gradient_size(target, weight))
        return size / size.sum()

    def _order(self, probability: np.ndarray) -> Order:
        """In which order the visited pairs or groups come: those of one shape and number of images together, if there are several."""
        rows = self.rows if self.groups is None else self.groups.rows
        images = np.full(len(rows), 2) if self.groups is None else self.groups.sizes
        kinds = alike(np.column_stack([self.source.shapes(rows), images]))
        self.shapes = [((c, h, w), k) for (c, h, w, k), _ in kinds]
        self.pairs = [1 if self.groups is None else int(self.groups.counts[some].max()) for _, some in kinds]
        if len(kinds) == 1:
            return PairSampler(self.seed, probability)
        share = np.array([probability[some].sum() for _, some in kinds])
        told = [f"{len(some)} of {shape[1]} x {shape[2]}" + (f" ({shape[3]} images)" if self.groups else "") for shape, some in kinds]
        say(("pairs" if self.groups is None else "groups") + " by height x width of their latents: " + ", ".join(told))
        places = [some for _, some in kinds]
        orders = [PairSampler(self.seed, probability[some] / probability[some].sum()) for some in places]
        return BucketedPairSampler(self.seed, places, orders, share / share.sum(), self.together)

    def _bucket(self, step: int) -> int:
        return self.visits.bucket(step) if isinstance(self.visits, BucketedPairSampler) else 0

    def shape(self, step: int) -> tuple[int, int, int]:
        """(C, h, w) of the latents of a step's pairs."""
        return self.shapes[self._bucket(step)][0]

    def images(self, step: int) -> int:
        """How many images each visit of a step has: 2, or those of its groups."""
        return self.shapes[self._bucket(step)][1]

    def load(self, first_visit: int, draws: Draws) -> Loaded:
        """Consecutive visits that begin at `first_visit`, as many as `draws` holds, in host memory; nothing asks for the device.

        With a grid, its draws take the place of those given.
        """
        visits = range(first_visit, first_visit + len(draws.timesteps))
        places, known = self.visits.rows(visits.start, visits.stop), None
        there = self.rows if self.groups is None else self.groups.rows
        rows, numbers = [int(there[place]) for place in places], list(visits)
        if self.grid is not None:  # the view is that of the noise, whose reference errors are of that view
            numbers = self.grid.choose(rows, visits, seed=self.seed, together=self.together)
            draws, known = self.grid.at(rows, numbers)
        if self.groups is None:
            return self.at(places, numbers, draws, known)
        return self._load_groups(self.groups, places, numbers, draws, known, self.pairs[self._bucket(first_visit // self.together)])

    def _load_groups(
        self, groups: Groups, which: list[int], numbers: Sequence[int], draws: Draws, known: Tensor | None, pairs: int
    ) -> Loaded:
        """B groups, filled up to so many pairs each; a mean over all of these is a mean over the groups."""
        found, members, there = (torch.from_numpy(part) for part in groups.padded(which, pairs))
        places, there = found.flatten().tolist(), there.flatten()
        target = torch.where(there, self.target[places], 0.5)
        weight = torch.where(there, self.weight[places] * pairs, 0.0)
        labelled = None if self.labelled is None else self.labelled[places]
        images = np.stack([groups.images_of(group) for group in which])
        encoded = self.source.load(groups.rows[which].tolist(), numbers, draws.drop_caption, images)
        return Loaded(places, draws, encoded, target, weight, known, labelled, members, there)

    def at(self, places: list[int], numbers: Sequence[int], draws: Draws, known: Tensor | None = None) -> Loaded:
        """B visited pairs by their places, each in the view that its number picks, at these draws."""
        labelled = None if self.labelled is None else self.labelled[places]
        encoded = self.source.load([int(self.rows[place]) for place in places], numbers, draws.drop_caption)
        return Loaded(places, draws, encoded, self.target[places], self.weight[places], known, labelled)

    def batch(self, loaded: Loaded, model: Backbone) -> tuple[PairBatch, Draws]:
        """The batch of what was loaded, and its draws, on the model's device."""
        given = loaded.map(lambda value: value.to(model.device, non_blocking=True))
        encoded = self.source.encode(given.encoded)
        latents = model.latents(encoded.mean, encoded.std, given.draws.posterior)
        pairs = {"members": given.members, "there": given.there}
        batch = PairBatch(latents, encoded.conditioning, given.target, given.weight, given.known, given.labelled, **pairs)
        return batch, given.draws


def _planned(parts: Parts, power: float) -> tuple[np.ndarray, np.ndarray]:
    """Targets and weights at a power that visits are planned for."""
    target, weight = retarget(parts.human, parts.judge, parts.inverse, power)
    return target.numpy(), weight.numpy()
