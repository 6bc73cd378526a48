"""The images of a report: which pairs are shown, their thumbnails, and the data that the page's gallery is built from."""

from __future__ import annotations

import base64
import io
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dedpo_diffusion.core.page import about, dot, page_file, section, shown
from dedpo_diffusion.evaluation.comparison.arms import categories
from dedpo_diffusion.evaluation.comparison.verdict import decimals
from dedpo_diffusion.evaluation.report.sections import Results, is_people, ordered

if TYPE_CHECKING:
    from dedpo_diffusion.evaluation.comparison.arms import Arm

MOST = 500  # pairs in the gallery
PROMPTS = 12  # prompts shown in all arms side by side
EXTREMES = 4  # largest gains, and largest regressions, where no script runs
PIXEL_ART = 128  # pixels; images of at most this side stay as they are
SIDES = (512, 256)  # pixels of a thumbnail's longer side: few, and many
FEW = 240  # thumbnails at the first size; of more the page would grow too large
QUALITY = 80  # of WebP


# ---- which pairs


def evenly_spaced(arm: Arm, wanted: int) -> list[int]:
    """Rows of evenly spaced prompts, the first seed of each: chosen without looking at any image or score."""
    first: dict[int, int] = {}
    for row, entry in enumerate(arm.rows):
        first.setdefault(entry["prompt_index"], row)
    return spaced(list(first.values()), wanted)


def spaced(rows: Sequence[int], wanted: int) -> list[int]:
    """At most `wanted` of these rows, evenly spaced, with both ends."""
    count = min(wanted, len(rows))
    return [rows[round(k * (len(rows) - 1) / max(count - 1, 1))] for k in range(count)]


def extremes(gain: Any, wanted: int) -> tuple[list[int], list[int]]:
    """Rows of the largest gains and of the largest losses; neither holds a row that did not change that way."""
    order = sorted(range(len(gain)), key=lambda row: -gain[row])
    return [row for row in order[:wanted] if gain[row] > 0], [row for row in order[::-1][:wanted] if gain[row] < 0]


def ranking(arms: Sequence[Arm], results: Results) -> str:
    """The scorer that chooses images: the primary one; the first of the others where that is people, who have not judged every pair."""
    primary = results["primary"]
    return next(name for name in results["scorers"] if not is_people(results, name)) if is_people(results, primary) else str(primary)


def chosen_rows(arms: Sequence[Arm], scorer: str, most: int = MOST) -> tuple[list[int], str]:
    """Rows of the gallery, and the rule in words.

    All, if they are at most `most`. Else half of the places go to the largest changes, as many up as down in every arm, and the
    rest are evenly spaced among the others.
    """
    count = len(arms[0].rows)
    if count <= most:
        return list(range(count)), f"All {count} pairs."
    each = most // (4 * (len(arms) - 1))
    parts = [extremes(arm.scores[scorer] - arms[0].scores[scorer], each) for arm in arms[1:]]
    held = {row for part in parts for rows in part for row in rows}
    rest = spaced([row for row in range(count) if row not in held], most - len(held))
    of_each = f"of each of {len(arms) - 1} arms " if len(arms) > 2 else ""
    changed = []
    for k, word in enumerate(("rose", "fell")):
        counts = [len(part[k]) for part in parts]
        number = f"the {counts[0]}" if len(set(counts)) == 1 else f"up to {max(counts)}"
        changed += [f"{number} whose {scorer} {word} most"] if any(counts) else []
    rule = (
        f"{most} of {count} pairs: {of_each if changed else ''}{' and '.join(changed)}{', and ' if changed else ''}"
        f"{len(rest)} evenly spaced among the others, so shares of wins and losses here are not those of all pairs."
    )
    return sorted([*held, *rest]), rule


# ---- thumbnails


@dataclass(frozen=True)
class Thumbnail:
    """An image as the page holds it: `data` is "image/KIND;base64,...", `width` and `height` are pixels."""

    data: str
    width: int
    height: int

    @property
    def small(self) -> bool:
        """Whether it is shown enlarged, with hard pixels."""
        return max(self.width, self.height) <= PIXEL_ART


def thumbnail(path: Path, side: int) -> Thumbnail:
    """An image whose longer side is at most `side` pixels; tiny images are kept to the pixel.

    Raises:
        UserError: it cannot be decoded.
    """
    from PIL import Image

    from dedpo_diffusion.pairs.decoding import decode_image

    image, buffer = decode_image(path.read_bytes(), str(path)), io.BytesIO()
    if max(image.size) <= PIXEL_ART:
        image.save(buffer, kind := "png", optimize=True)
    else:
        image.thumbnail((side, side), Image.Resampling.LANCZOS)
        image.save(buffer, kind := "webp", quality=QUALITY, method=2)
    return Thumbnail(f"image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}", *image.size)


Thumbnails = Mapping[tuple[int, int], Thumbnail]


def make_thumbnails(arms: Sequence[Arm], rows: Iterable[int], side: int) -> Thumbnails:
    """By (row, number of the arm), in threads and with progress.

    Raises:
        UserError: an image that cannot be decoded.
    """
    from dedpo_diffusion.core.console import Progress
    from dedpo_diffusion.core.prefetch import prefetch

    wanted = [(row, k) for row in sorted(set(rows)) for k in range(len(arms))]
    workers, found = os.cpu_count() or 1, {}
    with Progress("images of the page", len(wanted)) as progress:
        for key, made in prefetch(
            wanted, lambda key: thumbnail(arms[key[1]].folder / arms[key[1]].rows[key[0]]["file"], side), workers=workers, depth=4 * workers
        ):
            found[key] = made
            progress.advance()
    return found


# ---- the gallery


