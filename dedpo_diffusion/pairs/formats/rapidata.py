"""Rapidata's image comparisons (data cards Rapidata/...): prompt, image1, image2 and what a crowd voted, in three layouts.

    counts     votes_image1, votes_image2, detailed_results, image1_path, image2_path
               (700k_Human_Preference_Dataset_FLUX_SD3_MJ_DALLE3, 117k_human_..., Flux_SD3_MJ_Dalle_Human_...)
    shares     weighted_results_image1_CRITERION, weighted_results_image2_CRITERION, detailed_results_CRITERION
               for the criteria preference, coherence and alignment (..._t2i_human_preference)
    by name    aggregated_results, detailed_results (open-image-preferences-v1-more-results)

All have model1 and model2. The columns are those of the data cards. The columns of human-style-preferences-images and
its sisters, and what stands inside aggregated_results, were not verified against the published files: votes by name are
read as JSON, and their names must tell the two images apart.

Traps of the format:
* Whole votes become counts; the people are not named. Shares are weighted by how reliable Rapidata holds each person:
  they become one soft answer that weighs as many votes as detailed_results holds.
* A file may judge several criteria. `preference` is taken; another one must be chosen with the format rapidata and
  --columns '{"criterion": "alignment"}'. Files with counts hold one criterion, which only their name tells.
* In the sets with counts, people were asked for their preference without seeing the prompt (others report this of
  arXiv 2409.11904; not verified).
* The sets with counts come as splits train_0001, train_0002 and so on; a folder of these is read as one.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dedpo_diffusion.core.console import UserError
from dedpo_diffusion.pairs.formats.comparison import Answer, Comparison, counted, image_source, number, text
from dedpo_diffusion.pairs.formats.sources import Source, listed, open_source
from dedpo_diffusion.pairs.formats.sources.parquet import ParquetSource
from dedpo_diffusion.settings import IngestSettings

WINNER_FIRST = False
NEEDS = "prompt, image1, image2 and votes_image1, weighted_results_image1_preference, aggregated_results or detailed_results"
OPTIONS = ("criterion",)  # what --columns may say of this format
SIDES = ("image1", "image2")
COUNTS = ("votes_image1", "votes_image2")
BY_NAME = ("aggregated_results", "detailed_results")
PIECE = re.compile(r"train_\d{4}-")
KEPT = ("model1", "model2", "image1_path", "image2_path", "evolution", "category", "subcategory")
REMEDY = "name them votes_image1 and votes_image2, as whole numbers"


def recognise(columns: Collection[str], row: Mapping[str, Any] | None) -> str | None:
    """The columns that tell this format, None where they do not."""
    if not {"prompt", *SIDES} <= set(columns):
        return None
    told = [name for name in (*COUNTS, *BY_NAME) if name in columns] + [_shares(name)[0] for name in criteria(columns)]
    return f"columns prompt, image1, image2, {told[0]}" if told else None


def open(source: str, settings: IngestSettings) -> Source:  # the name that importers share
    """The rows of a source; the pieces train_0001, train_0002, ... of a folder follow each other, unless one is asked for."""
    folder = Path(source)
    files = listed(folder, (".parquet",)) if settings.split is None and folder.is_dir() else []
    if files and all(PIECE.match(file.name) for file in files):
        return ParquetSource(source, files, folder, settings.images or folder)
    return open_source(source, settings)


def criteria(columns: Collection[str]) -> list[str]:
    """The criteria that the shares of a file are named after."""
    start = "weighted_results_image1_"
    found = [name.removeprefix(start) for name in columns if name.startswith(start)]
    return [name for name in found if _shares(name)[1] in columns]


def entries(row: dict[str, Any], where: str, folder: Path | None, settings: IngestSettings) -> Iterator[Comparison]:
    """The one comparison of a row.

    Raises:
        UserError: several criteria and none chosen, votes that cannot be told apart, or counts that are none.
    """
    chosen = _criterion(row, where, settings)
    source: dict[str, Any] = {name: str(row[name]) for name in KEPT if row.get(name) is not None}
    if chosen is not None:
        answers = _soft(row, chosen, where)
        shares = [name for criterion in criteria(row) for name in _shares(criterion) if row[name] is not None]
        source |= {name: row[name] for name in shares} | {"criterion": chosen}
    else:
        answers = _votes(row, where)
    image_0, image_1 = (image_source(row.get(side), folder, f"{where}, {side}") for side in SIDES)
    paths = [str(row[f"{side}_path"]).replace("/", "-") for side in SIDES if row.get(f"{side}_path") is not None]
    key = str(row["id"]) if row.get("id") is not None else "-".join(paths) if len(paths) == 2 else None
    yield Comparison(where, text(row.get("prompt"), f"{where}, prompt"), (image_0, image_1), answers, key=key, source=source)


def _shares(criterion: str) -> tuple[str, str]:
    return f"weighted_results_image1_{criterion}", f"weighted_results_image2_{criterion}"


def _criterion(row: Mapping[str, Any], where: str, settings: IngestSettings) -> str | None:
    """The criterion whose shares are read, None for files whose votes are not named after criteria."""
    unknown = sorted(set(settings.columns) - set(OPTIONS))
    if unknown:
        raise UserError(f"--columns names {', '.join(unknown)}; this format reads only {', '.join(OPTIONS)} from it")
    found, wanted = criteria(row), settings.columns.get("criterion")
    if not found:
        if wanted is not None:
            raise UserError(f"{where}: there is one kind of votes here, and none named after {wanted}; leave criterion out of --columns")
        return None
    if (wanted or "preference") not in found:
        choice = f"""choose with the format rapidata and --columns '{{"criterion": "{found[0]}"}}'"""
        raise UserError(f"{where}: votes on {wanted or 'preference'} are not here, but on {', '.join(found)}; {choice}")
    return wanted or "preference"


def _soft(row: Mapping[str, Any], criterion: str, where: str) -> tuple[Answer, ...]:
    """One answer from weighted shares; none where there are none."""
    names = _shares(criterion)
    first, second = (number(row[name], f"{where}, {name}") for name in names)
    if first is None or second is None:
        return ()
    if min(first, second) < 0 or first + second <= 0:
        raise UserError(f"{where}: {names[0]} is {first} and {names[1]} {second}; both must be 0 or more, and not both 0. Mend the row")
    votes = len(_votes_for(row.get(f"detailed_results_{criterion}"), f"{where}, detailed_results_{criterion}"))
    return (Answer(first / (first + second), votes=max(votes, 1)),)


def _votes(row: Mapping[str, Any], where: str) -> tuple[Answer, ...]:
    """Answers from counts of votes, for the images or by name."""
    if all(row.get(name) is not None for name in COUNTS):
        return counted(*(_whole(row[name], f"{where}, {name}") for name in COUNTS))
    named: Mapping[str, Any]
    if row.get("aggregated_results") is not None:
        named = _parsed(row["aggregated_results"], f"{where}, aggregated_results")
        if not isinstance(named, Mapping):
            raise UserError(f"{where}: aggregated_results must be an object of names and votes; {REMEDY}")
    else:
        named = Counter(_votes_for(row.get("detailed_results"), f"{where}, detailed_results"))
    votes = [0, 0]
    for name, count in named.items():
        votes[_side(name, row, where)] += _whole(count, f"{where}, the votes for {name}")
    return counted(votes[0], votes[1])


def _whole(value: Any, where: str) -> int:
    found = number(value, where)
    if found is None or found < 0 or not found.is_integer():
        raise UserError(f"{where} is {value!r}, and must be a count of votes; mend the row")
    return int(found)


def _parsed(value: Any, where: str) -> Any:
    if not isinstance(value, str | bytes):
        return value
    try:
        return json.loads(value)
    except ValueError as error:
        raise UserError(f"{where} is no JSON ({error}); mend the row") from error


def _votes_for(value: Any, where: str) -> list[str]:
    """What each single vote was for: of a list, of {"votes": list}, or of their JSON."""
    found = _parsed(value, where)
    found = found.get("votes", []) if isinstance(found, Mapping) else found
    if found is None:
        return []
    if not isinstance(found, Sequence) or not all(isinstance(vote, Mapping) and "votedFor" in vote for vote in found):
        raise UserError(f"{where} must be a list of votes with votedFor; mend the row")
    return [str(vote["votedFor"]) for vote in found]


def _side(name: str, row: Mapping[str, Any], where: str) -> int:
    """Which image a vote's name means: by its column, its file, or its model if only one of the models fits."""
    plain = name.lower().replace("_", "")
    told = {side for side in (0, 1) if plain == SIDES[side] or name in _files(row, side)}
    told = told or {side for side in (0, 1) if row.get(f"model{side + 1}") and str(row[f"model{side + 1}"]) in name}
    if len(told) == 1:
        return told.pop()
    models = f"{row.get('model1')} and {row.get('model2')}"
    raise UserError(f"{where}: votes for {name!r} fit neither or both of image1 and image2 (of {models}); {REMEDY}")


def _files(row: Mapping[str, Any], side: int) -> set[str]:
    """Names of an image's file, as votes may give them."""
    image = row.get(SIDES[side])
    held = [row.get(f"{SIDES[side]}_path"), image.get("path") if isinstance(image, Mapping) else image if isinstance(image, str) else None]
    paths = [str(path) for path in held if path is not None]
    return {*paths, *(Path(path).name for path in paths)}
