"""A judge that people taught, as a scorer of single images.

What `dedpo calibrate --method adapt` learns is linear in the differences of two images' features and has no intercept:

    log-odds(image 0 is preferred) = sum_f weight_f / spread_f (x_f(image 0) - x_f(image 1)) = u(image 0) - u(image 1)

so u(image) = sum_f weight_f / spread_f x_f(image) is a score of one image, in log-odds, up to a constant that no comparison of two
images sees. The features are raw scores of the judges, image statistics and components of the judges' embeddings. A generator's name is a
feature too; images from one model share it, so it is left out here.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dedpo_diffusion.core.console import UserError
from dedpo_diffusion.core.files import file_digest
from dedpo_diffusion.labels.embedding_files import component_axes, has_embeddings
from dedpo_diffusion.labels.files import read_labels
from dedpo_diffusion.labels.image_statistics import image_statistics
from dedpo_diffusion.models.pretrained import DTYPES

if TYPE_CHECKING:
    from PIL.Image import Image

    from dedpo_diffusion.judges.scorers import Scorer

LOGARITHMS = ("pixels", "aspect")  # statistics that are compared on a log scale
COMPONENT = " component "


class AdaptedScore:
    """u(image) of an adapted judge, in log-odds of people's preference.

    Args:
        file: the report that `dedpo calibrate --method adapt` wrote beside its labels.
        judges: the judges' specs, as "clip=MODEL:FILE", where their names alone do not load them.
        device, batch: of the judges; their precision is the one that they labelled with.

    Attributes:
        embeds_as: name of the judge whose embeddings `AdaptedEmbedder` gives.

    Raises:
        UserError: no such report, one of labels that people taught nothing, or a judge that is not the one that labelled.
    """

    name = "adapted"
    temperature = 1.0  # its differences are log-odds
    embeds_as: str | None = None

    def __init__(self, file: Path, judges: Sequence[str] = (), *, device: str | None = None, batch: int = 64) -> None:
        self.file, self.pairs = file, file.parent.parent
        report = _report(file)
        features = [entry for entry in report["features"] if entry["group"] != "generators" and entry["weight"] != 0]
        self.weights = {
            (entry["group"], entry["name"]): entry["weight"] / entry["spread"] for entry in features
        }  # of raw features, not standardised ones
        specs = {spec.partition("=")[0]: spec for spec in judges}
        if strange := sorted(set(specs) - set(report["judges"])):
            raise UserError(f"{file}: it was made from {', '.join(report['judges'])}, not from {strange[0]}; leave that out")
        self.scorers = {name: _judge(self.pairs, name, specs.get(name, name), device, batch) for name in self._needed()}
        self.axes = {
            name: _axes(self.pairs, name, report["seed"])
            for name in self.scorers
            if any(self._component(key, name) for key in self.weights)
        }
        versions = " ".join(scorer.version for scorer in self.scorers.values())
        self.version = f"adapted-{file_digest(file)[:12]} of {versions}"

    def _needed(self) -> list[str]:
        """The judges whose scores or embeddings count."""
        names = [name for group, name in self.weights if group == "scores"]
        names += [name.rpartition(COMPONENT)[0] for group, name in self.weights if group == "embeddings"]
        return list(dict.fromkeys(names))

    @staticmethod
    def _component(key: tuple[str, str], judge: str) -> bool:
        return key[0] == "embeddings" and key[1].rpartition(COMPONENT)[0] == judge

    def score(self, prompts: Sequence[str], images: Sequence[Image]) -> np.ndarray:
        """The utility of each image for its prompt, (N,) float64. Raises as the judges' own."""
        return self._utility(prompts, images)[0]

    def _utility(self, prompts: Sequence[str], images: Sequence[Image]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """(N,) utilities, and the embeddings (N, D) of the judges that gave some."""
        total, seen = np.zeros(len(images)), {}
        for name, scorer in self.scorers.items():
            if name in self.axes or name == self.embeds_as:
                scores, seen[name] = scorer.score_and_embed(prompts, images)  # type: ignore[attr-defined]
            else:
                scores = scorer.score(prompts, images)
            total += self.weights.get(("scores", name), 0.0) * scores
            if name in self.axes:
                for k, values in enumerate((seen[name] @ self.axes[name]).T, 1):
                    total += self.weights.get(("embeddings", f"{name}{COMPONENT}{k}"), 0.0) * values
        if any(group == "statistics" for group, _ in self.weights):
            total += np.array([self._of_statistics(image) for image in images])
        return total, seen

    def _of_statistics(self, image: Image) -> float:
        found = image_statistics(image)
        found |= {name: float(np.log(found[name])) for name in LOGARITHMS}
        return sum(weight * found[name] for (group, name), weight in self.weights.items() if group == "statistics")


class AdaptedEmbedder(AdaptedScore):
    """The same where a judge behind it embeds images: the first such judge's embeddings come with the scores."""

    def __init__(self, made: AdaptedScore, name: str) -> None:
        self.__dict__ |= made.__dict__ | {"embeds_as": name}

    def score_and_embed(self, prompts: Sequence[str], images: Sequence[Image]) -> tuple[np.ndarray, np.ndarray]:
        """As `score`, and embeddings (N, D) float32 of norm 1."""
        total, seen = self._utility(prompts, images)
        return total, seen[str(self.embeds_as)]


def make_adapted(location: str | None, *, device: str | None = None, batch: int = 64, dtype: str = "float32") -> AdaptedScore:
    """The scorer of a location "REPORT" or "REPORT,JUDGE=LOCATION,...".

    Args:
        location: the report, or the pair dataset whose labels/adapt.json is taken; then the judges' own locations.
        device, batch: of the judges.
        dtype: not read; the judges compute in the precision that they labelled in.

    Raises:
        UserError: as `AdaptedScore`.
    """
    from dedpo_diffusion.judges.scorers import Embedder

    first, *judges = (location or "").split(",")
    if not first:
        raise UserError("scorer adapted needs the report of `dedpo calibrate --method adapt`: adapted=PAIRS/labels/adapt.json")
    path = Path(first)
    made = AdaptedScore(path / "labels" / "adapt.json" if path.is_dir() else path, judges, device=device, batch=batch)
    embeds = [name for name, scorer in made.scorers.items() if isinstance(scorer, Embedder)]
    return AdaptedEmbedder(made, embeds[0]) if embeds else made


def _report(file: Path) -> dict[str, Any]:
    """What calibration wrote.

    Raises:
        UserError: nothing that can be scored by.
    """
    try:
        report = json.loads(file.read_text(encoding="utf-8")).get("calibration", {})
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}); `dedpo calibrate PAIRS --method adapt` writes it") from error
    except (ValueError, AttributeError) as error:
        raise UserError(f"{file}: this is no report of `dedpo calibrate` ({error})") from error
    if report.get("method") != "adapt":
        raise UserError(f"{file}: this is no report of `dedpo calibrate --method adapt`")
    if not report["adapted"]:
        name = report["temperature_of"]
        raise UserError(f"{file}: people taught these judges nothing, so its labels are those of {name} alone; give {name} in its place")
    return report


