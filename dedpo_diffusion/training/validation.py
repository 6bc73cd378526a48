"""Validation in the course of training: held-out pairs, sampled images with their scores, the best step.

All numbers are of what would be exported: the moving average, where the run keeps one. Nothing here touches what training draws, so a run
with validation trains to the bit what one without it does. With a cache the text encoders are dropped once pairs and the grid's
prompts are encoded; the VAE's decoder stays, if images are to be sampled.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dedpo_diffusion.core.console import Progress, UserError, say
from dedpo_diffusion.settings import DataSettings, TrainSettings, ValidationSettings

if TYPE_CHECKING:
    import numpy as np
    from accelerate import Accelerator
    from PIL.Image import Image
    from torch import Tensor

    from dedpo_diffusion.models.backbone import Backbone
    from dedpo_diffusion.pairs.dataset import PairReader
    from dedpo_diffusion.training.data import PairLoader
    from dedpo_diffusion.training.optimizers import Average
    from dedpo_diffusion.training.setup import Session
    from dedpo_diffusion.weights.run_folder import MetricsLog

LOG = "validation"  # its lines are in OUT/validation.jsonl
OBJECTIVE = ("kind", "beta", "options", "margin_cap")  # of the objective, that held-out pairs are measured by


def check_validation(settings: TrainSettings) -> None:
    """See to it that the settings of validation go together.

    Raises:
        UserError: they do not.
    """
    from dedpo_diffusion.sampling.prompts import read_prompts

    wanted = settings.validation
    if wanted.every is None:
        given = [name for name in ("pairs", "prompts", "scorers") if getattr(wanted, name)]
        if given:
            raise UserError(f"validation.{given[0]} is given, but validation.every is not; give the steps between validations")
        return
    for name in ("every", "draws", "steps"):
        if getattr(wanted, name) < 1:
            raise UserError(f"validation.{name} is {getattr(wanted, name)}; it must be at least 1")
    if wanted.pairs is None and wanted.prompts is None:
        raise UserError("validation.every is given, but nothing to look at; give validation.pairs or validation.prompts")
    if wanted.scorers and wanted.prompts is None:
        raise UserError("validation.scorers score sampled images; give validation.prompts")
    if wanted.prompts is not None:
        read_prompts(wanted.prompts)


def shrink_validation(wanted: ValidationSettings, folder: Path) -> ValidationSettings:
    """The same, for a run of three steps: random pairs and prompts in a folder, no scorers."""
    import numpy as np

    from dedpo_diffusion.core.files import write_text
    from dedpo_diffusion.core.records import Labels
    from dedpo_diffusion.labels.files import write_labels
    from dedpo_diffusion.models.tiny import write_pairs

    if wanted.every is None:
        return wanted
    if wanted.scorers:
        say("validation.scorers are left out")
    pairs = prompts = None
    if wanted.pairs is not None:
        pairs = write_pairs(folder / "held-out", "none", 4, seed=1)
        write_labels(pairs, wanted.human, Labels(["p0", "p1", "p2"], np.array([0.0, 1.0, 0.5])))
    if wanted.prompts is not None:
        prompts = folder / "prompts.txt"
        write_text(prompts, "a large red circle\na small cross\n")
    return dataclasses.replace(wanted, every=2, pairs=pairs, prompts=prompts, scorers=[], draws=2, steps=2)


def open_validation(settings: TrainSettings, model: Backbone, accelerator: Accelerator, *, size: int) -> Validation | None:
    """What validation needs the encoders for, while the model has them; None where none is asked for."""
    wanted = settings.validation
    if wanted.every is None:
        return None
    held_out = None if wanted.pairs is None else HeldOut(settings, model, accelerator, size=size)
    grid = Grid(settings, model, size=size) if wanted.prompts is not None and accelerator.is_main_process else None
    return Validation(settings, held_out, grid)


@contextmanager
def at_rest(model: Backbone, average: Average | None) -> Iterator[None]:
    """The model as it would be exported: the moving average if there is one, without dropout, and not wrapped for several processes."""
    training, policy, trained = model.unet.training, model.policy, model.trainable()
    live = {name: parameter.data for name, parameter in trained.items()}
    model.policy = model.network
    model.train(False)
    for name, value in ({} if average is None else average.values).items():
        trained[name].data = value
    try:
        yield
    finally:
        for name, value in live.items():
            trained[name].data = value
        model.train(training)
        model.policy = policy


class HeldOut:
    """Held-out pairs, their human labels, and the policy's errors at their fixed draws.

    Attributes:
        rows: of the dataset, those with a label; in a dataset that is also trained on, those of them that training does not visit.
        label: of all its pairs, NaN without one.
        identity: what a resumed run must find unchanged.

    Raises:
        UserError: no such pairs or labels.
    """

    def __init__(self, settings: TrainSettings, model: Backbone, accelerator: Accelerator, *, size: int) -> None:
        import numpy as np

        from dedpo_diffusion.core.files import file_digest
        from dedpo_diffusion.labels.files import align, read_labels
        from dedpo_diffusion.pairs.dataset import PairReader
        from dedpo_diffusion.training.sources import open_source

        self.settings, self.wanted, self.shape = settings, settings.validation, model.latent_shape(size)
        folder, name = Path(str(self.wanted.pairs)), self.wanted.human
        self.reader = PairReader(folder)
        self.label: np.ndarray = align(read_labels(folder, name, extras=()), self.reader.ids(), folder=folder, name=name)
        self.rows: np.ndarray = np.flatnonzero(~np.isnan(self.label))
        self.file = folder / "labels" / f"{name}.parquet"
        if not len(self.rows):
            raise UserError(f"{self.file}: no pair has a label, so nothing is held out")
        data = DataSettings(folder)  # squares from the centre, never mirrored
        same = folder.resolve() == settings.data.pairs.resolve() and settings.data.crop == "centre" and not settings.data.buckets
        if settings.data.cache is not None and same:
            data = settings.data  # whose first view is just that, and is there already
        self.fingerprint = self.reader.fingerprint()
        self.identity = {"held_out_pairs": self.fingerprint, "held_out_labels": file_digest(self.file)}
        self.source = open_source(settings, self.reader, model, data, accelerator, fingerprint=self.fingerprint, size=size, views=1)

    @functools.cached_property
    def clusters(self) -> np.ndarray | None:
        """(n,) of the rows: pairs of one prompt hang together; None where no two do."""
        import numpy as np

        from dedpo_diffusion.pairs.clusters import label_clusters

        labelled = np.full(len(self.label), np.nan)
        labelled[self.rows] = self.label[self.rows]
        found = label_clusters(self.reader, labelled)
        return None if found is None else found[self.rows]

    def keep_apart(self, loader: PairLoader, trained: PairReader, fingerprint: str, accelerator: Accelerator) -> None:
        """Leave out what is trained on, in a dataset that is trained on; see to it that no image of the others is.

        `fingerprint` is that of the trained dataset. Images are compared when a run begins; a resumed one has the same, or `open_run`
        refuses it.

        Raises:
            UserError: nothing is left, or an image file of a held-out pair is trained on.
        """
        import numpy as np
        import torch

        from dedpo_diffusion.training.held_out import shared_images

        remedy = (
            f"`dedpo merge --folds 5` writes targets without one fold's prompts each, for data.targets={self.settings.data.targets}-fold-0"
        )
        if fingerprint == self.fingerprint:
            self.rows = np.setdiff1d(self.rows, loader.rows)
            if not len(self.rows):
                raise UserError(f"{self.file}: every pair with a label is trained on, so nothing is held out; {remedy}")
        shared: list[int] = []
        if accelerator.is_main_process and not (self.settings.out / "identity.json").is_file():
            shared = shared_images(trained, loader.rows.tolist(), self.reader, self.rows.tolist())
        count = int(accelerator.reduce(torch.tensor(len(shared), device=accelerator.device)).item())  # all processes raise, or none
        if count:
            first = f" (first: {self.reader.location(shared[0])})" if shared else ""
            raise UserError(
                f"{self.file}: {count} of {len(self.rows)} held-out pairs have an image that is trained on{first}; remove their labels "
                f"from this file, or split by prompt: {remedy}"
            )

    def draws(self, number: int, session: Session) -> Any:
        """The draws of held-out pair `number`."""
        from dedpo_diffusion.training.held_out import held_out_draws

        return held_out_draws(self.wanted.seed, number, self.wanted.draws, self.shape, session.timesteps)

    def errors(self, session: Session) -> Tensor:
        """Errors of the policy (P, K, 2), on the CPU; each process predicts for its part of the pairs."""
        import torch

        from dedpo_diffusion.dpo.noising import Draws

        accelerator, model, draws, batch = session.accelerator, session.model, self.wanted.draws, session.settings.optim.batch
        found = torch.zeros(len(self.rows), draws, 2, device=model.device)
        mine = range(accelerator.process_index, len(self.rows), accelerator.num_processes)
        items = [(number, k) for number in mine for k in range(draws)]
        shown = Progress("held-out pairs", len(items)) if accelerator.is_main_process else None
        with shown or nullcontext():
            for first in range(0, len(items), batch):
                part = items[first : first + batch]
                numbers = list(dict.fromkeys(number for number, _ in part))
                drawn = {number: self.draws(number, session) for number in numbers}
                encoded = self.source.fetch(
                    [int(self.rows[n]) for n in numbers], [0] * len(numbers), torch.zeros(len(numbers), dtype=torch.bool)
                )
                now = Draws.join([drawn[number].part(k, k + 1) for number, k in part]).to(model.device)
                place = [numbers.index(number) for number, _ in part]
                mean, std = (values[place].to(model.device) for values in (encoded.mean, encoded.std))
                given = encoded.conditioning.at(place).to(model.device)
                errors = model.errors(model.latents(mean, std, now.posterior), now.noise[:, None], now.timesteps, given)
                for (number, k), error in zip(part, errors, strict=True):
                    found[number, k] = error
                if shown is not None:
                    shown.advance(len(part))
        return accelerator.reduce(found, reduction="sum").cpu()


class Grid:
    """Images of held-out prompts from the same noise in every validation, and what scorers say of them; on the main process alone.

    Raises:
        UserError: prompts or scorers that cannot be loaded.
    """

    def __init__(self, settings: TrainSettings, model: Backbone, *, size: int) -> None:
        import torch

        from dedpo_diffusion.core.records import Conditioning
        from dedpo_diffusion.judges.scorers import load_scorer
        from dedpo_diffusion.sampling.prompts import read_prompts
        from dedpo_diffusion.sampling.sampler import jobs

        self.settings, self.wanted, self.shape = settings, settings.validation, model.latent_shape(size)
        prompts = read_prompts(str(self.wanted.prompts))
        self.prompts = [prompt.text for prompt in prompts]
        self.work = jobs(prompts, 1, self.wanted.seed)
        cpu = torch.device("cpu")
        parts = [model.encode_prompts([prompt]).to(cpu) for prompt in self.prompts]
        self.given = Conditioning.stack([part.at(0) for part in parts])
        self.absent = model.encode_prompts([None]).to(cpu)
        self.vae = model.vae
        if settings.data.cache is not None:  # all pairs are encoded by now
            self.vae.encoder = self.vae.quant_conv = None
        self.scorers = [load_scorer(spec, device=str(model.device), batch=settings.optim.batch) for spec in self.wanted.scorers]
        names = [scorer.name for scorer in self.scorers]
        if len(set(names)) < len(names):
            raise UserError(f"validation.scorers {self.wanted.scorers}: one of them is named twice; name each once")
        self.start: list[Image] = []
        self.start_scores: dict[str, np.ndarray] = {}

    def folder(self, step: int) -> Path:
        """Where the images of a step lie."""
        return self.settings.out / "samples" / f"step-{step:08d}"

    def begin(self, model: Backbone) -> None:
        """Sample before training, once a run, and score that."""
        from dedpo_diffusion.pairs.decoding import decode_image

        folder = self.folder(0)
        if folder.is_dir():
            self.start = [decode_image((folder / job.file).read_bytes(), str(folder / job.file)) for job in self.work]
        else:
            self.start = self.draw(model)
        self.start_scores = self.score(self.start)
        if not folder.is_dir():
            self.write(0, self.start, self.start_scores)

    def draw(self, model: Backbone) -> list[Image]:
        """An image of every prompt from the model as it is."""
        import torch

        from dedpo_diffusion.sampling.sampler import sample_encoded, sampler_around

        pipe, batch, images = sampler_around(model, self.vae.to(model.device)), self.settings.optim.batch, []
        given, absent = self.given, self.absent
        if model.text.adapted:
            with torch.no_grad():
                given, absent = (model.text(model.text.tokens(words).to(model.device)) for words in (self.prompts, [None]))
        with (
            torch.autocast(model.device.type, dtype=model.dtype, enabled=model.dtype != torch.float32),
            Progress("sampling", len(self.work)) as progress,
        ):
            for first in range(0, len(self.work), batch):
                seeds = [job.seed for job in self.work[first : first + batch]]
                part = given.at(slice(first, first + batch))
                images += sample_encoded(
                    pipe, part, absent, seeds, steps=self.wanted.steps, guidance=self.wanted.guidance, shape=self.shape
                )
                progress.advance(len(seeds))
        return images

    def score(self, images: Sequence[Image]) -> dict[str, np.ndarray]:
        """The scores (N,) of images of all prompts, by scorer.

        Raises:
            UserError: a scorer fails, or gives a score that is not finite.
        """
        import numpy as np

        found = {scorer.name: np.asarray(scorer.score(self.prompts, images)) for scorer in self.scorers}
        for name, values in found.items():
            if not np.isfinite(values).all():
                raise UserError(f"scorer {name} gave {values[~np.isfinite(values)][0]} for a sampled image; use another scorer")
        return found

    def summary(self, scores: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """What the scores say, by scorer, beside its version."""
        from dedpo_diffusion.training.held_out import summarise_scores

        versions = {scorer.name: scorer.version for scorer in self.scorers}
        return {
            name: summarise_scores(values, self.start_scores[name], self.prompts) | {"version": versions[name]}
            for name, values in scores.items()
        }

    def write(self, step: int, images: Sequence[Image], scores: Mapping[str, np.ndarray]) -> None:
        """Write the images as PNG with their index, as `dedpo sample` does, and `grid.png`: one row a prompt, before training and now."""
        from dedpo_diffusion.core.charts import contact_sheet
        from dedpo_diffusion.core.files import atomic_folder
        from dedpo_diffusion.sampling.sampler import save_png, write_index

        def told(found: Mapping[str, np.ndarray]) -> list[str]:
            return ["\n".join(f"{name} {values[k]:.3f}" for name, values in found.items()) for k in range(len(self.work))]

        columns = [("before training", self.start, told(self.start_scores))]
        if step:
            columns.append((f"step {step}", list(images), told(scores)))
        with atomic_folder(self.folder(step)) as temporary:
            for job, image in zip(self.work, images, strict=True):
                save_png(temporary / job.file, image, job, f"{self.settings.model}, step {step} of {self.settings.out.name}")
            write_index(temporary, self.work)
            contact_sheet(self.prompts, columns).save(temporary / "grid.png")


class Validation:
    """All that is looked at in the course of a run.

    Args:
        settings: of the run.
        held_out: the held-out pairs, if there are any.
        grid: what is sampled, if anything; on the main process.
    """

    def __init__(self, settings: TrainSettings, held_out: HeldOut | None, grid: Grid | None) -> None:
        self.settings, self.held_out, self.grid = settings, held_out, grid
        self.lines: list[Mapping[str, Any]] = []
        self.start: Tensor | None = None
        self.start_loss: list[float] = []
        self.told = False
        self.log: MetricsLog | None = None

    def identity(self) -> dict[str, str]:
        """What a resumed run must find unchanged."""
        from dedpo_diffusion.core.files import file_digest

        prompts = self.settings.validation.prompts
        found = {} if self.held_out is None else dict(self.held_out.identity)
        return found if prompts is None else found | {"validation_prompts": file_digest(prompts)}

    def begin(self, session: Session) -> None:
        """Look at the policy before its first step, which is what later ones are compared with; a resumed run does it again."""
        with at_rest(session.model, None):
            if self.held_out is not None:
                self.start = self.held_out.errors(session)
            if self.grid is not None:
                self.grid.begin(session.model)
        if self.start is not None:
            found = self._numbers(session, self.start)["pair_loss"]
            if None in found:
                raise UserError(
                    f"{self.settings.validation.pairs}: the held-out loss is not finite before training; look at these images, or take "
                    "mixed_precision bf16 in place of fp16"
                )
            self.start_loss = found
        session.accelerator.wait_for_everyone()

    def go_on(self, session: Session, done: int) -> dict[str, Any] | None:
        """Take up what the steps done have left; what was written of later ones will be written again.

        A run that was stopped between its last checkpoint and that step's validation has the validation now; its line is returned.
        """
        from dedpo_diffusion.core.files import remove_folder
        from dedpo_diffusion.weights.run_folder import MetricsLog, best_folder, read_metrics

        self.lines = list(read_metrics(self.settings.out, done, LOG))
        session.accelerator.wait_for_everyone()
        if session.accelerator.is_main_process:
            self.log = MetricsLog(self.settings.out, done, LOG, board=session.trackers.board, also=session.trackers.log)
            best = best_folder(self.settings.out)
            if best.is_dir() and json.loads((best / "state.json").read_text(encoding="utf-8"))["step"] > done:
                say(f"{best} is of a later step, which will be taken again; removed")
                remove_folder(best)
        if done and self.due(done) and all(line["step"] != done for line in self.lines):
            return self.measure(session, done)
        return None

    def due(self, step: int) -> bool:
        """Whether there is a validation after this many steps."""
        every = self.settings.validation.every
        return step == self.settings.optim.steps or (every is not None and step % every == 0)

    def measure(self, session: Session, step: int) -> dict[str, Any]:
        """One validation: its line, written to `validation.jsonl`; on the main process also images, and the best step."""
        errors, images = None, None
        with at_rest(session.model, session.average):
            if self.held_out is not None:
                errors = self.held_out.errors(session)
            if self.grid is not None:
                images = self.grid.draw(session.model)
        line: dict[str, Any] = {"step": step} | ({} if errors is None else self._numbers(session, errors))
        if self.grid is not None and images is not None:
            scores = self.grid.score(images)
            self.grid.write(step, images, scores)
            session.trackers.grid(self.grid.folder(step) / "grid.png", step)
            line |= {"scores": self.grid.summary(scores)} if scores else {}
        self.lines.append(line)
        if self.log is not None:
            if self.settings.validation.keep_best:  # first: a line says that its validation is over
                self._keep_best(session, line)
            self.log.write(line)
            self._tell(line)
        session.accelerator.wait_for_everyone()
        return line

    def look(self, line: Mapping[str, Any]) -> list[str]:
        """What the validations so far show that was not told yet, in words."""
        from dedpo_diffusion.training.health import held_out_symptom, score_symptom

        rewards = [spec.partition("=")[0] for spec in self.settings.loop.reward]
        words = None
        if not self.told:
            clusters = None if self.held_out is None else self.held_out.clusters
            words = held_out_symptom(self.lines, self.start_loss, clusters) or score_symptom(self.lines, rewards)
        self.told |= words is not None
        return [] if words is None else [words]

    def close(self) -> None:
        """Close the log."""
        if self.log is not None:
            self.log.close()

    def _numbers(self, session: Session, errors: Tensor) -> dict[str, Any]:
        import torch

        from dedpo_diffusion.training.held_out import summarise_held_out

        assert self.held_out is not None and self.start is not None
        process, rows = session.model.process, self.held_out.rows
        timesteps = torch.stack([self.held_out.draws(number, session).timesteps for number in range(len(rows))])
        weight = session.timesteps.weights(process, timesteps.flatten()).view(timesteps.shape)
        objective = {name: getattr(session.settings.objective, name) for name in OBJECTIVE}
        label = torch.tensor(self.held_out.label[rows])
        options: dict[str, Any] = {"schedule": len(process), "objective": objective, "clusters": self.held_out.clusters}
        return summarise_held_out(errors, self.start, label, timesteps, weight, **options)

    def _tell(self, line: Mapping[str, Any]) -> None:
        words = []
        if line.get("loss") is not None:
            words.append(f"held-out loss {line['loss']:.4f} ({line['start_loss']:.4f} before training)")
        if line.get("accuracy") is not None:
            words.append("accuracy {:.0%} ({:.0%} to {:.0%})".format(line["accuracy"], *line["accuracy_ci"]))
        for name, found in line.get("scores", {}).items():
            words.append(f"{name} {found['mean']:.4f} ({found['gain']:+.4f})")
        say(f"validation after step {line['step']}: {', '.join(words) or 'images sampled'}")

    def _keep_best(self, session: Session, line: Mapping[str, Any]) -> None:
        from dedpo_diffusion.weights.checkpoints import save_checkpoint
        from dedpo_diffusion.weights.run_folder import best_folder, best_line, merit

        found = merit(line)
        if found is None or best_line(self.lines) is not line:
            return
        state = {"step": line["step"], "by": found[0], "value": found[1]}
        averaged = None if session.average is None else session.average.values
        save_checkpoint(best_folder(self.settings.out), session.model.trainable(), None, state, averaged)
