"""What is merged: the labels of people and judges of all pairs, and what else is known of each pair."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dedpo_diffusion.core.console import UserError, say
from dedpo_diffusion.settings import MergeSettings

if TYPE_CHECKING:
    import numpy as np


def named_judges(settings: MergeSettings) -> list[str]:
    """The judges that --judge or --judges names, checked; none where neither is given."""
    named = [name.strip() for text in settings.judges for name in text.split(",") if name.strip()]
    if named and settings.judge is not None:
        raise UserError("--judge names one judge, --judges several; give one of them")
    named = named or ([] if settings.judge is None else [settings.judge])
    if settings.human in named:
        raise UserError(f"--judge and --human both name {settings.human!r}; name two label files")
    if len(set(named)) < len(named):
        raise UserError(f"--judges names one of {', '.join(named)} twice; name each once")
    return named


def choose_judges(settings: MergeSettings) -> list[str]:
    """The judges' label files: those named, or the only one that is not human; none only for human_only."""
    from dedpo_diffusion.labels.files import label_names

    if named := named_judges(settings):
        return named
    judges = [name for name in label_names(settings.pairs) if name != settings.human]
    if len(judges) == 1:
        return judges
    if settings.method == "human_only":
        return []
    folder = settings.pairs / "labels"
    if judges:
        raise UserError(f"{folder} holds several judges ({', '.join(judges)}); name one with --judge, or several with --judges")
    raise UserError(f"{folder} holds no judge labels, which method {settings.method} needs; run `dedpo label`, or use --method human_only")


def read_judge(settings: MergeSettings, ids: list[str], judge: str) -> np.ndarray:
    """(N,) labels of the judge, NaN where it has none.

    Raises:
        UserError: pairs without its answer, unless they count as undecided or the method does not need them.
    """
    import numpy as np

    from dedpo_diffusion.labels.files import align, read_labels

    labels = align(read_labels(settings.pairs, judge, extras=()), ids, folder=settings.pairs, name=judge)
    missing = np.flatnonzero(np.isnan(labels))
    if missing.size and settings.missing == "error" and settings.method != "human_only":
        raise UserError(
            f"{settings.pairs / 'labels' / judge}.parquet covers {len(ids) - missing.size} of {len(ids)} pairs "
            f"(first missing: {ids[missing[0]]!r}); run `dedpo label` again, or let the judge count as undecided there with --missing tie"
        )
    return labels


def read_human(settings: MergeSettings, ids: list[str]) -> tuple[np.ndarray, np.ndarray | None]:
    """(N,) human labels, NaN where there is none, and (N,) stored probability of being labelled, None if none is to be used.

    Naive merging can do without the usual file, and has no use for propensities.
    """
    import numpy as np

    from dedpo_diffusion.labels.files import align, label_names, read_labels, row_of

    if settings.method == "naive" and settings.human == "human" and "human" not in label_names(settings.pairs):
        return np.full(len(ids), np.nan), None
    labels = read_labels(settings.pairs, settings.human, extras=("propensity",))
    human = align(labels, ids, folder=settings.pairs, name=settings.human)
    if settings.method == "naive" or "propensity" not in labels.extra:
        return human, None
    if settings.propensities != "stored":
        say(f"{settings.human}: the stored propensities are not used, as --propensities {settings.propensities} asks for")
        return human, None
    propensity = np.ones(len(ids))  # an unlabelled pair's own counts for nothing
    propensity[row_of(labels.pair_id, ids)] = labels.extra["propensity"]
    return human, propensity


def read_clusters(folder: Path, name: str, ids: list[str]) -> np.ndarray | None:
    """(N,) the cluster of each label of a file, -1 where there is none; None where its labels do not depend on each other."""
    import numpy as np

    from dedpo_diffusion.labels.files import label_names, read_labels, row_of

    labels = read_labels(folder, name, extras=("cluster",)) if name in label_names(folder) else None
    if labels is None or "cluster" not in labels.extra:
        return None
    number: dict[Any, int] = {}
    clusters = np.full(len(ids), -1)
    clusters[row_of(labels.pair_id, ids)] = [number.setdefault(cluster, len(number)) for cluster in labels.extra["cluster"]]
    return clusters


@dataclass(frozen=True)
class Answers:
    """The labels of N pairs, NaN where there is none, and what else is known of the pairs.

    `human` (N,); `judges` (N, K) of the K judges in `names`; `propensity` (N,) of a human label, None for labels taken at random;
    `sources` each (N,): the source columns, but for those of texts with `too_many` values.
    `features` (N, F): differences of what is known of the images before training. `clusters` (N,): of human labels that depend on each
    other, -1 where there is none; None where they do not.
    """

    human: np.ndarray
    judges: np.ndarray | None
    names: list[str]
    propensity: np.ndarray | None
    sources: dict[str, np.ndarray]
    too_many: list[str]
    features: np.ndarray | None = None
    clusters: np.ndarray | None = None

    def part(self, rows: np.ndarray) -> Answers:
        """Those of some pairs."""
        if rows.all():
            return self
        arrays: dict[str, Any] = {name: getattr(self, name) for name in ("human", "judges", "propensity", "features", "clusters")}
        chosen: dict[str, Any] = {name: None if values is None else values[rows] for name, values in arrays.items()}
        return dataclasses.replace(self, sources={name: values[rows] for name, values in self.sources.items()}, **chosen)

    def judged(self) -> np.ndarray | None:
        """(N, K) the judges' labels, 0.5 where one has no answer."""
        import numpy as np

        return None if self.judges is None else np.where(np.isnan(self.judges), 0.5, self.judges)
