"""HPDv2 (arXiv 2306.09341, data card ymhao/HPDv2): two JSON lists beside two folders of images.

    train.json    prompt, file_path [2], human_preference [2]: 1 for the preferred image
    test.json     prompt, image_path [N], rank [N], raw_annotations [people] of {rank [N], user_hash}
    train, test   the images; the lists hold bare names (00012345.jpg), train/00012345.jpg is read too

A row of the test list makes N(N-1)/2 pairs, each with one answer a person; without raw_annotations (older copies) `rank`
is the one answer. The layout is that of the data card and of the README of github.com/tgxs002/HPSv2.

Traps of the format:
* Rank 1 is the best: `evaluate_rank` in that repository compares it with positions by falling score. Equal ranks are ties.
* `rank` is an average over people, raw_annotations are the people. What one of them looks like inside was not verified
  against the published files; some readers call its list `annotation`. So where `rank` is there too, both must agree.
* Some copies of train.json call the paths image_path. Two equal entries of human_preference are read as a tie; whether
  the published list has any was not verified.
* The download holds train.tar.gz and test.tar.gz: unpack them. Its folder may be given as it is, with --split.
* Other users found four images of the training set damaged (00006811, 00168743, 00310087, 00331911): --unreadable skip.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from itertools import combinations
from pathlib import Path
from typing import Any

from dedpo_diffusion.core.console import UserError
from dedpo_diffusion.pairs.formats.comparison import Answer, Comparison, ImageSource, better, image_source, is_folder, is_list, number, text
from dedpo_diffusion.pairs.formats.sources import Source, open_file, open_source, split_file
from dedpo_diffusion.settings import IngestSettings

WINNER_FIRST = False
NEEDS = "prompt and file_path with human_preference, or prompt and image_path with rank"
OWN = (("human_preference",), ("raw_annotations",))
READ = ()
SPLITS = ("train", "test")
PATHS = ("file_path", "image_path")
ONE_PERSON = ("rank", "annotation")  # names of a person's ranking
Ranking = tuple[str | None, list[float]]  # the person, and a rank for each image


def recognise(columns: Collection[str], row: Mapping[str, Any] | None) -> str | None:
    """The columns that tell this format, None where they do not."""
    names = set(columns)
    paths = next((name for name in PATHS if name in names and (row is None or is_list(row.get(name)))), None)
    if paths is None or "prompt" not in names:
        return None
    if "human_preference" in names:
        return f"columns prompt, {paths}, human_preference"
    return f"columns prompt, {paths}, rank" if "rank" in names and "prompt_id" not in names else None


def open(source: str, settings: IngestSettings) -> Source:  # the name that importers share
    """The rows of a download's folder, or of anything else that holds such rows.

    Raises:
        UserError: two lists and no split, a split that is not there, or images that are still packed.
    """
    folder = Path(source)
    lists = {split: folder / f"{split}.json" for split in SPLITS if (folder / f"{split}.json").is_file()}
    packed = {split: folder / f"{split}.tar.gz" for split in lists if (folder / f"{split}.tar.gz").is_file()}
    if not packed and not any((folder / split).is_dir() for split in lists):
        return open_source(source, settings)
    split, file = split_file(lists, settings.split, folder)
    if split in packed and settings.images is None and not (folder / split).is_dir():
        raise UserError(f"the images of {file} are still packed in {packed[split]}; unpack it there with tar -xzf")
    return open_file(file, settings.images or folder, path=source)


def entries(row: dict[str, Any], where: str, folder: Path | None, settings: IngestSettings) -> Iterator[Comparison]:
    """One comparison of a train row, one for each two images of a test row.

    Raises:
        UserError: a list is missing or of the wrong length, or the people contradict their own average.
    """
    prompt = text(row.get("prompt"), f"{where}, prompt")
    column = next((name for name in PATHS if row.get(name) is not None), PATHS[0])
    paths = [text(path, f"{where}, {column} {k}") for k, path in enumerate(_listed(row, column, where))]
    train = bool(row.get("human_preference"))
    images = [_image(path, folder, "train" if train else "test", f"{where}, {column} {k}") for k, path in enumerate(paths)]
    average = None if train or row.get("rank") is None else _ranks(row["rank"], len(paths), f"{where}, rank")
    rankings = [_train_ranking(row, len(paths), where)] if train else _people(row, average, len(paths), where)
    for i, j in combinations(range(len(paths)), 2):
        yield Comparison(
            where,
            prompt,
            (images[i], images[j]),
            tuple(Answer(better(ranks[i], ranks[j]), rater) for rater, ranks in rankings),
            key=f"{Path(paths[i]).stem}-{Path(paths[j]).stem}",
            source={} if average is None else {"rank_0": average[i], "rank_1": average[j]},
        )


def _listed(row: Mapping[str, Any], column: str, where: str) -> list[Any]:
    value = row.get(column)
    if not is_list(value) or len(value) < 2:
        raise UserError(f"{where}: {column} is {value!r}, and must be a list of two images or more; mend the row or remove it")
    return list(value)


def _ranks(value: Any, count: int, where: str) -> list[float]:
    found = [number(item, f"{where} {k}") for k, item in enumerate(value)] if is_list(value) else []
    ranks = [rank for rank in found if rank is not None]
    if len(ranks) != count or len(found) != count:
        raise UserError(f"{where} is {value!r}, and must have a number for each of the {count} images; mend the row or remove it")
    return ranks


def _train_ranking(row: Mapping[str, Any], count: int, where: str) -> Ranking:
    preferred = _ranks(row["human_preference"], count, f"{where}, human_preference")
    if count != 2 or not set(preferred) <= {0.0, 1.0}:
        shown = f"{where}: human_preference is {row['human_preference']!r} for {count} images"
        raise UserError(f"{shown}, and must be 1 for the preferred of two and 0 for the other; mend the row or remove it")
    return None, [-one for one in preferred]


def _people(row: Mapping[str, Any], average: list[float] | None, count: int, where: str) -> list[Ranking]:
    """Each person's ranking; their average where the file has no people; none where it has neither."""
    people = [_person(one, count, f"{where}, raw_annotations {k}") for k, one in enumerate(row.get("raw_annotations") or [])]
    if people and average is not None:
        _check_average(average, people, where)
    return people or ([] if average is None else [(None, average)])


