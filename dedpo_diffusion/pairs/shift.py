"""Human labels of one population of pairs, merged for another: the density ratio of what is known of both, and what is made with it.

measure_shift   how much each labelled pair counts for the target pairs
teach           DIPO: judges taught with these weights, who then say of target pairs what people would
carry           DDPO where the labelled images are not trained on: their correction on the target pairs
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from dedpo_diffusion.debias import DensityRatio, carry_over, estimate_density_ratio, james_stein
from dedpo_diffusion.labels.adaptation import Adapted, adapt
from dedpo_diffusion.pairs.populations import Known, even_features, odd_differences, odd_groups, shared_generators

PER_DIRECTION = 4  # effective labels for each direction along which a correction is carried over


@dataclass(frozen=True)
class Shift:
    """M pairs of two populations, `labelled` (M,) bool or target, with what is `known` of both and their density `ratio`.

    `columns` are the features that the ratio was fitted to; `left_out` generators that one population alone has.
    """

    known: Known
    labelled: np.ndarray
    prompts: list[str]
    ratio: DensityRatio
    columns: list[str]
    left_out: list[str]

    @property
    def inverse(self) -> np.ndarray:
        """(M,) how many pairs of the M each labelled pair stands for; 1 for target pairs, which stand for themselves."""
        h = np.ones(len(self.labelled))
        h[self.labelled] = self.ratio.inverse_propensity(int((~self.labelled).sum()))
        return h

    @property
    def propensity(self) -> np.ndarray:
        """(M,) its inverse, for `merge_labels`, where that of target pairs counts for nothing."""
        return 1 / self.inverse

    def about(self) -> dict[str, Any]:
        """For the report, ready for JSON."""
        made = asdict(self.ratio)
        made.pop("ratio")
        furthest = self.columns[made.pop("furthest")]
        counts = {"n_labelled": int(self.labelled.sum()), "n_target": int((~self.labelled).sum())}
        made["imbalance"] = dict(zip(("before", "after"), made["imbalance"], strict=True)) | {"furthest": furthest}
        return counts | made | {"columns": self.columns, "left_out": self.left_out}


def measure_shift(known: Known, labelled: np.ndarray, prompts: Sequence[str], *, seed: int) -> Shift:
    """How much each labelled pair counts for the target pairs.

    Args:
        known: of M pairs.
        labelled: (M,) bool; the others are target pairs.
        prompts: (M,), kept together in folds.
        seed: of the folds.

    Raises:
        ValueError: too few pairs, nothing known of both populations, or populations that do not overlap.
    """
    known, left_out = shared_generators(known, labelled)
    columns = even_features(known)
    features = np.column_stack([np.empty((len(labelled), 0)), *columns.values()])  # of no column too, which the estimator refuses
    groups = np.unique(np.asarray(prompts, dtype=object), return_inverse=True)[1]
    ratio = estimate_density_ratio(labelled, features, groups=groups, seed=seed)
    return Shift(known, labelled, list(prompts), ratio, list(columns), left_out)


def teach(shift: Shift, human: np.ndarray, judges: Sequence[str], *, seed: int) -> Adapted:
    """Judges with raw scores of all pairs, taught by the labelled ones with the weights that these have in the target population.

    Args:
        shift: the pairs.
        human: (M,) labels, NaN for target pairs.
        judges: whose scores are taken.
        seed: of folds and draws.

    Raises:
        ValueError: labels that nothing can be learned from, or scores that are missing.
    """
    scores, others = odd_groups(shift.known, judges)
    return adapt(scores, others, human, prompts=shift.prompts, weights=shift.inverse, seed=seed)


@dataclass(frozen=True)
class Carried:
    """Targets (N,) of the target pairs, and along which `directions` what the labelled pairs add was carried over.

    `bias` and `noise`: the squared systematic error of the judge along these, and what chance alone makes of it, as `james_stein` has them.
    """

    target: np.ndarray
    directions: list[str]
    left_out: list[str]
    bias: float | None
    noise: float | None

    def about(self) -> dict[str, Any]:
        """For the report."""
        return {"directions": self.directions, "left_out": self.left_out, "bias": self.bias, "noise": self.noise}


def carry(shift: Shift, human: np.ndarray, judge: np.ndarray, power: np.ndarray) -> Carried:
    """Targets of the target pairs: the judge's by its power, and what the labelled pairs add, along what is known of both populations.

    Along the judge's own direction first, then along scores, image statistics and generators: one for every four effective labels at most.

    Args:
        shift: the M pairs.
        human, judge, power: (M,) labels of people (NaN: none), of the judge, and its power.
    """
    labelled = shift.labelled
    columns, names = odd_differences(shift.known)
    both = np.concatenate([(judge - 0.5)[:, None], columns], axis=1)
    spread = np.sqrt(np.mean(both[~labelled] ** 2, axis=0))
    there = np.flatnonzero(spread > 0)
    used = there[: max(1, int(shift.ratio.effective // PER_DIRECTION))]
    directions, every = both[:, used] / spread[used], ["the judge's label", *names]
    stands = shift.inverse[labelled] - 1
    residual = (human[labelled] - 0.5) - power[labelled] * (judge[labelled] - 0.5)
    moved = carry_over(stands * residual, directions[labelled], directions[~labelled])
    target = 0.5 + power[~labelled] * (judge[~labelled] - 0.5) + moved
    _, bias, noise = james_stein(human[labelled] - judge[labelled], stands, directions[labelled])
    return Carried(target, [every[k] for k in used], [every[k] for k in np.setdiff1d(there, used)], bias, noise)
