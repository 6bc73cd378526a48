"""objective.power=measured: the power that is best in this very run, from gradients that are measured before its first step.

In this order:

    ScalableTargets     what a merge left in its targets file, from which its targets are made anew at other powers
    measure_noise       the noise ratio kappa, over all processes
    choose_power        the power for this run and its targets, from both
    power.json          all of it in the run folder, which a resumed run reads instead of measuring again
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from dedpo_diffusion.core.console import Progress, UserError
from dedpo_diffusion.core.files import write_json
from dedpo_diffusion.core.records import Targets
from dedpo_diffusion.debias import Run, best_scale, fit_power, pair_targets, pair_weights, power_cap, run_report, run_sentences, run_terms
from dedpo_diffusion.dpo.gradient_noise import NoiseRatio, draw_moments, noise_ratio
from dedpo_diffusion.dpo.noising import TimestepDraw, draw, step_generator
from dedpo_diffusion.labels.files import read_report, read_targets, targets_path
from dedpo_diffusion.settings import DataSettings, ObjectiveSettings, TrainSettings
from dedpo_diffusion.training.visit_gradients import read_measurement, visit_gradient
from dedpo_diffusion.weights.run_folder import POWER_FILE

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch.distributed import ProcessGroup

    from dedpo_diffusion.dpo.timestep_moments import TimestepMoments
    from dedpo_diffusion.models.backbone import Backbone
    from dedpo_diffusion.training.data import PairLoader

STREAM, CHOICE = 1004, 1006  # of `step_generator`: for the draws and the pairs that are measured
LEAST_PAIRS = 16  # with fewer, the error of the ratio is hardly known
REMEDY = "merge with --method tuned or dedpo, or leave objective.power at fixed"


# ---- targets that can be made anew


@dataclass(frozen=True)
class ScalableTargets:
    """Targets of N pairs at the powers `merged.power` of endless training; all of `merged` is there."""

    merged: Targets

    @property
    def known(self) -> np.ndarray:
        """(N,) bool: pairs that were merged; a fold's targets leave some out."""
        return ~np.isnan(self._column("judge"))

    def _column(self, name: str) -> np.ndarray:
        return np.asarray(getattr(self.merged, name))

    def columns(self) -> tuple[np.ndarray, ...]:
        """Human and judge label, inverse propensity and power of the pairs that were merged, each (n,)."""
        human, judge, inverse, power = (self._column(name)[self.known] for name in ("human", "judge", "inverse", "power"))
        return human, judge, inverse, power

    def at(self, scale: float) -> Targets:
        """The targets that `dedpo merge` makes at `scale` times these powers, to the bit."""
        human, judge, inverse = (self._column(name) for name in ("human", "judge", "inverse"))
        power = scale * self._column("power")
        weight = pair_weights(inverse, power)
        return dataclasses.replace(self.merged, target=pair_targets(human, judge, inverse, weight), weight=weight, power=power)


def open_scalable(settings: TrainSettings) -> ScalableTargets | None:
    """The run's targets at the powers of endless training, if its power is to be measured.

    Targets of method tuned have these powers; where a power was given, or is that of DeDPO as published, one is fitted to their labels.

    Raises:
        UserError: targets that are not made of a power, or whose power another rule chose; the message says how to merge.
    """
    data, objective = settings.data, settings.objective
    if objective.power != "measured":
        return None
    path, merged = targets_path(data.pairs, data.targets), read_targets(data.pairs, data.targets)
    report = _report_of(data)
    _check_merge(path, merged, report)
    found = ScalableTargets(merged)
    human, judge, inverse, power = found.columns()
    _check_powers(path, report, power, merged, found.known)
    if np.isnan(human).all():
        raise UserError(f"{path}: no pair has a human label, so there is no power to choose; label some pairs, and merge again")
    if report["method"] == "tuned" and report.get("power_raw") is not None:
        endless = np.asarray(merged.power) / ((report.get("run") or {}).get("scale") or 1.0)
    else:
        labelled = ~np.isnan(human)
        best, _ = fit_power(human[labelled], judge[labelled], inverse[labelled])
        endless = np.where(found.known, min(best, power_cap(inverse, objective.max_overshoot)), 0.0)
    return ScalableTargets(dataclasses.replace(merged, power=endless))