def _judge(pairs: Path, name: str, spec: str, device: str | None, batch: int) -> Scorer:
    """The judge that made the labels of this name, in the precision that it made them in.

    Raises:
        UserError: it cannot be loaded, or is another.
    """
    from dedpo_diffusion.judges.scorers import load_scorer

    labelled = str(read_labels(pairs, name, extras=("judge_version",)).extra["judge_version"][0])
    version = labelled.rpartition(" temperature ")[0] or labelled
    dtype = next((kind for kind in DTYPES if kind != "float32" and version.endswith(f"-{kind}")), "float32")
    scorer = load_scorer(spec, device=device, batch=batch, dtype=dtype)
    if scorer.version != version:
        raise UserError(
            f"{pairs / 'labels' / name}.parquet was made by {version}, and {spec} is {scorer.version}; give adapted=REPORT,{name}=LOCATION "
            "of the judge that labelled"
        )
    return scorer


def _axes(pairs: Path, name: str, seed: int) -> np.ndarray:
    """(D, C) axes of the judge's embedding components, as calibration had them.

    Raises:
        UserError: its embeddings are gone, or are another judge's or dataset's.
    """
    from dedpo_diffusion.pairs.dataset import PairReader

    version = str(read_labels(pairs, name, extras=("judge_version",)).extra["judge_version"][0])
    stamp = {"judge version": version, "dataset": PairReader(pairs).fingerprint()}
    if not has_embeddings(pairs, name, stamp):
        raise UserError(f"{pairs / 'embeddings' / name}: calibration used these embeddings, and they are gone; run `dedpo label` again")
    return component_axes(pairs, name, seed=seed)