def people_said(arms: Sequence[Arm]) -> list[list[float | None]]:
    """By arm, how far people prefer its image of each row to the base's, from -1 to 1; None where nobody answered."""
    from dedpo_diffusion.evaluation.comparison.preferences import read_judged

    found, said = read_judged(arms), []
    for arm in arms:
        values: list[float | None] = [None] * len(arm.rows)
        if arm.name in found:
            for row, gain in zip(found[arm.name].rows, found[arm.name].gain, strict=True):
                values[row] = float(gain)
        said.append(values)
    return said


def gallery_data(
    arms: Sequence[Arm], results: Results, rows: Sequence[int], thumbnails: Thumbnails, best: str, categories: Sequence[str | None]
) -> str:
    """The end of the page: what the gallery knows of every pair, then the images, each in a block that is read when it is looked at."""
    scorers = [name for name in ordered(results) if is_people(results, name) or name in arms[0].scores]
    columns = []  # by scorer, by arm: a value for each row
    for name in scorers:
        if is_people(results, name):
            columns.append(people_said(arms))
        else:
            columns.append([arm.scores[name].tolist() for arm in arms])
    pairs = []
    for row in rows:
        entry, image = arms[0].rows[row], thumbnails[row, 0]
        scores = [[values[row] for values in by_arm] for by_arm in columns]
        facts = {"row": row, "prompt": entry["prompt"], "seed": entry["seed"], "category": categories[row]}
        pairs.append({**facts, "size": [image.width, image.height], "small": image.small, "scores": scores})
    known = {
        "arms": [arm.name for arm in arms], "best": [arm.name for arm in arms].index(best), "pairs": pairs,
        "scorers": [{"name": name, "people": is_people(results, name), "digits": max(3, decimals(results, name) - 1)} for name in scorers],
        "scorer": scorers.index(ranking(arms, results)),
    }  # fmt: skip
    written = json.dumps(known, ensure_ascii=False, allow_nan=False).replace("<", "\\u003c")  # no text can end the block
    blocks = [f'<script type="application/json" id="known">{written}</script>']
    blocks += [
        f'<script type="text/plain" id="image-{row}-{k}">{thumbnails[row, k].data}</script>' for row in rows for k in range(len(arms))
    ]
    return "\n".join(blocks)


def image_sections(arms: Sequence[Arm], results: Results, best: str) -> tuple[str, str]:
    """What the page shows of images, and the data for its end."""
    scorer, mine = ranking(arms, results), next(arm for arm in arms if arm.name == best)
    rows, rule = chosen_rows(arms, scorer)
    fixed = evenly_spaced(arms[0], PROMPTS)
    gains, losses = extremes(mine.scores[scorer] - arms[0].scores[scorer], EXTREMES)
    side = SIDES[len(rows) * len(arms) > FEW]
    thumbnails = make_thumbnails(arms, [*rows, *fixed, *gains, *losses], side)
    megabytes = sum(len(thumbnails[row, k].data) for row in rows for k in range(len(arms))) / 1e6
    if any(not found.small for found in thumbnails.values()):
        rule += f" Thumbnails of {side} pixels at most, {megabytes:.1f} MB."
    steer = f"Drag across an image, or use the arrow keys on it: {arms[0].name} is on the left of the line."
    how = f'<div class="script" hidden>{about(f"{rule} {steer}")}</div>'
    plain = about("Without scripts, this page shows the following selections of its images.")
    gallery = section("Images", how, f"<noscript>{plain}</noscript>", page_file("gallery.html", __package__))
    chosen = f"{len(fixed)} evenly spaced prompts, first seed of each: not chosen by look or score. Below each image: {scorer}."
    parts = [gallery, section("Side by side", about(chosen), strips(arms, fixed, scorer, thumbnails))]
    for title, found, word in (("Largest gains", gains, "rose"), ("Largest regressions", losses, "fell")):
        between = f"{word} most from {results['base']} to {best}"
        words = f"Chosen by score: the {len(found)} images of {len(arms[0].rows)} whose {scorer} {between}."
        words = words if found else f"No image's {scorer} {word} from {results['base']} to {best}."
        body = section(title, about(words), strips(arms, found, scorer, thumbnails) if found else "")
        parts.append(f"<noscript>{body}</noscript>")
    return "".join(parts), gallery_data(arms, results, rows, thumbnails, best, categories(arms)[0])


def strips(arms: Sequence[Arm], rows: Sequence[int], scorer: str, thumbnails: Thumbnails) -> str:
    """One strip for each row: all arms beside each other, each image with its score."""
    made = []
    for row in rows:
        entry, cells = arms[0].rows[row], []
        for k, arm in enumerate(arms):
            image, score = thumbnails[row, k], float(arm.scores[scorer][row])
            change = score - float(arms[0].scores[scorer][row])
            arrow = "" if change == 0 else '<b class="up">▲</b>' if change > 0 else '<b class="down">▼</b>'
            caption = f"<figcaption>{dot(k)}{escape(arm.name)}<br><span>{shown(score)} {arrow}</span></figcaption>"
            alt = escape(f"{arm.name}: {entry['prompt']}", quote=True)
            size = f'width="{image.width}" height="{image.height}"{" class=small" if image.small else ""}'
            cells.append(f'<figure><img {size} src="data:{image.data}" alt="{alt}" loading="lazy" decoding="async">{caption}</figure>')
        title = f'<p class="prompt">{escape(entry["prompt"])} <small>seed {entry["seed"]}</small></p>'
        made.append(f'<div class="strip">{title}<div class="cells">{"".join(cells)}</div></div>')
    return f'<div class="strips" style="--n:{len(arms)}">{"".join(made)}</div>'