def _report_of(data: DataSettings) -> dict[str, Any]:
    """The report of a merge."""
    path, found = targets_path(data.pairs, data.targets, ".json"), read_report(data.pairs, data.targets)
    if found is None:
        raise UserError(f"{path}: cannot be read (there is none); objective.power=measured needs this report of the merge; merge again")
    if not isinstance(found.get("method"), str):
        raise UserError(f"{path}: does not say by which method its targets were merged, which objective.power=measured needs; merge again")
    return found


def _check_merge(path: Path, merged: Targets, report: Mapping[str, Any]) -> None:
    """Refuse targets that no power can be set of."""
    method, rule = report["method"], report.get("rule") or "plug_in"
    if method not in ("tuned", "dedpo"):
        raise UserError(
            f"{path}: these targets are of method {method}, and objective.power=measured sets the power of method tuned or dedpo; {REMEDY}"
        )
    if any(getattr(merged, name) is None for name in ("human", "judge", "inverse", "power")):
        raise UserError(f"{path} does not say what its targets were merged from, which objective.power=measured needs; {REMEDY}")
    if rule != "plug_in":
        raise UserError(
            f"{path}: rule {rule} chose the power of these targets, and so does objective.power=measured; "
            "merge without --rule, or leave objective.power at fixed"
        )
    if (report.get("run") or {}).get("scale") == 0:
        raise UserError(
            f"{path}: these targets were merged for a run so short that their power is 0, which tells nothing of other runs; "
            "merge without --visits and --noise_ratio"
        )


def _check_powers(path: Path, report: Mapping[str, Any], power: np.ndarray, merged: Targets, known: np.ndarray) -> None:
    """Refuse a report of other targets, and weights that were changed since."""
    told = report.get("power")
    if not len(power) or not isinstance(told, int | float) or not math.isclose(told, float(power.mean()), rel_tol=1e-6, abs_tol=1e-9):
        raise UserError(f"{path} and {path.with_suffix('.json').name} beside it are not of one merge (their powers differ); merge again")
    plain = pair_weights(np.asarray(merged.inverse)[known], power)
    if not np.allclose(merged.weight[known], plain, rtol=1e-6, atol=1e-12):
        raise UserError(
            f"{path}: its weights are not those of its powers and propensities, which objective.power=measured needs; merge again"
        )


# ---- the noise ratio


def check_measurable(objective: ObjectiveSettings) -> None:
    """Refuse settings that a power cannot be measured with.

    Raises:
        UserError: an objective that the power is not derived for, or too few pairs.
    """
    from dedpo_diffusion.dpo.objectives import find_objective

    if objective.power != "measured":
        return
    kind = find_objective(objective.kind)
    if not (kind.affine and kind.balanced) or "batch" in kind.needs:
        raise UserError(
            f"objective.power=measured is derived for losses of the margin that are affine in the label, which objective.kind="
            f"{objective.kind} is not; take sigmoid, linear, ipo or cdpo, or leave objective.power at fixed"
        )
    if objective.balance == "adadpo":
        raise UserError(
            "objective.power=measured takes a pair's gradients at its two labels to be opposite, which objective.balance=adadpo makes "
            "unequal; take another balance, or leave objective.power at fixed"
        )
    if objective.power_pairs < LEAST_PAIRS:
        raise UserError(f"objective.power_pairs is {objective.power_pairs}; a noise ratio needs at least {LEAST_PAIRS} pairs")
    if objective.power_draws < 2:
        raise UserError(f"objective.power_draws is {objective.power_draws}; a noise ratio compares at least 2 draws of a pair")
    if not objective.max_overshoot >= 1:
        raise UserError(f"objective.max_overshoot is {objective.max_overshoot}; it must be at least 1, where 1 switches the judge off")


