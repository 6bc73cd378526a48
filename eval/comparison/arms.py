"""Scored sample folders as arms of a comparison: loaded, checked, and brought into one order.

| folders | rule |
|---|---|
| the same prompts and seeds, in another order of rows or of the prompt file | paired by (prompt, seed); told in the notes |
| a (prompt, seed) that one folder lacks | refused |
| a (prompt, seed) that one folder has twice, an image that is missing, and what else `samples` says | refused |
| an image without a score of a scorer that the folder was scored with | refused |
| scores of two versions of a scorer between folders | refused; in one folder they do not count (`score.read_scores`) |
| a scorer that not all folders hold | left out; told in the notes |
| an image of another size than the base's of the same prompt and seed | refused |
| images of several sizes, the same in all folders | told in the notes |
| a folder of strengths of a LoRA (`dedpo sample --strength 0.5 1 2`) | stands for all of them; as the base it is refused |

The clusters of all statistics are the prompts by their text: a text that a prompt file holds twice is one prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dedpo_diffusion.core.console import UserError
from dedpo_diffusion.evaluation.comparison.samples import Row

if TYPE_CHECKING:
    import numpy as np

Key = tuple[str, int]  # prompt, seed
SAME = "sample both with the same prompts and seeds"
TAKEN = ("people", "by_scorer", "gain_over_base", "win_rate_vs_base", "categories", "spread", "warnings")  # of an arm in results.json


@dataclass(frozen=True)
class Arm:
    """One sample folder.

    Attributes:
        name: the folder's.
        folder: where it lies.
        rows: N rows of the index, each with file, prompt, prompt_index, seed and category (None where it has none); row i has the
            same prompt and seed in every arm of a comparison.
        scores, versions: by scorer; scores (N,).
        keys: (prompt, seed) in the order of the index, which may be another one than that of `rows`.
    """

    name: str
    folder: Path
    rows: list[Row]
    scores: dict[str, np.ndarray]
    versions: dict[str, str]
    keys: list[Key]

    @property
    def prompts(self) -> np.ndarray:
        """(N,) a number for each row's prompt, in the order of the texts, so that no order of rows changes a resample: the clusters."""
        import numpy as np

        number = {prompt: k for k, prompt in enumerate(sorted({row["prompt"] for row in self.rows}))}
        return np.array([number[row["prompt"]] for row in self.rows])


def counted(count: int, word: str) -> str:
    """ "1 pair", "2 pairs"."""
    return f"{count} {word}" if count == 1 else f"{count} {word}s"


def key(row: Row) -> Key:
    """What images are paired by."""
    return row["prompt"], row["seed"]


def load_arm(folder: Path) -> Arm:
    """A scored sample folder, its rows by prompt_index and seed.

    Raises:
        UserError: see this module's table.
    """
    from dedpo_diffusion.evaluation.comparison.samples import read_index

    listed = read_index(folder)
    rows = sorted(listed, key=lambda row: (row["prompt_index"], row["seed"]))
    scores, versions = _scores(folder, rows)
    return Arm(arm_name(folder), folder, rows, scores, versions, [key(row) for row in listed])


def arm_name(folder: Path) -> str:
    """The folder's name; of a strength of a LoRA that `dedpo sample` put there, the name of the folder around it too.

    tuned/strength-2 is called "tuned/strength-2", and tuned/strength-1 just "tuned": the LoRA as it was trained.

    Raises:
        UserError: a settings.yaml that holds no settings.
    """
    from dedpo_diffusion.sampling.strength_folders import folder_strength

    place = folder.resolve()
    strength = folder_strength(place)
    if strength is None or sampling_settings(place).get("strength") != [strength]:
        return place.name
    return place.parent.name if strength == 1 else f"{place.parent.name}/{place.name}"


