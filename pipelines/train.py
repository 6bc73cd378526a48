"""Train a LoRA, or the whole UNet, on merged preference targets; or a LoRA on a reward of the model's own images.

    dedpo train --config configs/shapes_lora.yaml
    dedpo train --config configs/shapes_loop.yaml
    accelerate launch pipelines/train.py --config configs/shapes_lora.yaml

The same command resumes a run that was stopped. One step: draw noise and timesteps for the step's pairs, predict with
policy and reference, form the margin, average the weighted pair loss, update what is trained. With objective.kind loop or apa a step's
visits are denoising steps of images that the policy sampled, see `training.rollouts`; all else is the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dedpo_diffusion.core.console import Progress, UserError, say, say_next, stage
from dedpo_diffusion.core.pace import Forecast
from dedpo_diffusion.settings import OptimSettings, TrainSettings

NOTED = {
    "loss": "loss",
    "implicit accuracy": "implicit_accuracy",
    "reward": "reward",
}  # beside the progress, by their key in a line of metrics

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import Tensor

    from dedpo_diffusion.core.records import PairBatch, StepResult
    from dedpo_diffusion.core.stopping import StopSignal
    from dedpo_diffusion.dpo.noising import Draws
    from dedpo_diffusion.training.data import Loaded
    from dedpo_diffusion.training.health import Watch
    from dedpo_diffusion.training.setup import Session
    from dedpo_diffusion.training.validation import Validation


def learning_rate(optim: OptimSettings, step: int) -> float:
    """Learning rate of optimizer step `step`, counted from 0."""
    factor = min(1.0, (step + 1) / max(optim.warmup, 1))
    if optim.schedule == "cosine":
        factor *= 0.5 * (1 + math.cos(math.pi * step / optim.steps))
    return optim.learning_rate * factor


def describe(session: Session) -> None:
    """Say what is about to be trained."""
    from dedpo_diffusion.training.measured_timesteps import say_moments
    from dedpo_diffusion.training.sharpness import measure_sharpness, sharpness_words

    if session.rollouts is not None:
        say(f"{sum(p.numel() for p in session.model.trainable().values()):,} trainable parameters")
        for words in session.rollouts.describe():
            say(words)
        return
    assert session.loader is not None
    optim, objective, loader = session.settings.optim, session.settings.objective, session.loader
    processes = session.accelerator.num_processes
    together, visited = loader.together, f"{len(loader.rows)} pairs"
    if loader.groups is not None:
        visited += f" in {len(loader.groups)} groups of {loader.groups.sizes.min()} to {loader.groups.sizes.max()} images"
    say(
        f"{visited}, {together} per step ({processes} x {optim.batch} x {optim.accumulation}), {optim.steps} steps = "
        f"{optim.steps * together / len(loader.visits.probability):.1f} epochs; "
        f"{sum(p.numel() for p in session.model.trainable().values()):,} trainable parameters"
    )
    say(f"objective {objective.kind}, balance {objective.balance}, power {objective.power}")
    say(f"beta {objective.beta:g} on mean errors, as --beta_dpo in Diffusion-DPO's own scripts")
    for text in () if session.measured is None else session.measured.report["sentences"]:
        say(text)
    if session.moments is not None:
        say_moments(session.moments)
    for words in sharpness_words(objective, measure_sharpness(objective, loader)):
        say(words)


def resume(session: Session) -> int:
    """Load the newest checkpoint, if there is one; returns the steps done."""
    from accelerate.utils import broadcast_object_list

    from dedpo_diffusion.weights.checkpoints import load_checkpoint, load_part
    from dedpo_diffusion.weights.run_folder import newest_checkpoint

    # the main process looks at every byte, and sets damaged ones aside
    [found] = broadcast_object_list([newest_checkpoint(session.settings.out) if session.accelerator.is_main_process else None])
    if found is None:
        return 0
    (step, folder), model, scaler = found, session.model, session.accelerator.scaler
    state = load_checkpoint(folder, model.trainable(), session.optimizer.optimizer)
    averaged = load_part(folder, "average")
    if session.average is not None and averaged is not None:
        session.average.restore(averaged)
    if scaler is not None and state.get("scaler"):
        scaler.load_state_dict(state["scaler"])
    if session.adaptive is not None:
        session.adaptive.restore(state["adaptive"])
    if session.moments is not None:
        session.moments.restore(state["timesteps"])
    if session.rollouts is not None:
        session.rollouts.restore(load_part(folder, "rollout"))
    say(f"resuming {session.settings.out} after step {step}")
    return step


def save(session: Session, step: int) -> None:
    """Write a checkpoint on the main process; the others give it their parts of the tensors, and wait."""
    from dedpo_diffusion.weights.checkpoints import save_checkpoint
    from dedpo_diffusion.weights.run_folder import checkpoint_folder, prune_checkpoints

    accelerator, model, out = session.accelerator, session.model, session.settings.out
    scaler = accelerator.scaler.state_dict() if accelerator.scaler is not None else None
    followed = {"adaptive": session.adaptive, "timesteps": session.moments}
    state = {"step": step, "scaler": scaler, **{name: None if value is None else value.state() for name, value in followed.items()}}
    averaged, main = None if session.average is None else session.average.values, accelerator.is_main_process
    folder, optimizer = checkpoint_folder(out, step), session.optimizer.optimizer
    rollout = None if session.rollouts is None else session.rollouts.kept(step)
    save_checkpoint(folder, model.trainable(), optimizer, state, averaged, rollout=rollout, write=main)
    if main:
        prune_checkpoints(out, session.settings.keep_checkpoints)
    accelerator.wait_for_everyone()


def asked_to_leave(stop: StopSignal, session: Session) -> bool:
    """Whether any process was asked to end; several processes look for it together, and leave together."""
    import torch

    asked = torch.tensor(int(stop.asked))
    if session.hosts is not None:
        torch.distributed.all_reduce(asked, group=session.hosts)
    return bool(asked)


def summary(session: Session, parts: Sequence[tuple[Any, ...]]) -> tuple[dict[str, Any], Tensor]:
    """What a step's micro-batches say, over all processes, and this process's latents."""
    import torch

    from dedpo_diffusion.core.records import Tensors
    from dedpo_diffusion.training.metrics import step_metrics, summarise

    results, batches, timesteps, _ = zip(*parts, strict=True)
    accelerator, schedule = session.accelerator, len(session.model.process)
    if session.rollouts is not None:
        return session.rollouts.summary(Tensors.joined(results).map(accelerator.gather)), torch.cat([batch.noisy for batch in batches])
    pairs = step_metrics(results, batches, torch.cat(timesteps), schedule=schedule)
    found = summarise({k: accelerator.gather(v) for k, v in pairs.items()}, schedule=schedule)
    return found, torch.cat([batch.latents for batch in batches])


def record(found: dict[str, Any], encoded: Tensor, accelerator: Accelerator, *, step: int, **numbers: Any) -> dict[str, Any]:
    """One line of metrics of what `summary` found; `encoded` are this process's latents.

    Raises:
        UserError: the loss or the gradient is no longer finite.
    """
    line = {"step": step, **found, **numbers}
    if accelerator.optimizer_step_was_skipped and math.isfinite(line["loss"]):  # how a scaler finds what fp16 can hold
        return line | {"gradient_norm": None}
    if not math.isfinite(line["loss"]) or not math.isfinite(line["gradient_norm"]):
        if not encoded.isfinite().all():
            raise UserError(
                f"step {step}: the VAE's numbers of an image are not finite; its files may be damaged or overflow: check or replace them. "
                "With data.cache such a pair is named"
            )
        raise UserError(
            f"step {step}: the loss is {line['loss']}, the gradient's norm {line['gradient_norm']}; the last checkpoint is kept. "
            "Lower optim.learning_rate, or train with mixed_precision bf16 in place of fp16"
        )
    return line


def attend(watch: Watch | Validation, line: dict[str, Any], session: Session) -> None:
    """Tell what the curves show.

    Raises:
        UserError: a symptom, where the run is to stop at one.
    """
    health = session.settings.health
    if health == "off":
        return
    for words in watch.look(line):
        if health == "stop":
            raise UserError(f"step {line['step']}: {words}. The run stops here, as health=stop asks; its last checkpoint is kept")
        if session.accelerator.is_main_process:
            say(f"Warning: step {line['step']}: {words}")


def visits(session: Session, done: int) -> Iterator[Any]:
    """What this process's micro-batches from step `done` on visit: pairs that were loaded, or denoising steps of its own images."""
    return micro_batches(session, done) if session.rollouts is None else session.rollouts.micro_batches(done)