def measured_places(settings: TrainSettings, loader: PairLoader) -> list[int]:
    """Which of the visited pairs are measured: objective.power_pairs of them, drawn without replacement, or all there are.

    Raises:
        UserError: too few.
    """
    there, wanted = len(loader.rows), settings.objective.power_pairs
    if there < LEAST_PAIRS:
        raise UserError(
            f"objective.power=measured needs {LEAST_PAIRS} pairs that carry weight, and targets {settings.data.targets!r} have {there}; "
            "leave objective.power at fixed"
        )
    order = torch.randperm(there, generator=step_generator(settings.seed, 0, CHOICE))
    return sorted(order[:wanted].tolist())


def pair_moments(
    settings: TrainSettings,
    model: Backbone,
    loader: PairLoader,
    timesteps: TimestepDraw,
    place: int,
    moments: TimestepMoments | None = None,
) -> tuple[float, float]:
    """`draw_moments` of objective.power_draws visits of a pair, which depend on seed and pair alone: timestep, noise, draw of the VAE,
    view, caption.

    The gradients are those of the run's loss at label 1 and weight 1 and, the policy being the reference, at margin exactly 0; any
    other label scales all alike. It costs so many visits, and twice the memory of the trained parameters in float32 beside a
    visit of one pair (0.3 GB for an adapter of 40 million): gradients are summed as they come, and nothing is kept from one pair
    to the next.
    """
    row = int(loader.rows[place])
    [shape] = loader.source.shapes(np.array([row])).tolist()

    def gradient(number: int) -> list[torch.Tensor]:
        drawn = draw(settings.seed, number, 1, shape, timesteps=timesteps, caption_dropout=settings.data.caption_dropout, stream=STREAM)
        return visit_gradient(settings, model, loader, timesteps, place, number, drawn, moments)[1]

    count = settings.objective.power_draws
    return draw_moments(gradient(number) for number in range(count * row, count * (row + 1)))


def own_moments(
    settings: TrainSettings, model: Backbone, loader: PairLoader, timesteps: TimestepDraw, process: int, processes: int,
    by_timestep: TimestepMoments | None = None,
) -> torch.Tensor:  # fmt: skip
    """`pair_moments` of every measured pair (n, 2) float64, those of the other processes' pairs left at 0."""
    places = measured_places(settings, loader)
    moments = torch.zeros(len(places), 2, dtype=torch.float64)
    mine = range(process, len(places), processes)
    with Progress("measuring gradients", len(mine)) as progress:
        for k in mine:
            moments[k] = torch.tensor(pair_moments(settings, model, loader, timesteps, places[k], by_timestep), dtype=torch.float64)
            progress.advance()
    return moments


def measure_noise(
    settings: TrainSettings, model: Backbone, loader: PairLoader, timesteps: TimestepDraw, accelerator: Accelerator,
    hosts: ProcessGroup | None, by_timestep: TimestepMoments | None = None,
) -> NoiseRatio:  # fmt: skip
    """The noise ratio of the run's visits, by objective.power_draws draws of each of objective.power_pairs pairs.

    Every process takes its share of the pairs, and a pair is measured by itself: whatever their number, the same numbers are
    averaged. The model is asked before anything of it is trained, and before accelerate wraps it or deals out its weights.

    Raises:
        UserError: too few pairs, or gradients that are not finite, or have nothing in common.
    """
    moments = own_moments(settings, model, loader, timesteps, accelerator.process_index, accelerator.num_processes, by_timestep)
    if hosts is not None:
        torch.distributed.all_reduce(moments, group=hosts)
    try:
        return noise_ratio(moments.numpy())
    except ValueError as error:
        raise UserError(
            f"objective.power=measured: {error}. Measure on more pairs (objective.power_pairs) or draws (objective.power_draws), "
            "or leave objective.power at fixed"
        ) from error


# ---- the power


