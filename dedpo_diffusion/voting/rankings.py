"""Rankings: all K images of a prompt at once, in place of its pairs one after another.

A group is a prompt's images that hang together through pairs of the dataset. Who ranks it answers K (K - 1) / 2 comparisons,
of which those are kept that are pairs of the dataset, as one cluster: they depend on each other. Order, propensities, hidden
repetitions, leases and undo are those of pairs, with groups in their place.

A ranking is stored as a text of image numbers, best first: "2>0=1>3" has a tie in second place.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dedpo_diffusion.core.console import Progress
from dedpo_diffusion.core.files import write_text
from dedpo_diffusion.core.records import Votes
from dedpo_diffusion.labels.clusters import joined
from dedpo_diffusion.pairs.dataset import PairReader
from dedpo_diffusion.voting.plan import Plan, uniform
from dedpo_diffusion.voting.queue import SKIP, Asked, Event
from dedpo_diffusion.voting.service import Refusal, VoteService
from dedpo_diffusion.voting.store import Store

Row = tuple[str, str, bytes, bytes]  # pair_id, prompt, image 0, image 1
MOST = 9  # images of a ranking: there are as many keys


@dataclass(frozen=True)
class Group:
    """A prompt's images and the pairs between them.

    `name`, the pair_id of its first pair, is its id; `images` are where each image first stands, as (pair, 0 or 1); `pairs` are
    (pair, the number of its image 0, the number of its image 1).
    """

    name: str
    prompt: str
    images: tuple[tuple[int, int], ...]
    pairs: tuple[tuple[int, int, int], ...]

    @property
    def size(self) -> int:
        """Its number of images, K."""
        return len(self.images)

    @property
    def complete(self) -> bool:
        """Whether all K (K - 1) / 2 pairs are in the dataset."""
        return len({frozenset(pair[1:]) for pair in self.pairs}) == self.size * (self.size - 1) // 2


def find_groups(reader: PairReader) -> tuple[list[Group], list[str]]:
    """The groups in the order of their first pairs, and sentences on what cannot be ranked. Images are told apart by their files."""
    seen: list[Row] = []
    with Progress("looking for prompts of several images", len(reader)) as progress:
        for pair in reader.iter_pairs():
            first, second = (hashlib.blake2b(data, digest_size=16).digest() for data in (pair.image_0, pair.image_1))
            seen.append((pair.pair_id, pair.prompt, first, second))
            progress.advance(1)
    groups = group_pairs(seen)
    large = [group for group in groups if group.size > MOST]
    alike = [group for group in groups if group.size < 2]
    kept = [group for group in groups if 2 <= group.size <= MOST]
    texts = []
    if large:
        texts.append(
            f"{len(large)} prompts have more than {MOST} images that hang together ({large[0].prompt!r} has {large[0].size}) and are not "
            "ranked; vote on their pairs without --rank, under another --name"
        )
    if alike:
        texts.append(f"{len(alike)} prompts have pairs of the same image twice alone, and are not ranked")
    part = sum(not group.complete for group in kept)
    if part:
        texts.append(f"{part} of {len(kept)} prompts lack some pairs of their images; a ranking labels those that the dataset holds")
    return kept, texts


def group_pairs(pairs: Sequence[Row]) -> list[Group]:
    """Groups of (pair_id, prompt, image 0, image 1); images are equal where their bytes (or digests) are, under one prompt."""
    stands = joined(((prompt, first), (prompt, second)) for _, prompt, first, second in pairs)
    rows: dict[int, list[int]] = {}
    for row, (_, prompt, first, _) in enumerate(pairs):
        rows.setdefault(stands[prompt, first], []).append(row)
    return [_group(pairs, members) for members in rows.values()]


def _group(pairs: Sequence[Row], rows: Sequence[int]) -> Group:
    number: dict[bytes, int] = {}
    places: list[tuple[int, int]] = []
    edges = []
    for row in rows:
        images = pairs[row][2], pairs[row][3]
        for side, image in enumerate(images):
            if image not in number:
                number[image] = len(places)
                places.append((row, side))
        first, second = (number[image] for image in images)
        if first != second:  # the same image twice is no comparison
            edges.append((row, first, second))
    return Group(pairs[rows[0]][0], pairs[rows[0]][1], tuple(places), tuple(edges))


def group_weights(groups: Sequence[Group], weights: np.ndarray) -> np.ndarray:
    """(G,) pulls of groups: the mean pull of their pairs, (N,) in (0, 1]."""
    return np.array([float(np.mean([weights[pair] for pair, _, _ in group.pairs])) for group in groups])


def arrangement(plan: Plan, rater: str, group: Group, *, again: bool) -> list[int]:
    """The number of the image at each place on the page, in random order; a hidden repetition shows the opposite order."""
    draws = [uniform("place", plan.seed, rater, k, group.name) for k in range(group.size)]
    return sorted(range(group.size), key=draws.__getitem__, reverse=again)


def written(tiers: Iterable[Iterable[int]]) -> str:
    """Tiers of image numbers, best first, as the store keeps them; numbers of a tier are sorted."""
    return ">".join("=".join(map(str, sorted(tier))) for tier in tiers)


def ranks(answer: str) -> dict[int, int]:
    """The rank of each image in a stored ranking; 0 is the best, equal ranks are ties."""
    return {int(image): rank for rank, tier in enumerate(answer.split(">")) for image in tier.split("=")}


class RankService(VoteService):
    """A voting on groups; see VoteService.

    Args:
        reader: the pairs.
        plan: order and draws, for the groups' names.
        store: the rankings.
        groups: what is ranked.
        clock: seconds that only grow.
    """

    def __init__(self, reader: PairReader, plan: Plan, store: Store, groups: Sequence[Group], **options: Callable[[], float]) -> None:
        self.groups = groups
        super().__init__(reader, plan, store, **options)
        self.prompts = [group.prompt for group in groups]
        self.pair_ids = reader.ids()

    def _arranged(self, rater: str, asked: Asked) -> list[int]:
        return arrangement(self.plan, rater, self.groups[asked.pair], again=asked.again)

    def _item(self, rater: str, asked: Asked) -> dict[str, Any]:
        ticket = self._ticket(rater, asked)
        images = [f"/image/{ticket}/{place}" for place in range(self.groups[asked.pair].size)]
        return {"ticket": ticket, "prompt": self.prompts[asked.pair], "images": images}

    def check_answer(self, answer: Any) -> None:
        """Refusal unless this is skip, or a list of lists of different numbers: the places on the page, best first."""
        if answer == SKIP:
            return
        tiers = answer if isinstance(answer, list) and all(isinstance(tier, list) and tier for tier in answer) else []
        places = [place for tier in tiers for place in tier]
        if not places or not all(type(place) is int for place in places) or len(set(places)) < len(places):
            raise Refusal(400, "answer must be skip, or the places of all images, best first, in lists of those that tie: [[2], [0, 1]]")

    def _stored(self, rater: str, asked: Asked, answer: Any) -> str:
        if answer == SKIP:
            return SKIP
        arranged = self._arranged(rater, asked)
        if sorted(place for tier in answer for place in tier) != list(range(len(arranged))):
            raise Refusal(400, f"this prompt has {len(arranged)} images, and a ranking names each place from 0 on once")
        return written([arranged[place] for place in tier] for tier in answer)

    def _side(self, rater: str, asked: Asked) -> None:
        return None

    def has_place(self, place: str) -> bool:
        """See VoteService."""
        return len(place) == 1 and place in "012345678"

    def _shown(self, rater: str, asked: Asked, place: str) -> tuple[int, int]:
        group = self.groups[asked.pair]
        if int(place) >= group.size:
            raise Refusal(404, "there is no such image")
        return group.images[self._arranged(rater, asked)[int(place)]]

    def rankings_to_votes(self, events: Sequence[Event]) -> Votes:
        """The comparisons of every ranking that are pairs of the dataset, those of one with one number in `ranking`.

        `swapped` is whether image 1 stood before image 0 on the page; the seconds of a ranking are shared out among its comparisons.
        """
        ids = self.pair_ids
        columns: dict[str, list[Any]] = {key: [] for key in ("id", "label", "rater", "swapped", "repeat", "seconds", "time", "ranking")}
        for event in events:
            if event.answer == SKIP:
                continue
            number = self.queue.number[event.pair_id]
            group, rank = self.groups[number], ranks(str(event.answer))
            place = {image: k for k, image in enumerate(self._arranged(event.rater, Asked(number, event.again)))}
            for pair, first, second in group.pairs:
                wins = float(np.sign(rank[second] - rank[first]) / 2 + 0.5)
                spent = None if event.seconds is None else event.seconds / len(group.pairs)
                row = (ids[pair], wins, event.rater, place[second] < place[first], event.again, spent, event.time, str(event.number))
                for key, value in zip(columns, row, strict=True):
                    columns[key].append(value)
        found, label, rater = columns.pop("id"), np.array(columns.pop("label"), dtype=np.float64), columns.pop("rater")
        return Votes(found, label, np.ones(len(found), dtype=np.int64), rater, columns)

    def cluster_of(self, pair_ids: Sequence[str]) -> list[str]:
        """The group of each pair, which is the cluster of its label."""
        ids = self.pair_ids
        name = {ids[pair]: group.name for group in self.groups for pair, _, _ in group.pairs}
        return [name[pair_id] for pair_id in pair_ids]

    def write_rankings(self, path: Path, events: Sequence[Event]) -> None:
        """Every ranking as it was given, a JSON line each: images are named by a pair that holds them, as [pair_id, 0 or 1]."""
        ids, lines = self.pair_ids, []
        for event in events:
            if event.answer == SKIP:
                continue
            images = self.groups[self.queue.number[event.pair_id]].images
            tiers = [[[ids[images[int(k)][0]], images[int(k)][1]] for k in tier.split("=")] for tier in str(event.answer).split(">")]
            told = {"ranking": str(event.number), "rater": event.rater, "repeat": event.again, "seconds": event.seconds, "time": event.time}
            lines.append(json.dumps(told | {"tiers": tiers}, ensure_ascii=False))
        write_text(path, "".join(f"{line}\n" for line in lines))
