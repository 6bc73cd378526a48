"""Rapidata's image comparisons (data cards Rapidata/...): prompt, image1, image2 and what a crowd voted, in two layouts.

    counts     votes_image1, votes_image2, detailed_results, image1_path, image2_path
               (700k_Human_Preference_Dataset_FLUX_SD3_MJ_DALLE3, 117k_human_..., Flux_SD3_MJ_Dalle_Human_...)
    shares     weighted_results_image1_CRITERION, weighted_results_image2_CRITERION, detailed_results_CRITERION
               for the criteria preference, coherence and alignment (..._t2i_human_preference)

Both have model1 and model2. The columns are those of the data cards. A set whose votes are told by name alone
(aggregated_results, as open-image-preferences-v1-more-results) is not read: count them into votes_image1 and votes_image2 first.

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
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from dedpo_diffusion.core.console import UserError
from dedpo_diffusion.pairs.formats.comparison import Answer, Comparison, counted, image_source, is_list, number, text
from dedpo_diffusion.pairs.formats.sources import Source, listed, open_source
from dedpo_diffusion.pairs.formats.sources.parquet import ParquetSource
from dedpo_diffusion.settings import IngestSettings

WINNER_FIRST = False
NEEDS = "prompt, image1, image2, and votes_image1 and votes_image2 (whole numbers) or weighted_results_image1_preference"
OWN = (("votes_image1", "votes_image2"), ("detailed_results",), ("detailed_results_preference",), ("weighted_results_image1_preference",))
READ = ()
OPTIONS = ("criterion",)  # what --columns may say of this format
SIDES = ("image1", "image2")
COUNTS = ("votes_image1", "votes_image2")
PIECE = re.compile(r"train_\d{4}-")
KEPT = ("model1", "model2", "image1_path", "image2_path", "evolution", "category", "subcategory")


def recognise(columns: Collection[str], row: Mapping[str, Any] | None) -> str | None:
    """The columns that tell this format, None where they do not."""
    if not {"prompt", *SIDES} <= set(columns):
        return None
    told = [name for name in COUNTS if set(COUNTS) <= set(columns)] + [_shares(name)[0] for name in criteria(columns)]
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
        UserError: several criteria and none chosen, or counts that are none.
    """
    chosen = _criterion(row, where, settings)
    source: dict[str, Any] = {name: str(row[name]) for name in KEPT if row.get(name) is not None}
    if chosen is not None:
        answers = _soft(row, chosen, where)
        shares = [name for criterion in criteria(row) for name in _shares(criterion) if row[name] is not None]
        source |= {name: row[name] for name in shares} | {"criterion": chosen}
    else:
        answers = counted(*(_whole(row.get(name), f"{where}, {name}") for name in COUNTS))
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
    votes = _vote_count(row.get(f"detailed_results_{criterion}"), f"{where}, detailed_results_{criterion}")
    return (Answer(first / (first + second), votes=max(votes, 1)),)


def _whole(value: Any, where: str) -> int:
    found = number(value, where)
    if found is None or found < 0 or not found.is_integer():
        raise UserError(f"{where} is {value!r}, and must be a count of votes; mend the row")
    return int(found)


def _vote_count(value: Any, where: str) -> int:
    """How many single votes there are: in a list, in {"votes": list}, or in their JSON."""
    try:
        found = json.loads(value) if isinstance(value, str | bytes) else value
    except ValueError as error:
        raise UserError(f"{where} is no JSON ({error}); mend the row") from error
    found = found.get("votes") if isinstance(found, Mapping) else found
    if found is None:
        return 0
    if not is_list(found):
        raise UserError(f"{where} must be a list of votes; mend the row")
    return len(found)