@dataclass(frozen=True)
class MeasuredPower:
    """The power of a run: the noise ratio it was chosen by, the targets at it, and a report ready for JSON."""

    ratio: NoiseRatio
    targets: Targets
    report: dict[str, Any]

    def keep(self, out: Path) -> None:
        """Write it into the run folder."""
        write_json(out / POWER_FILE, {"measured": dataclasses.asdict(self.ratio), **self.report})


def choose_power(found: ScalableTargets, ratio: NoiseRatio, visits: int, seed: int) -> MeasuredPower:
    """The power that is best in a run of so many visits at this noise ratio, as `dedpo merge --visits --noise_ratio` finds it.

    Args:
        found: the targets at the powers of endless training.
        ratio: measured.
        visits: optimizer steps times pairs of a step.
        seed: of the bootstrap of what labels are worth.

    Returns:
        With it, `report`: power, power_ci (its range over the 95 % interval of the noise ratio), and run, see `debias.run_report`.
    """
    human, judge, inverse, endless = found.columns()
    terms, run = run_terms(human, judge, inverse, endless), Run(float(visits), ratio.value)
    scale, mean = best_scale(terms, run), float(endless.mean())
    ends = [mean * best_scale(terms, Run(float(visits), end)) for end in reversed(ratio.interval)]
    report: dict[str, Any] = {"power": float(np.mean(scale * endless)), "power_ci": ends}
    report["run"] = run_report(terms, scale, run, mean, seed)
    report["sentences"] = sentences(ratio, report)
    return MeasuredPower(ratio, found.at(scale), report)


def sentences(ratio: NoiseRatio, report: dict[str, Any]) -> list[str]:
    """What was measured, and what follows for this run."""
    low, high = ratio.interval
    texts = [
        f"The noise ratio is {ratio.value:.3g} (standard error {ratio.standard_error:.2g}): the squared gradient of one visit is so many "
        f"times that of its pair, timesteps and noise averaged out. It was measured on {ratio.pairs} pairs."
    ]
    if not ratio.sure:
        texts.append(
            f"Warning: {ratio.pairs} pairs hardly tell the pairs' gradients from noise, so this ratio may be far off; "
            "more pairs (objective.power_pairs) or draws of each (objective.power_draws) would tell more."
        )
    run, (least, most) = report["run"], report["power_ci"]
    texts.append(
        f"The power used in this run is {report['power']:.2f}; endless training would take {run['endless_power']:.2f}. "
        f"At noise ratios of {low:.3g} to {high:.3g} (95 %) it would lie between {least:.2f} and {most:.2f}."
    )
    texts += run_sentences({**report, "run": {**run, "scale": 1.0}})  # the powers are told already
    if report["power"] == 0:
        texts.append("At power 0 the judge's labels are not used in this run: it trains on the human labels alone.")
    return texts


def read_noise(out: Path) -> NoiseRatio | None:
    """The noise ratio that a run folder keeps, None where it keeps none.

    Raises:
        UserError: the file is damaged.
    """
    return read_measurement(out / POWER_FILE, _noise)


def _noise(kept: dict[str, Any]) -> NoiseRatio:
    found = NoiseRatio(**kept["measured"])
    if not (found.value >= 1 and math.isfinite(found.value)):
        raise ValueError(f"a noise ratio of {found.value}")
    return found


def measured_power(
    settings: TrainSettings, found: ScalableTargets, model: Backbone, loader: PairLoader, timesteps: TimestepDraw, accelerator: Accelerator,
    hosts: ProcessGroup | None, by_timestep: TimestepMoments | None = None,
) -> MeasuredPower:  # fmt: skip
    """The power of this run, read from its folder or measured now; the loader then has its targets.

    Raises:
        UserError: as `read_noise` and `measure_noise`.
    """
    from accelerate.utils import broadcast_object_list

    # the main process reads, for the others may not see the folder
    [ratio] = broadcast_object_list([read_noise(settings.out) if accelerator.is_main_process else None])
    if ratio is None:
        ratio = measure_noise(settings, model, loader, timesteps, accelerator, hosts, by_timestep)
    made = choose_power(found, ratio, settings.optim.steps * loader.together, settings.seed)
    loader.retarget(made.targets)
    return made
