"""What a training run works with: settings checked, model loaded, pairs encoded, targets read."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dedpo_diffusion.core.console import UserError, say
from dedpo_diffusion.settings import LoraSettings, ObjectiveSettings, TrainSettings

LOOKED_AT = 500  # pairs whose files are opened, where there is no cache, to count images that a square crops

if TYPE_CHECKING:
    import numpy as np
    from accelerate import Accelerator
    from accelerate.optimizer import AcceleratedOptimizer
    from torch.distributed import ProcessGroup

    from dedpo_diffusion.dpo.adaptive_power import AdaptivePower
    from dedpo_diffusion.dpo.noising import TimestepDraw
    from dedpo_diffusion.dpo.timestep_moments import TimestepMoments
    from dedpo_diffusion.models.backbone import Backbone
    from dedpo_diffusion.pairs.dataset import PairReader
    from dedpo_diffusion.training.data import PairLoader
    from dedpo_diffusion.training.measured_power import MeasuredPower, ScalableTargets
    from dedpo_diffusion.training.optimizers import Average
    from dedpo_diffusion.training.reference_grid import ReferenceGrid
    from dedpo_diffusion.training.rollouts import Rollouts
    from dedpo_diffusion.training.sources import Source
    from dedpo_diffusion.training.trackers import Trackers
    from dedpo_diffusion.training.validation import Validation


@dataclass(frozen=True)
class Session:
    """What a run works with; `average`, `adaptive`, `validation`, `measured` and `moments` are None where they were not asked for.

    It learns from the pairs of `loader` or from the images of `rollouts`; the other one is None. `hosts` is a group of the processes that
    talk without their devices, None for a single process.
    """

    settings: TrainSettings
    accelerator: Accelerator
    model: Backbone
    loader: PairLoader | None
    timesteps: TimestepDraw
    optimizer: AcceleratedOptimizer
    average: Average | None
    adaptive: AdaptivePower | None
    validation: Validation | None
    hosts: ProcessGroup | None
    trackers: Trackers
    measured: MeasuredPower | None = None
    moments: TimestepMoments | None = None
    rollouts: Rollouts | None = None


def set_up(settings: TrainSettings) -> Session:
    """Everything a run needs, and its folder claimed.

    Raises:
        UserError: settings, data or model that cannot be used; nothing is written before that.
    """
    import torch

    from dedpo_diffusion.training.measured_power import measured_power, open_scalable
    from dedpo_diffusion.training.measured_timesteps import keep_measured, timestep_moments
    from dedpo_diffusion.training.optimizers import Average, build_optimizer
    from dedpo_diffusion.training.policy import is_policy, prepare_rollouts
    from dedpo_diffusion.training.sharding import build_accelerator, hand_over
    from dedpo_diffusion.training.sharpness import sharpen
    from dedpo_diffusion.training.trackers import Trackers
    from dedpo_diffusion.weights.run_folder import open_run

    check_options(settings)
    settings = settings if is_policy(settings) else with_targets(settings)
    optim, sharpened = settings.optim, settings
    scalable = None if is_policy(settings) else open_scalable(settings)
    accelerator = build_accelerator(settings)
    loader = rollouts = adaptive = moments = kept = measured = None
    if is_policy(settings):
        model, rollouts, identity, validation = prepare_rollouts(settings, accelerator)
        timesteps, together = timestep_draw(settings.objective, len(model.process)), rollouts.together
    else:
        model, loader, identity, validation = prepare(settings, accelerator, scalable)
        timesteps, adaptive = timestep_draw(settings.objective, len(model.process)), adaptive_power(settings.objective, loader)
        together = loader.together
    hosts: Any = torch.distributed.new_group(backend="gloo") if accelerator.num_processes > 1 else None
    if loader is not None:
        moments, kept = timestep_moments(settings, model, loader, timesteps, accelerator, hosts) or (None, None)
        measured = None if scalable is None else measured_power(settings, scalable, model, loader, timesteps, accelerator, hosts, moments)
        sharpened = sharpen(settings, loader)
    optimizer = build_optimizer(
        optim.optimizer, model.trainable().values(), learning_rate=optim.learning_rate, betas=optim.betas, weight_decay=optim.weight_decay
    )
    if accelerator.is_main_process:
        # what a step visits depends on their product alone, so that a run can go on with another number of processes
        identity["pairs_of_a_step"] = str(together)
        if sharpened is not settings:
            identity["beta"] = repr(sharpened.objective.beta)  # what it is trained with; the settings keep what was given
        grows, free = (
            {"optim.steps": never_longer(settings)},
            ("optim.batch", "optim.accumulation", "data.cache", "tracker", "tracker_project"),
        )
        open_run(settings.out, settings, identity, free=free, grows=grows)
        if measured is not None:
            measured.keep(settings.out)
        if kept is not None:
            keep_measured(settings.out, kept)
    accelerator.wait_for_everyone()
    prepared = hand_over(accelerator, model, optimizer)
    average = None if optim.average is None else Average(model.trainable(), optim.average)
    trackers = Trackers(settings, active=accelerator.is_main_process)
    session = Session(
        sharpened, accelerator, model, loader, timesteps, prepared, average, adaptive, validation, hosts, trackers, measured, moments,
        rollouts,
    )  # fmt: skip
    if validation is not None:
        validation.begin(session)
    return session


def with_targets(settings: TrainSettings) -> TrainSettings:
    """With the name of the only targets there are in place of auto.

    Raises:
        UserError: there are several.
    """
    from dedpo_diffusion.labels.files import target_names

    data = settings.data
    names = target_names(data.pairs) if data.targets == "auto" else []
    if len(names) > 1:
        raise UserError(f"{data.pairs / 'targets'} holds several targets ({', '.join(names)}); name one with data.targets")
    return dataclasses.replace(settings, data=dataclasses.replace(data, targets=names[0])) if names else settings


def never_longer(settings: TrainSettings) -> str | None:
    """Why a run with these settings cannot go on beyond its last step; None where it can."""
    if settings.optim.schedule != "constant":
        return (
            f"the {settings.optim.schedule} schedule spreads its learning rates over all steps, so that a longer run has others from its "
            "first step on (with optim.schedule constant a run can go on; lora.start begins a new one with a trained LoRA)"
        )
    if settings.objective.power == "measured":
        return "objective.power=measured chose the targets for that many steps"
    return None


def shrink(settings: TrainSettings, folder: Path) -> TrainSettings:
    """The same settings, for three steps on a tiny random model and random pairs in a folder, on the CPU."""
    from dedpo_diffusion.models.tiny import SIDE, build, write_pairs
    from dedpo_diffusion.training.cache_choice import needs_cache
    from dedpo_diffusion.training.policy import is_policy
    from dedpo_diffusion.training.trackers import check_trackers
    from dedpo_diffusion.training.validation import shrink_validation

    check_trackers(settings)  # none is told of a trial
    if is_policy(settings):
        raise UserError(
            f"--smoke tries training on pairs, and objective.kind={settings.objective.kind} has none; try these settings with --model "
            "shapes, --loop.reward oracle_reward and few optim.steps"
        )
    kind, optim, data = str(settings.smoke), settings.optim, settings.data
    say(f"trying the settings on a tiny random {kind}: size {SIDE}, 3 steps, on the CPU")
    if optim.optimizer == "adamw_8bit":
        say("optim.optimizer=adamw_8bit needs a CUDA device; tried with adamw")
        optim = dataclasses.replace(optim, optimizer="adamw")
    if settings.mixed_precision == "fp16":
        say("mixed_precision=fp16 needs a GPU; tried with bf16")
        settings = dataclasses.replace(settings, mixed_precision="bf16")
    if settings.attention == "xformers":
        say("attention=xformers needs a CUDA device; tried with sdpa")
    if settings.lora.start is not None:
        say(f"lora.start={settings.lora.start} is of another model; tried with a fresh adapter")
    objective = settings.objective
    if objective.sharpness is not None:
        say(f"objective.sharpness={objective.sharpness:g} depends on the run's own targets; tried with beta as given")
        objective = dataclasses.replace(objective, sharpness=None)
    small = min(optim.batch, 2)
    if objective.power == "measured":
        say("objective.power=measured finds nothing but noise in a random model; tried with fixed")
        objective = dataclasses.replace(objective, power="fixed")
    cache = folder / "cache" if isinstance(data.cache, Path) or (data.cache and needs_cache(data)) else None
    return dataclasses.replace(
        settings, smoke=None, device="cpu", model=str(build(folder / "model", kind)), model_config=None, out=folder / "run",
        model_prediction="v" if kind == "sd21" else "epsilon",
        data=dataclasses.replace(data, pairs=write_pairs(folder / "pairs", data.targets), size=SIDE, cache=cache, label_share="auto"),
        optim=dataclasses.replace(optim, steps=3, batch=small, accumulation=min(optim.accumulation, 2), warmup=min(optim.warmup, 1)),
        objective=objective, lora=dataclasses.replace(settings.lora, start=None), attention="sdpa", checkpoint_every=2, log_every=1,
        tracker=["tensorboard"],
        validation=shrink_validation(settings.validation, folder),
    )  # fmt: skip


def prepare(
    settings: TrainSettings, accelerator: Accelerator, scalable: ScalableTargets | None = None
) -> tuple[Backbone, PairLoader, dict[str, str], Validation | None]:
    """Load the model, encode the pairs or get ready to, and read the targets; also: identity of the inputs, validation.

    With `scalable`, whose power is still to be chosen, the pairs are those that endless training visits.
    """
    import torch

    from dedpo_diffusion.core.files import file_digest
    from dedpo_diffusion.dpo.step import needs_reference
    from dedpo_diffusion.labels.files import targets_path
    from dedpo_diffusion.pairs.dataset import PairReader
    from dedpo_diffusion.training.base import add_lora, load_model
    from dedpo_diffusion.training.cache_choice import decide
    from dedpo_diffusion.training.data import PairLoader, targets_of, visited_rows
    from dedpo_diffusion.training.groups import image_numbers
    from dedpo_diffusion.training.label_share import shared_targets
    from dedpo_diffusion.training.prediction_check import check_prediction
    from dedpo_diffusion.training.sources import CachedSource
    from dedpo_diffusion.training.validation import open_validation

    reader = PairReader(settings.data.pairs)
    together = settings.optim.batch * settings.optim.accumulation * accelerator.num_processes
    file, adaptive = targets_path(settings.data.pairs, settings.data.targets), settings.objective.power == "adaptive"
    merged, shares = targets_of(reader, settings.data.targets, None if scalable is None else scalable.at(1.0)), dict[str, str]()
    if scalable is None:
        merged, shares = shared_targets(settings, merged, together, accelerator)
    rows = visited_rows(merged, file, adaptive=adaptive)
    given, settings = settings, decide(settings, len(rows), accelerator.num_processes)
    model = load_model(settings, accelerator)
    size = settings.data.size or model.size
    model.latent_shape(size)  # or the size is refused
    pairs_fingerprint = reader.fingerprint()
    settings, source = source_of(settings, given, reader, model, accelerator, pairs_fingerprint, size, rows)
    data = settings.data
    validation = open_validation(settings, model, accelerator, size=size)
    if data.cache is not None:
        model.drop_encoders(keep_text=settings.lora.text_encoders)
    grouped = None
    if data.groups is not None and isinstance(source, CachedSource):
        with accelerator.main_process_first():
            grouped = image_numbers(reader, source.cache.folder), data.groups
    loader = PairLoader(
        reader, source, targets=data.targets, seed=settings.seed, sampling=data.sampling, together=together,
        adaptive=adaptive, merged=merged, grouped=grouped, cluster_weights=data.cluster_weights,
    )  # fmt: skip
    check(settings, loader)
    if accelerator.is_main_process:
        say_cut(model, settings.model, reader, loader.rows)
        if not data.buckets:
            say_cropped(source, loader.rows)
    if validation is not None and validation.held_out is not None:
        validation.held_out.keep_apart(loader, reader, pairs_fingerprint, accelerator)
    if settings.attention == "xformers":
        model.use_xformers()
    if settings.weights == "lora":
        add_lora(settings, model)
    elif data.reference_draws is not None:
        model.place(torch.float32)
    if settings.compile:
        model.compile_blocks()
    if data.reference_draws is not None:  # by the kernels that the policy will be computed by
        with accelerator.main_process_first():
            loader.grid = open_grid(settings, reader, source, model, loader)
    if settings.weights == "full":
        asked = needs_reference(settings.objective.kind, settings.objective.balance)
        model.train_all(reference=loader.grid is None and asked)
    overruled, speaks = settings.model_prediction is not None, accelerator.is_main_process
    check_prediction(model, settings.model, source, int(loader.rows[0]), overruled=overruled, tell=speaks)
    if settings.gradient_checkpointing:
        model.checkpoint(selective=settings.gradient_checkpointing == "selective")
    identity = {"base_model": model.fingerprint, "pairs": pairs_fingerprint, "targets": file_digest(file)} | shares
    if given.data.reference_draws == "auto":
        identity["reference_draws"] = str(data.reference_draws)  # which a longer run must not change
    if settings.lora.start is not None:
        identity["start"] = file_digest(settings.lora.start)
    return model, loader, identity | ({} if validation is None else validation.identity()), validation


def source_of(
    settings: TrainSettings,
    given: TrainSettings,
    reader: PairReader,
    model: Backbone,
    accelerator: Accelerator,
    fingerprint: str,
    size: int,
    rows: np.ndarray,
) -> tuple[TrainSettings, Source]:
    """Where a run's encoded pairs come from, and its settings without a cache where there was no room for one that nobody asked for.

    Args:
        settings: as `cache_choice.decide` has them.
        given: as they were given.
        reader, fingerprint: the dataset.
        model, accelerator: of the run.
        size: pixels of a side.
        rows: of the dataset, that are visited.
    """
    from dedpo_diffusion.training.cache_choice import needs_cache
    from dedpo_diffusion.training.sources import CachedSource, open_source

    optional = given.data.cache == "auto" and not needs_cache(settings.data)
    known: Any = {"fingerprint": fingerprint, "size": size, "optional": optional, "rows": rows}
    source = open_source(settings, reader, model, settings.data, accelerator, **known)
    if not isinstance(source, CachedSource):
        settings = dataclasses.replace(settings, data=dataclasses.replace(settings.data, cache=None))
    return settings, source


def say_cut(model: Backbone, name: str, reader: PairReader, rows: np.ndarray) -> None:
    """Say how many prompts of the visited pairs have more tokens than the model reads, with the longest."""
    from dedpo_diffusion.models.prompt_tokens import counter_of

    counter, prompts = counter_of(model.text.tokenizers, name), reader.prompts()
    visited = [prompts[row] for row in rows]
    words = counter.cut(visited, counter.lengths(visited), lambda place: reader.location(int(rows[place])))
    if words is not None:
        say(words)


def say_cropped(source: Source, rows: np.ndarray) -> None:
    """Say how many images of the visited pairs a square crops; of many pairs whose files must be opened for it, of the first ones."""
    from dedpo_diffusion.pairs.pixels import crop_warning, not_square
    from dedpo_diffusion.training.sources import LiveSource

    some = rows[:LOOKED_AT] if isinstance(source, LiveSource) else rows
    sides = source.originals(some)  # (n, 2, 2)
    cropped = int(not_square(sides[..., 1], sides[..., 0]).sum())
    if cropped:
        say(("of the first pairs, " if len(some) < len(rows) else "") + crop_warning(cropped, 2 * len(some)))


def check_options(settings: TrainSettings) -> None:
    """See to it that every number in the settings can be used, before anything is loaded.

    Raises:
        UserError: an option that cannot be used, or does not go with the objective.
    """
    from dedpo_diffusion.dpo.objectives import find_objective
    from dedpo_diffusion.training.cluster_weights import check_cluster_weights
    from dedpo_diffusion.training.groups import check_groups
    from dedpo_diffusion.training.label_share import check_label_share
    from dedpo_diffusion.training.measured_power import check_measurable
    from dedpo_diffusion.training.measured_timesteps import check_timesteps
    from dedpo_diffusion.training.own_noise import check_noise
    from dedpo_diffusion.training.policy import check_no_policy, check_policy, is_policy
    from dedpo_diffusion.training.sharpness import check_sharpness
    from dedpo_diffusion.training.trackers import check_trackers
    from dedpo_diffusion.training.validation import check_validation

    if is_policy(settings):
        check_validation(settings)
        check_trackers(settings)
        check_counts(settings)
        check_policy(settings)
        return
    check_no_policy(settings)
    objective = settings.objective
    try:
        balanced = find_objective(objective.kind).balanced
    except ValueError as error:
        raise UserError(f"objective.kind: {error}") from error
    check_validation(settings)
    check_trackers(settings)
    check_measurable(objective)
    check_timesteps(settings)
    check_groups(settings)
    check_cluster_weights(settings)
    check_label_share(settings)
    check_noise(settings)
    for name in ("beta", "balance_clip", "balance_tempering", "margin_cap", "sharpness"):
        value = getattr(objective, name)
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"objective.{name} is {value}; it must be a positive number")
    check_sharpness(objective)
    check_counts(settings)
    for name, value in objective.options.items():
        if not math.isfinite(value):
            raise UserError(f"objective.options: {name} is {value}; give a finite number")
    if settings.weights == "full" and settings.lora != LoraSettings():
        raise UserError("weights=full trains no adapter; leave the options of lora out")
    if objective.power == "adaptive" and (objective.kind != "sigmoid" or objective.options):
        given = f"{objective.kind} with options" if objective.options else objective.kind
        raise UserError(
            f"objective.power=adaptive is derived for the gradient of objective.kind=sigmoid without options, not of {given}; "
            "leave it at fixed, which keeps the power of the merge"
        )
    if not balanced and objective.balance != "none":
        raise UserError(
            "objective.balance is derived for objectives that move both errors of a pair by equal and opposite gradients; "
            f"objective.kind={objective.kind} does not, so leave it out"
        )
    if objective.balance == "adadpo" and not find_objective(objective.kind).affine:
        raise UserError(
            f"objective.balance=adadpo is for losses that are affine in the label, which objective.kind={objective.kind} is not; "
            "take sigmoid, linear, ipo or cdpo, or another balance"
        )


def check_counts(settings: TrainSettings) -> None:
    """Refuse numbers of steps, and a decay, that cannot be used, whatever is trained on."""
    optim = settings.optim
    counts = {f"optim.{name}": getattr(optim, name) for name in ("steps", "batch", "accumulation")}
    counts |= {name: getattr(settings, name) for name in ("checkpoint_every", "keep_checkpoints", "log_every")}
    for name, value in counts.items():
        if value < 1:
            raise UserError(f"{name} is {value}; it must be at least 1")
    if optim.average is not None and not 0 <= optim.average < 1:
        raise UserError(f"optim.average is {optim.average}; give a decay in [0, 1), or null for no moving average")


def check(settings: TrainSettings, loader: PairLoader) -> None:
    """See to it that the objective can be computed on these targets, before anything is written.

    Raises:
        UserError: what stands against it.
    """
    import torch

    from dedpo_diffusion.dpo.objectives import objective_loss

    errors = torch.ones(len(loader.target), 2)
    numbers = {name: getattr(settings.objective, name) for name in ("kind", "beta", "options", "margin_cap")}
    try:
        objective_loss(errors, errors, loader.target, loader.weight, **numbers)
    except ValueError as error:
        raise UserError(f"objective on targets {settings.data.targets!r}: {error}") from error


def timestep_draw(objective: ObjectiveSettings, schedule: int) -> TimestepDraw:
    """How timesteps are drawn.

    Raises:
        UserError: a range that is empty or beyond the schedule, or another number that cannot be used.
    """
    from dedpo_diffusion.dpo.noising import TimestepDraw

    first, last = objective.timesteps or (0, schedule)
    if last > schedule:
        raise UserError(f"objective.timesteps {first}, {last}: the model's schedule ends at {schedule}")
    try:
        return TimestepDraw(
            first, last, objective.timestep_sampling, objective.timestep_location, objective.timestep_spread,
            objective.timestep_weighting, objective.snr_gamma, objective.timestep_strata,
        )  # fmt: skip
    except ValueError as error:
        raise UserError(f"objective: {error}") from error


def open_grid(
    settings: TrainSettings,
    reader: PairReader,
    source: Source,
    model: Backbone,
    loader: PairLoader,
) -> ReferenceGrid:
    """The pre-drawn noises of every visited pair, with the reference's errors, computed now if need be.

    Raises:
        UserError: there is no cache to keep them in.
    """
    from dedpo_diffusion.training.own_noise import OwnNoise
    from dedpo_diffusion.training.reference_grid import ReferenceGrid
    from dedpo_diffusion.training.sources import CachedSource

    data = settings.data
    if not isinstance(source, CachedSource):
        raise UserError("data.reference_draws needs data.cache, which the reference's errors are kept beside")
    return ReferenceGrid(
        source.cache.folder, source, model, loader.rows, pairs=len(reader), draws=int(data.reference_draws or 0),
        timesteps=timestep_draw(settings.objective, len(model.process)), caption_dropout=data.caption_dropout,
        batch=settings.optim.batch, kernels=[settings.attention, settings.compile], groups=loader.groups,
        noise=OwnNoise(data.noise, settings.model, reader, data.inversion_steps) if data.noise in ("own", "inverted") else data.noise,
    )  # fmt: skip


def adaptive_power(objective: ObjectiveSettings, loader: PairLoader) -> AdaptivePower | None:
    """The power that follows training, if it is to.

    Raises:
        UserError: a number that cannot be used.
    """
    from dedpo_diffusion.debias import power_cap
    from dedpo_diffusion.dpo.adaptive_power import AdaptivePower

    if loader.parts is None:
        return None
    if not objective.max_overshoot >= 1:
        raise UserError(f"objective.max_overshoot is {objective.max_overshoot}; it must be at least 1, where 1 switches the judge off")
    try:
        return AdaptivePower(
            loader.parts,
            power=loader.power,
            cap=power_cap(loader.parts.inverse.numpy(), objective.max_overshoot),
            decay=objective.power_decay,
        )
    except ValueError as error:
        raise UserError(f"objective.power_decay: {error}") from error
