"""The images of two models as pairs, such that nothing but the picture tells which model drew it.

A picture is sent as what decoding.py makes of its file, written once more: texts, profiles, the file's name, format and
compression, which may name the model or give it away, stay behind.
"""

from __future__ import annotations

import hashlib
import io
import logging
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dedpo_diffusion.core.console import Progress, UserError
from dedpo_diffusion.core.prefetch import prefetch
from dedpo_diffusion.core.records import Pair
from dedpo_diffusion.pairs.decoding import decode_image
from dedpo_diffusion.voting.plan import turns

Row = dict[str, Any]
CACHED_PAIRS = 8  # a person's pair and the one that follows, for four people
WORKERS = 4

logger = logging.getLogger(__name__)


def match_samples(base: Path, base_rows: Sequence[Row], arm: Path, arm_rows: Sequence[Row]) -> list[tuple[Row, Row]]:
    """Rows of two sample folders' indexes as pairs (base's, arm's) of the same prompt and seed, in the order of the arm.

    In each folder a prompt comes once with a seed.

    Raises:
        UserError: a prompt and seed that one folder lacks.
    """
    held = [{(row["prompt"], row["seed"]): row for row in rows} for rows in (base_rows, arm_rows)]
    for one, other, mine, theirs in ((arm, base, held[1], held[0]), (base, arm, held[0], held[1])):
        lacking = next((key for key in theirs if key not in mine), None)
        if lacking is not None:
            what = f"prompt {lacking[0]!r} with seed {lacking[1]}"
            raise UserError(f"{one} has no image of {what}, and {other} has; sample both with the same prompts and seeds")
    return [(held[0][row["prompt"], row["seed"]], row) for row in arm_rows]


def fingerprint(digests: tuple[str, str], matched: Sequence[tuple[Row, Row]]) -> str:
    """SHA-256 of two folders' images (`digests`, the base's first), prompts and seeds, whatever the order of their indexes."""
    lines = sorted("\0".join((str(one["seed"]), one["file"], other["file"], one["prompt"])) for one, other in matched)
    return hashlib.sha256("\n".join((*digests, *lines)).encode()).hexdigest()


class SamplePairs:
    """Pairs of images of the same prompt and seed: image 0 is the base's, image 1 the arm's. Read as `PairReader` is.

    Pairs whose two pictures are the same are kept apart: `asked` are the others, `identical` these; of both, rows (base's, arm's).

    Args:
        base, arm: the sample folders; `folder`, where the votes lie, is the arm.
        matched: of `match_samples`.
        digests: fingerprints of the base's images and of the arm's.

    Raises:
        UserError: an image that cannot be decoded, a pair of two sizes, no two images that differ.
    """

    def __init__(self, base: Path, arm: Path, matched: Sequence[tuple[Row, Row]], digests: tuple[str, str]) -> None:
        self.base, self.folder, self.digests = base, arm, digests
        with Progress("looking at the images", len(matched)) as progress:
            self.asked: list[tuple[Row, Row]] = []
            self.identical: list[tuple[Row, Row]] = []
            for rows, same in prefetch(matched, self._same, workers=WORKERS, depth=2 * WORKERS):
                (self.identical if same else self.asked).append(rows)
                progress.advance()
        if not self.asked:
            raise UserError(f"every image of {arm} is the same as that of {base}, so there is nothing to vote on; was the LoRA loaded?")
        self._print = fingerprint(digests, matched)
        self._shown: OrderedDict[int, Pair] = OrderedDict()

    def _paths(self, rows: tuple[Row, Row]) -> tuple[Path, Path]:
        return self.base / rows[0]["file"], self.folder / rows[1]["file"]

    def _same(self, rows: tuple[Row, Row]) -> bool:
        """Whether both pictures are the same, pixel by pixel."""
        paths = self._paths(rows)
        one, other = (decode_image(path.read_bytes(), str(path)) for path in paths)
        if one.size != other.size:
            sizes = f"{other.width} x {other.height} pixels, {paths[0]} {one.width} x {one.height}"
            raise UserError(f"{paths[1]} has {sizes}: the size would show which model it is; sample both at one size")
        return np.array_equal(np.asarray(one), np.asarray(other))

    def fingerprint(self) -> str:
        """Of both folders, as the function of this name has it."""
        return self._print

    def ids(self) -> list[str]:
        """A name for every pair that is asked. It depends on both folders' images, and so do the sides that are drawn by it: the base's
        image does not stand where it stood in a voting on another arm."""
        texts = (f"{self._print}\0{arm['seed']}\0{arm['prompt']}" for _, arm in self.asked)
        return [hashlib.blake2b(text.encode(), digest_size=10).hexdigest() for text in texts]

    def prompts(self) -> list[str]:
        """The prompt of every pair that is asked."""
        return [arm["prompt"] for _, arm in self.asked]

    def keys(self, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Keys, of `turns`, of the pairs that are asked and of the identical ones: both have their places in one order."""
        rows = [arm for _, arm in (*self.asked, *self.identical)]
        found = turns([row["prompt"] for row in rows], [row["seed"] for row in rows], seed)
        return found[: len(self.asked)], found[len(self.asked) :]

    def location(self, i: int) -> str:
        """Pair number `i` in words that may be said to people who vote: they hold no file and no folder."""
        return f"pair {i}"

    def pair(self, i: int) -> Pair:
        """Pair number `i` as PNG files that hold pixels and nothing else; the last few stay in memory.

        Raises:
            UserError: a file that was there at the start cannot be read; which one is said to the log alone.
        """
        if i not in self._shown:
            try:
                images = [_bare_png(path) for path in self._paths(self.asked[i])]
            except (OSError, UserError) as error:
                logger.warning("%s", error)
                raise UserError("an image of this pair cannot be read any more; skip the pair") from error
            self._shown[i] = Pair(str(i), self.asked[i][1]["prompt"], images[0], images[1])
            if len(self._shown) > CACHED_PAIRS:
                self._shown.popitem(last=False)
        self._shown.move_to_end(i)
        return self._shown[i]


def _bare_png(path: Path) -> bytes:
    pixels = np.asarray(decode_image(path.read_bytes(), str(path)))
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=1)  # of an array, since Pillow writes an image's profile again
    return buffer.getvalue()