def sampling_settings(folder: Path) -> dict[str, Any]:
    """The settings that a folder was sampled with; {} where nothing tells them.

    Raises:
        UserError: a settings.yaml that holds no settings.
    """
    import yaml

    file, remedy = folder / "settings.yaml", "restore it, or remove it, and nothing is said of how the images were sampled"
    if not file.is_file():
        return {}
    try:
        found = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read as YAML ({' '.join(str(error).split())}); {remedy}") from error
    if not isinstance(found, dict):
        raise UserError(f"{file} holds no settings; {remedy}")
    return found


def _scores(folder: Path, rows: Sequence[Row]) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The folder's scores by scorer, (N,) in the order of the rows, and the scorers' versions."""
    import numpy as np

    from dedpo_diffusion.evaluation.score import read_scores

    by_scorer: dict[str, dict[str, Row]] = {}
    for row in read_scores(folder, rows):
        by_scorer.setdefault(row["scorer"], {})[row["file"]] = row
    if not by_scorer:
        raise UserError(f"{folder} holds no scores; run `dedpo score {folder} --with ...`")
    scores, versions = {}, {}
    for scorer, found in by_scorer.items():
        missing = [row["file"] for row in rows if row["file"] not in found]
        if missing:
            lacks = f"{len(missing)} of {len(rows)} images have no score of {scorer} (first: {missing[0]})"
            raise UserError(f"{folder}: {lacks}; run `dedpo score {folder} --with {scorer}=...`, with the same weights as before")
        scores[scorer] = np.array([found[row["file"]]["score"] for row in rows])
        versions[scorer] = next(iter(found.values()))["version"]
    return scores, versions


def paired(base: Arm, arm: Arm) -> Arm:
    """The arm with its rows in the order of the base's.

    Raises:
        UserError: the arms do not share every prompt and seed; the first difference is named.
    """
    import numpy as np

    place = {key(row): number for number, row in enumerate(arm.rows)}
    missing = [row for row in base.rows if key(row) not in place]
    if missing or len(arm.rows) != len(base.rows):
        shared = {key(row) for row in base.rows}
        extra = [row for row in arm.rows if key(row) not in shared]
        here, there, row = ("no", f"which is {missing[0]['file']} there", missing[0]) if missing else ("an", "which is not there", extra[0])
        counts = (
            f"{len(missing)} of the {len(base.rows)} images there have no partner here, {len(extra)} of {len(arm.rows)} here none there"
        )
        what = f"it has {here} image of prompt {row['prompt']!r} with seed {row['seed']}, {there} ({counts})"
        raise UserError(f"{arm.folder} is not paired with {base.folder}: {what}; {SAME}")
    order = [place[key(row)] for row in base.rows]
    scores = {scorer: values[np.array(order)] for scorer, values in arm.scores.items()}
    return replace(arm, rows=[arm.rows[number] for number in order], scores=scores)


def shared_scorers(arms: Sequence[Arm]) -> list[str]:
    """The scorers that all arms hold, in the order of the base.

    Raises:
        UserError: there is none, or an arm holds another version.
    """
    shared = [scorer for scorer in arms[0].scores if all(scorer in arm.scores for arm in arms)]
    if not shared:
        held = "; ".join(f"{arm.name}: {', '.join(arm.scores)}" for arm in arms)
        raise UserError(f"the folders share no scorer ({held}); run `dedpo score` on each with the same scorer")
    for scorer in shared:
        for arm in arms[1:]:
            mine, base = arm.versions[scorer], arms[0].versions[scorer]
            if mine != base:
                remedy = f"score both folders with the same {scorer}"
                raise UserError(f"{arm.folder} was scored with {mine}, {arms[0].folder} with {base}: such scores do not compare; {remedy}")
    return shared


def image_sizes(arm: Arm) -> list[tuple[int, int]]:
    """Width and height of every image, by its header.

    Raises:
        UserError: a file that is no image.
    """
    from dedpo_diffusion.evaluation.comparison.samples import REMEDY
    from dedpo_diffusion.pairs.decoding import read_header

    paths = [arm.folder / row["file"] for row in arm.rows]
    headers = [read_header(path, str(path), remedy=REMEDY) for path in paths]
    return [(header.width, header.height) for header in headers]


def check_sizes(arms: Sequence[Arm]) -> list[str]:
    """What there is to tell of images of several sizes.

    Raises:
        UserError: an image of another size than the base's of the same prompt and seed.
    """
    base, sizes = arms[0], image_sizes(arms[0])
    for arm in arms[1:]:
        for row, there, mine, size in zip(arm.rows, base.rows, image_sizes(arm), sizes, strict=True):
            if mine != size:
                what = f"{arm.folder / row['file']} is {_by(mine)} pixels, {base.folder / there['file']} {_by(size)}"
                raise UserError(f"{what}: images of two sizes do not compare; sample both folders with the same size")
    kinds = sorted(set(sizes))
    return [f"The images are of {len(kinds)} sizes: {', '.join(map(_by, kinds))}; each pair has one."] if len(kinds) > 1 else []


def _by(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]}"


def load_arms(folders: Sequence[Path]) -> tuple[list[Arm], list[str]]:
    """All arms in the order of the first, which is the base; and what there is to tell of how they were brought together.

    Raises:
        UserError: see this module's table.
    """
    from dedpo_diffusion.sampling.strength_folders import expanded

    if folders and expanded(folders[:1]) != list(folders[:1]):
        raise UserError(
            f"{folders[0]} holds several strengths of a LoRA, and the first folder is the base, which is one; give the base first"
        )
    folders = expanded(folders)
    if len(folders) < 2:
        raise UserError("comparing takes two folders or more: the base first, then the others")
    loaded = [load_arm(folder) for folder in folders]
    names = [arm.name for arm in loaded]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"two folders are named {name!r}, and folders name the arms; rename one")
    for arm in loaded:
        for scorer in arm.scores:
            if scorer in TAKEN:
                what = "stands for people's votes here" if scorer == "people" else "is an entry of results.json"
                raise UserError(f"{arm.folder} holds scores of a scorer named {scorer!r}, which {what}; rename that scorer")
    base = loaded[0]
    arms = [base, *(paired(base, arm) for arm in loaded[1:])]
    texts, entries = len({row["prompt"] for row in base.rows}), len({row["prompt_index"] for row in base.rows})
    if texts < 2:
        raise UserError(f"{base.folder} has images of one prompt only, which says nothing about other prompts; sample two prompts or more")
    notes = [
        f"{arm.name} lists its images in another order than {base.name}; they are paired by prompt and seed."
        for arm in arms[1:] if arm.keys != base.keys
    ]  # fmt: skip
    if texts < entries:
        notes.append(f"Of {entries} prompts {texts} differ; equal ones count as one prompt.")
    for scorer in dict.fromkeys(scorer for arm in arms for scorer in arm.scores if any(scorer not in other.scores for other in arms)):
        lacking = [arm.name for arm in arms if scorer not in arm.scores]
        notes.append(f"{scorer} is left out: {' and '.join(lacking)} {'has' if len(lacking) == 1 else 'have'} no scores of it.")
    return arms, notes + check_sizes(arms)


def categories(arms: Sequence[Arm]) -> tuple[list[str | None], list[str]]:
    """The category of each row, by the first folder that has categories; and what there is to tell of folders that say otherwise."""
    told = next((arm for arm in arms if any(row["category"] is not None for row in arm.rows)), arms[0])
    found, notes = [row["category"] for row in told.rows], []
    for arm in arms:
        there = [(row["category"], name) for row, name in zip(arm.rows, found, strict=True) if row["category"] is not None]
        others, alone = sum(mine != name is not None for mine, name in there), sum(name is None for _, name in there)
        if others:
            which = f"{counted(others, 'image')} of {arm.name} {'is' if others == 1 else 'are'}"
            notes.append(f"{which} of another category there than in {told.name}, whose categories count.")
        if alone:
            which = f"{counted(alone, 'image')} of {arm.name} {'has' if alone == 1 else 'have'} a category there and none"
            notes.append(f"{which} in {told.name}, whose categories count.")
    return found, notes