def micro_batches(session: Session, done: int) -> Iterator[Loaded]:
    """This process's micro-batches from step `done` on, loaded in another thread while the device computes, pinned where there is a GPU."""
    import torch

    from dedpo_diffusion.core.prefetch import prefetch
    from dedpo_diffusion.dpo.noising import draw
    from dedpo_diffusion.models.memory import slow_on_cpu

    settings, loader, accelerator = session.settings, session.loader, session.accelerator
    assert loader is not None
    optim, processes, rank = settings.optim, accelerator.num_processes, accelerator.process_index
    together, dropout = loader.together, settings.data.caption_dropout
    drawn: dict[int, Draws] = {}

    def load(job: tuple[int, int]) -> Loaded:
        step, micro = job
        if step not in drawn:  # the draws are those of the whole step, whoever computes them
            drawn.clear()
            options = {"timesteps": session.timesteps, "caption_dropout": dropout, "images": loader.images(step)}
            options["independent"] = settings.data.noise == "independent"
            drawn[step] = draw(settings.seed, step, together, loader.shape(step), **options)
        first = (micro * processes + rank) * optim.batch
        loaded = loader.load(step * together + first, drawn[step].part(first, first + optim.batch))
        return loaded.map(torch.Tensor.pin_memory) if accelerator.device.type == "cuda" else loaded

    slow = slow_on_cpu(session.model.unet) and accelerator.is_main_process
    forecast = Forecast((optim.steps - done) * optim.accumulation, after=2 if slow else 0)
    jobs = ((step, micro) for step in range(done, optim.steps) for micro in range(optim.accumulation))
    for _, loaded in prefetch(jobs, load, workers=1, depth=2):
        yield loaded
        forecast.advance()  # it is asked for the next when this one is learned


