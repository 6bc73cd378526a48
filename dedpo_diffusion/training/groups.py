"""Pairs of one prompt that share images, visited together: K images go through the model once, and all pairs are formed of K errors.

The images of a group share timestep and noise. Of a ranking of K images, or of `dedpo propose --pairing all`, a group takes K predictions
where its pairs one by one take K (K - 1).
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from dedpo_diffusion.core.console import Progress, UserError
from dedpo_diffusion.core.files import atomic_file
from dedpo_diffusion.settings import TrainSettings

if TYPE_CHECKING:
    from dedpo_diffusion.pairs.dataset import PairReader

IMAGES = "images.safetensors"  # beside a cache: which images of the dataset are one file


def check_groups(settings: TrainSettings) -> None:
    """Refuse settings that groups do not go with.

    Raises:
        UserError: what stands against it, and what to do.
    """
    data, power = settings.data, settings.objective.power
    if data.groups is None:
        return
    if data.groups < 2:
        raise UserError(f"data.groups is {data.groups}; a group holds at least 2 images, or give null for single pairs")
    if data.cache is None:
        raise UserError("data.groups needs data.cache, which knows the images of every pair before the first step")
    if data.crop == "random":
        raise UserError("data.groups does not go with data.crop=random, which crops an image differently in each of its pairs; take centre")
    if power != "fixed":
        raise UserError(f"data.groups does not go with objective.power={power}, which is derived for visits of single pairs; take fixed")


@dataclass(frozen=True)
class Groups:
    """G groups, in the order of their first pairs; what belongs to group g lies from start[g] to start[g + 1] - 1.

    `images` (M, 2) int64, the dataset's row and the side (0 or 1) where an image is found, with `image_start` (G + 1,); `places` (n,) of
    the visited pairs and `members` (n, 2), which of the group's images are image 0 and image 1 of each, with `pair_start` (G + 1,).
    """

    images: np.ndarray
    image_start: np.ndarray
    places: np.ndarray
    members: np.ndarray
    pair_start: np.ndarray

    def __len__(self) -> int:
        return len(self.image_start) - 1

    @property
    def sizes(self) -> np.ndarray:
        """(G,) images of each."""
        return np.diff(self.image_start)

    @property
    def counts(self) -> np.ndarray:
        """(G,) pairs of each."""
        return np.diff(self.pair_start)

    @property
    def group_of(self) -> np.ndarray:
        """(n,) which group each visited pair belongs to."""
        found = np.empty(len(self.places), dtype=np.int64)
        found[self.places] = np.repeat(np.arange(len(self)), self.counts)
        return found

    @property
    def rows(self) -> np.ndarray:
        """(G,) the row of each group's first pair, by which it is known."""
        return self.images[self.image_start[:-1], 0]

    def images_of(self, group: int) -> np.ndarray:
        """(K, 2) of `images`."""
        return self.images[self.image_start[group] : self.image_start[group + 1]]

    def padded(self, groups: list[int], pairs: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Places (B, P), members (B, P, 2) and which are there (B, P) of some groups, filled up to P pairs with repeats of their first."""
        first, count = self.pair_start[groups], self.counts[groups]
        number = np.arange(pairs)
        there = number < count[:, None]
        at = first[:, None] + np.where(there, number, 0)
        return self.places[at], self.members[at], there

    def digest(self) -> str:
        """What the groups are, in few characters."""
        parts = (self.images, self.image_start, self.places, self.members, self.pair_start)
        return hashlib.sha256(b"".join(np.ascontiguousarray(part, dtype="<i8").tobytes() for part in parts)).hexdigest()[:16]


def group_pairs(rows: np.ndarray, images: np.ndarray, shapes: np.ndarray, most: int) -> Groups:
    """Put pairs that share images into groups of at most `most` images; every pair is in exactly one.

    Args:
        rows: (n,) of the dataset, those that are visited.
        images: (n, 2) number of the image on either side of each; equal numbers are one image of one prompt.
        shapes: (n, 3) of their latents; pairs of different shape are kept apart.
        most: 2 or more; with 2 every pair that comes once is a group of its own.
    """
    made: list[tuple[list[int], list[tuple[int, int]], list[int], list[tuple[int, int]]]] = []  # numbers, found at, places, members
    among: dict[tuple, int] = {}  # two images of a shape -> a group that has both
    roomy: dict[tuple, list[int]] = defaultdict(list)  # an image of a shape -> groups that have it, and room
    keys = [tuple(shape) for shape in shapes.tolist()]
    ends = np.sort(images, axis=1)
    for place in np.lexsort((np.arange(len(rows)), ends[:, 1], ends[:, 0])).tolist():
        key, (a, b) = keys[place], images[place].tolist()
        group = among.get((key, a, b))
        if group is None:
            open_groups = [g for image in dict.fromkeys((a, b)) for g in roomy[key, image] if len({*made[g][0], a, b}) <= most]
            group = open_groups[0] if open_groups else len(made)
        if group == len(made):
            made.append(([], [], [], []))
        numbers, found, places, members = made[group]
        for side, image in enumerate((a, b)):
            if image not in numbers:
                for other in (*numbers, image):
                    among[key, other, image] = among[key, image, other] = group
                numbers.append(image)
                found.append((int(rows[place]), side))
                roomy[key, image].append(group)
        if len(numbers) >= most:
            for image in numbers:
                roomy[key, image] = [g for g in roomy[key, image] if g != group]
        places.append(place)
        members.append((numbers.index(a), numbers.index(b)))
    made.sort(key=lambda group: group[1][0])  # by the first pair, which found its first image

    def starts(column: int) -> np.ndarray:
        return np.cumsum([0, *(len(group[column]) for group in made)])

    def joined(column: int, width: tuple[int, ...] = ()) -> np.ndarray:
        return np.array([value for group in made for value in group[column]], dtype=np.int64).reshape(-1, *width)

    return Groups(joined(1, (2,)), starts(1), joined(2), joined(3, (2,)), starts(2))


def image_numbers(reader: PairReader, folder: Path) -> np.ndarray:
    """(N, 2) a number for each image of a dataset: equal ones are the same file, byte for byte, of the same prompt.

    They are kept in the cache's folder; the first time every image file is read.

    Raises:
        UserError: the file that keeps them is damaged.
    """
    file = folder / IMAGES
    if file.is_file():
        try:
            return load_file(file)["images"].numpy()
        except (OSError, SafetensorError, KeyError) as error:
            raise UserError(f"{file}: damaged ({error}); remove it, and it is made anew") from error
    numbers: dict[tuple[str, bytes], int] = {}
    found = np.empty((len(reader), 2), dtype=np.int64)
    with Progress("looking for images in common", len(reader)) as progress:
        for row, pair in enumerate(reader.iter_pairs()):
            for side, image in enumerate((pair.image_0, pair.image_1)):
                key = pair.prompt, hashlib.blake2b(image, digest_size=16).digest()
                found[row, side] = numbers.setdefault(key, len(numbers))
            progress.advance()
    with atomic_file(file) as temporary:
        save_file({"images": torch.from_numpy(found)}, temporary)
    return found


def group_sizes(groups: Groups, sizes: np.ndarray) -> np.ndarray:
    """(G,) how large the gradient of each group is, from the sizes (n,) of its pairs': the root of the sum of their squares."""
    return np.sqrt(np.bincount(groups.group_of, sizes**2, minlength=len(groups)))
