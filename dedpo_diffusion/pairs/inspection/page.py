"""The page of `dedpo validate`: a pair dataset to look at, one file without a network."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from dedpo_diffusion.core.console import UserError
from dedpo_diffusion.core.files import write_text
from dedpo_diffusion.core.page import about, document
from dedpo_diffusion.pairs.dataset import PairReader

SAMPLE = 12  # pairs shown at random
THUMBNAIL = 176  # pixels of a side
LETTERS = 200  # of a prompt; the rest shows when it is pointed at


def write_overview(path: Path, reader: PairReader, report: dict[str, Any], *, human: str, seed: int) -> Path:
    """Write the page.

    Args:
        path: the HTML file.
        reader: the pair dataset.
        report: of `inspection.findings`.
        human: name of the human label file, shown with the sample.
        seed: of the random sample of pairs.
    """
    labels = _labels(reader, human)
    title = f"{reader.folder.resolve().name}: {report['pairs']} pairs"
    parts = [f"<h1>{escape(title)}</h1>", _origin(reader), _cards(report, human), _problems(report), _charts(report), _people(report)]
    near = report.get("near_duplicates", {"closest": [], "closest_in_different_pairs": []})
    rows = [example["row"] for example in near["closest"][:6]]
    parts.append(_strip("Pairs whose two images look the same", rows, reader, labels))
    parts.append(_strip("Pairs that share pictures that look the same", _shared(near), reader, labels))
    if report["images"]["below_64_pixels"]:
        tiny = report["images"]["smallest"][: report["images"]["below_64_pixels"]]
        parts.append(_strip("The smallest images", tiny, reader, labels))
    drawn = np.sort(np.random.default_rng(seed).choice(report["pairs"], min(SAMPLE, report["pairs"]), replace=False))
    parts.append(_strip("A random sample", [int(row) for row in drawn], reader, labels))
    write_text(path, document(title, "".join(parts)))
    return path


def _labels(reader: PairReader, human: str) -> dict[str, float]:
    from dedpo_diffusion.labels.files import label_names, read_labels

    if human not in label_names(reader.folder):
        return {}
    try:
        found = read_labels(reader.folder, human)
    except UserError:  # told among the errors
        return {}
    return dict(zip(found.pair_id, found.label_0.tolist(), strict=True))


def _shared(near: dict[str, Any]) -> list[int]:
    return list(dict.fromkeys(row for example in near["closest_in_different_pairs"][:6] for row in example["rows"]))


def _origin(reader: PairReader) -> str:
    """The file or folder that the pairs were read from, where `dedpo ingest` noted it."""
    try:
        source = json.loads((reader.folder / "ingest.json").read_text(encoding="utf-8"))["settings"]["source"]
    except (OSError, ValueError, KeyError, TypeError):  # pairs that were made here
        return ""
    return about(f"read from {source}; a pair's name ends with its number or key in there")


def _cards(report: dict[str, Any], human: str) -> str:
    images, near = report["images"], report.get("near_duplicates")
    cards = [("pairs", f"{report['pairs']:,}"), ("different prompts", f"{report['prompts']['unique']:,}")]
    for name, label in report.get("labels", {}).items():
        cards.append(("pairs with a human label" if name == human else f"pairs labelled by {name}", f"{label['labelled']:,}"))
    cards.append(("MiB of images", f"{images['bytes'] / 2**20:,.1f}"))
    if near is not None:
        cards.append(("pairs of look-alikes", f"{near['within_pairs']:,}"))
    return (
        '<div class="cards">'
        + "".join(f'<div class="card"><span>{escape(a)}</span><strong>{b}</strong></div>' for a, b in cards)
        + "</div>"
    )


def _problems(report: dict[str, Any]) -> str:
    parts = []
    for words, texts in (("This is wrong", report["errors"]), ("This is odd", report["warnings"])):
        if texts:
            rest = f"<li>and {len(texts) - 20} more, in the JSON file</li>" if len(texts) > 20 else ""
            parts.append(f"<section><h2>{words}</h2><ul>{''.join(f'<li>{escape(text)}</li>' for text in texts[:20])}{rest}</ul></section>")
    return "".join(parts) or '<section><p class="about">Nothing is wrong, and nothing is odd.</p></section>'


def _charts(report: dict[str, Any]) -> str:
    images = report["images"]
    figures = [_bars(f"labels/{name}", _balance(label)) for name, label in report.get("labels", {}).items()]
    figures.append(_bars("image sizes", [(f"{size['width']} x {size['height']}", size["images"]) for size in images["sizes"][:8]]))
    figures.append(_bars("image kinds", list(images["formats"].items())[:8]))
    repeated = report["prompts"]["most_repeated"][:8]
    if repeated:
        figures.append(_bars("most repeated prompts", [(entry["prompt"], entry["pairs"]) for entry in repeated]))
    return f'<section><h2>What is in there</h2><div class="charts">{"".join(figures)}</div></section>'


def _balance(label: dict[str, Any]) -> list[tuple[str, int]]:
    return [("image 0 wins", label["image_0_wins"]), ("tie", label["ties"]), ("image 1 wins", label["image_1_wins"])]


def _bars(title: str, values: Sequence[tuple[str, int]]) -> str:
    """A bar chart: a name, its bar, its number."""
    most = max((count for _, count in values), default=0) or 1
    lines = []
    for k, (name, count) in enumerate(values):
        y = 26 * k
        shown = name if len(name) <= 22 else name[:21] + "…"
        lines.append(f'<text x="0" y="{y + 15}" class="soft">{escape(shown)}<title>{escape(name)}</title></text>')
        lines.append(f'<rect x="150" y="{y + 4}" width="{max(1.0, 110 * count / most):.1f}" height="14" rx="3" fill="var(--s1)"/>')
        lines.append(f'<text x="{156 + max(1.0, 110 * count / most):.1f}" y="{y + 15}" class="ink">{count:,}</text>')
    chart = f'<svg viewBox="0 0 320 {26 * max(1, len(values))}" role="img" aria-label="{escape(title)}">{"".join(lines)}</svg>'
    return f"<figure><figcaption>{escape(title)}</figcaption>{chart}</figure>"


def _people(report: dict[str, Any]) -> str:
    """What votes say of people, and how judges agree with them."""
    parts = []
    for name, votes in report.get("votes", {}).items():
        items = "".join(f"<li>{escape(sentence)}</li>" for sentence in votes["sentences"])
        parts.append(f"<h3>votes/{escape(name)}: {votes['n_votes']} answers on {votes['n_pairs']} pairs</h3><ul>{items}</ul>")
    rows = "".join(f"<tr><th>{escape(name)}</th>{_cells(judge)}</tr>" for name, judge in report.get("judges", {}).items())
    if rows:
        head = "<thead><tr><th>judge</th><th>agrees with people</th><th>95 % interval</th><th>pairs</th></tr></thead>"
        parts.append(f'<div class="scroll"><table>{head}<tbody>{rows}</tbody></table></div>')
    return f"<section><h2>People and judges</h2>{''.join(parts)}</section>" if parts else ""


def _cells(stat: dict[str, Any]) -> str:
    value = "-" if stat["value"] is None else f"{stat['value']:.1%}"
    interval = "-" if stat["ci"] is None else f"{stat['ci'][0]:.1%} to {stat['ci'][1]:.1%}"
    return f"<td>{value}</td><td>{interval}</td><td>{stat['n']}</td>"


# ---- pictures


def _strip(title: str, rows: Sequence[int], reader: PairReader, labels: dict[str, float]) -> str:
    if not rows:
        return ""
    pairs = "".join(_pair(reader, row, labels) for row in rows)
    return f'<section><h2>{escape(title)}</h2><div class="strips" style="--n:2">{pairs}</div></section>'


def _pair(reader: PairReader, row: int, labels: dict[str, float]) -> str:
    try:
        pair = reader.pair(row)
    except UserError as error:
        return f'<div class="strip"><p class="prompt">{escape(str(error))}</p></div>'
    label = labels.get(pair.pair_id)
    images = "".join(_image(data, side) for side, data in enumerate((pair.image_0, pair.image_1)))
    where = f"<small>{escape(pair.pair_id)} ({escape(reader.location(row))}), {_preferred(label)}</small>"
    shown = pair.prompt if len(pair.prompt) <= LETTERS else pair.prompt[: LETTERS - 1] + "…"
    prompt = f'<p class="prompt" style="overflow-wrap: anywhere" title="{escape(pair.prompt)}">{escape(shown)}<br>{where}</p>'
    return f'<div class="strip">{prompt}<div class="cells">{images}</div></div>'


def _preferred(label: float | None) -> str:
    """What people said of a pair, of the probability that they prefer image 0."""
    if label is None:
        return "no human label"
    if label == 0.5:
        return "people: a tie"
    share = max(label, 1 - label)
    return f"people preferred image {int(label < 0.5)}" + ("" if share == 1 else f" ({share:.0%})")


def _image(data: bytes, side: int) -> str:
    """A small picture inside the page."""
    from dedpo_diffusion.pairs.decoding import decode_image

    name = f"image {side}"
    try:
        image = decode_image(data, name)
    except UserError:
        return f'<figure><figcaption style="white-space: normal">{name} cannot be decoded</figcaption></figure>'
    small = max(image.size) <= THUMBNAIL
    size = image.size
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    image.save(buffer, "PNG" if small else "JPEG", **({} if small else {"quality": 85}))
    kind = "png" if small else "jpeg"
    encoded = base64.b64encode(buffer.getvalue()).decode()
    picture = f'<img class="{"small" if small else "large"}" alt="{name}" src="data:image/{kind};base64,{encoded}">'
    return f"<figure>{picture}<figcaption>{side}: {size[0]} x {size[1]}</figcaption></figure>"