def learn(session: Session, loaded: Any) -> tuple[Any, Any, Tensor, dict[str, Tensor]]:
    """Losses and gradients of one micro-batch.

    Returns:
        The result and what was visited, as `learn_pairs` or `Rollouts.learn` have them, timesteps (B,), and as `learn_pairs` the last.
    """
    if session.rollouts is None:
        return learn_pairs(session, loaded)
    with session.accelerator.accumulate(session.model.policy):
        result = session.rollouts.learn(loaded)
        session.accelerator.backward(result.loss.mean())
    return result.map(lambda values: values.detach()), loaded, loaded.timesteps, {}


def learn_pairs(session: Session, loaded: Loaded) -> tuple[StepResult, PairBatch, Tensor, dict[str, Tensor]]:
    """Losses and gradients of one micro-batch of pairs.

    Returns:
        The step's result, its pairs, their timesteps (B,), and what those that follow training are measured by, by their name in `follow`.
    """
    from dedpo_diffusion.dpo.step import preference_step
    from dedpo_diffusion.training.visit_gradients import weigh

    accelerator, model, adaptive, moments = session.accelerator, session.model, session.adaptive, session.moments
    assert session.loader is not None
    batch, draws = session.loader.batch(loaded, model)
    if adaptive is not None:
        batch = adaptive.apply(batch, loaded.places)
    options = session.settings.objective.step_options()
    with accelerator.accumulate(model.policy):
        draws, factor = weigh(draws, session.timesteps, model, moments)
        result = preference_step(model, batch, timesteps=draws.timesteps, noise=draws.noise, timestep_weight=factor, **options)
        accelerator.backward(result.loss.mean())
    measured = {} if adaptive is None else {"adaptive": adaptive.measure(result.margin, loaded.places)}
    if moments is not None:
        measured["moments"] = moments.measure(result.square, draws.timesteps)
    return result, batch, draws.timesteps, measured


def follow(session: Session, measured: Sequence[dict[str, Tensor]]) -> None:
    """Let what follows training take in a step: the sums over its micro-batches and all processes."""
    import torch

    accelerator = session.accelerator
    for name, followed in {"adaptive": session.adaptive, "moments": session.moments}.items():
        if followed is not None:
            own = torch.stack([part[name] for part in measured]).sum(dim=0)
            followed.update(accelerator.reduce(own.to(accelerator.device)).cpu())


def try_out(settings: TrainSettings) -> Path:
    """Run the settings on a tiny model of the same architecture, in a folder that is removed again."""
    from tempfile import TemporaryDirectory

    from dedpo_diffusion.training.setup import shrink

    with TemporaryDirectory() as folder:
        train(shrink(settings, Path(folder)))
    say(f"these settings train on a tiny {settings.smoke}; leave --smoke out for the real run into {settings.out}")
    return settings.out