def _person(one: Any, count: int, where: str) -> Ranking:
    ranks = next((one[name] for name in ONE_PERSON if one.get(name) is not None), None) if isinstance(one, Mapping) else None
    if ranks is None:
        raise UserError(f"{where} is {one!r}, and must hold user_hash and {' or '.join(ONE_PERSON)}; mend it, or remove raw_annotations")
    return (None if one.get("user_hash") is None else str(one["user_hash"])), _ranks(ranks, count, where)


def _check_average(average: list[float], people: list[Ranking], where: str) -> None:
    """Ranks that mean something else than `rank` (an order of images, the worst first) would turn labels around."""
    means = [sum(ranks[k] for _, ranks in people) / len(people) for k in range(len(average))]
    signs = [(average[i] - average[j]) * (means[i] - means[j]) for i, j in combinations(range(len(average)), 2)]
    if sum(sign < 0 for sign in signs) > sum(sign > 0 for sign in signs):
        raise UserError(
            f"{where}: the rankings in raw_annotations contradict their own average, rank, on most pairs of images, so they mean "
            "something else; remove raw_annotations to import the averages"
        )


def _image(path: str, folder: Path | None, split: str, where: str) -> ImageSource:
    """A bare name, or one below its split's folder; `folder` is the one around the splits, or the split's own."""
    if folder is not None and not Path(path).is_absolute():
        path = path.removeprefix(f"{split}/")
        folder = folder / split if is_folder(folder / split) else folder
    return image_source(path, folder, where)