def run(settings: TrainSettings) -> Path:
    """Train a LoRA, or the whole UNet, on merged preference targets."""
    if settings.smoke is not None:
        return try_out(settings)
    out = train(settings)
    written = [f"{out}.safetensors"] if settings.weights == "lora" else [f"{out}-model", "--format", "merged"]
    say_next("export", out, "--out", *written)
    return out


def train(settings: TrainSettings) -> Path:
    """The run itself; returns its folder, which is taken once the first step is done.

    Raises:
        UserError: what stands against the run, or the device's memory is too small for it.
    """
    from dedpo_diffusion.core.caches import released
    from dedpo_diffusion.training.setup import set_up
    from dedpo_diffusion.weights.run_folder import starting

    with starting(settings.out), memory_told(settings), released():
        steps(set_up(settings))
    return settings.out


@contextmanager
def memory_told(settings: TrainSettings) -> Iterator[None]:
    """Within the block, tell in the user's words that the device's memory is too small."""
    try:
        yield
    except Exception as error:
        from dedpo_diffusion.models.memory import is_out_of_memory

        if not is_out_of_memory(error):
            raise
        told = str(error).splitlines()[0]
        raise UserError(
            f"the device has too little memory for these settings ({told}); halve optim.batch (it is {settings.optim.batch}) and double "
            "optim.accumulation, which trains the same, or take gradient_checkpointing true, data.cache FOLDER, or a smaller data.size"
        ) from error


def steps(session: Session) -> None:
    """All steps that are left."""
    import torch

    from dedpo_diffusion.core.stopping import StopSignal, Terminated
    from dedpo_diffusion.dpo.noising import step_generator
    from dedpo_diffusion.training.health import Watch
    from dedpo_diffusion.weights.run_folder import MetricsLog, began, read_metrics

    settings, accelerator, model, adaptive = session.settings, session.accelerator, session.model, session.adaptive
    optim, optimizer, moments = settings.optim, session.optimizer, session.moments
    done = resume(session)
    if accelerator.is_main_process:
        describe(session)
    watch = Watch(read_metrics(settings.out, done))
    trackers = session.trackers
    trackers.open(settings)
    log = MetricsLog(settings.out, done, board=trackers.board, also=trackers.log) if accelerator.is_main_process else None
    missed = None if session.validation is None else session.validation.go_on(session, done)
    if session.validation is not None and missed is not None:
        attend(session.validation, missed, session)
    loads, note = visits(session, done), ""

    with StopSignal() as stop, trackers, Progress("training", optim.steps, start=done) as progress:
        for step in range(done, optim.steps):
            rate = learning_rate(optim, step)
            for group in optimizer.param_groups:
                group["lr"] = rate
            torch.manual_seed(step_generator(settings.seed, step, 2 + accelerator.process_index).initial_seed())  # of the adapter's dropout
            parts = [learn(session, next(loads)) for _ in range(optim.accumulation)]
            measured = [part[-1] for part in parts]
            norm = accelerator.clip_grad_norm_(model.trainable().values(), optim.clip)
            optimizer.step()
            optimizer.zero_grad()
            now, last = step + 1, step + 1 == optim.steps
            numbers: dict[str, Any] = {"learning_rate": rate} | ({} if adaptive is None else {"power": adaptive.power})
            numbers |= {} if moments is None else {"timestep_moments": moments.report()}
            if session.average is not None and not accelerator.optimizer_step_was_skipped:
                session.average.update(model.trainable(), now)
            follow(session, measured)
            leave = asked_to_leave(stop, session) and not last
            due = now % settings.checkpoint_every == 0 or last
            logged = due or now % settings.log_every == 0 or now == 1
            if logged or leave:  # elsewhere nothing waits for the device
                found, encoded = summary(session, parts)
                line = record(found, encoded, accelerator, step=now, gradient_norm=float(norm), **numbers)
                note = ", ".join(f"{name} {line[key]:.3f}" for name, key in NOTED.items() if line.get(key) is not None)
                if log is not None and logged:
                    log.write(line)
                if logged:
                    attend(watch, line, session)
            if step == done:
                began(settings.out)
            if due or leave:
                save(session, now)
            if leave:
                raise Terminated(f"saved after step {now}")
            if session.validation is not None and session.validation.due(now):
                attend(session.validation, session.validation.measure(session, now), session)
            progress.advance(note=note)
    for opened in (log, session.validation):
        if opened is not None:
            opened.close()
    accelerator.end_training()


def main(argv: list[str] | None = None) -> int:
    """Entry point."""
    return stage(TrainSettings, run, argv, prog="dedpo train")


if __name__ == "__main__":
    raise SystemExit(main())
