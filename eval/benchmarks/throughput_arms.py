"""The arms of `throughput.py`: the published step, and this project's with less and less left to compute."""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from unittest import mock

import numpy as np
import torch

from dedpo_diffusion.core.console import track

if TYPE_CHECKING:
    from dedpo_diffusion.models.backbone import Backbone
    from dedpo_diffusion.training.data import Loaded
    from dedpo_diffusion.training.setup import Session

OURS = ("live", "cached", "stored")
DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}
PROMPT = "a large red circle on a white background, in the style of number {}"


@dataclass(frozen=True)
class ThroughputSettings:
    """Settings of the benchmark.

    Args:
        out: file for the result (JSON).
        model: what is trained.
        device: cpu or cuda.
        dtype: compute precision.
        pairs: of a step.
        rank: of the adapter, and its alpha.
        weights: lora, or full for the whole UNet, of which there is no published arm.
        gradient_checkpointing: in all arms alike; selective in this project's arms alone, the published step then has none.
        compile: compile the UNet's blocks, in this project's arms.
        rounds: that are timed.
        warmup: rounds before them.
        steps: of each arm in a round.
        dataset: pairs of the dataset.
        threads: of torch, on the processor.
        folder: where dataset and cache are made; None takes the system's temporary folder.
    """

    out: Path
    model: Literal["small_sdxl", "sdxl", "sd15"] = "small_sdxl"
    device: Literal["cpu", "cuda"] = "cpu"
    dtype: Literal["float32", "bf16"] = "float32"
    pairs: int = 4
    rank: int = 8
    weights: Literal["lora", "full"] = "lora"
    gradient_checkpointing: bool | Literal["selective"] = False
    compile: bool = False
    rounds: int = 24
    warmup: int = 2
    steps: int = 1
    dataset: int = 16
    threads: int = 2
    folder: Path | None = None


class PhaseTimer:
    """Seconds spent in each part of a step, those of a part inside of another counted there alone."""

    def __init__(self, wait: Callable[[], None]) -> None:
        """`wait` returns when the device is idle."""
        self.wait, self.seconds, self._open = wait, {}, []  # type: ignore[var-annotated]
        self._since = 0.0

    def _turn(self) -> None:
        """Count the time since the last turn for the innermost part that is open."""
        self.wait()
        now = time.perf_counter()
        if self._open:
            self.seconds[self._open[-1]] = self.seconds.get(self._open[-1], 0.0) + now - self._since
        self._since = now

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """A part of the step."""
        self._turn()
        self._open.append(name)
        try:
            yield
        finally:
            self._turn()
            self._open.pop()

    def around(self, call: Callable[..., Any], name: Callable[[dict[str, Any]], str]) -> Callable[..., Any]:
        """The same call as a part, which is named by its keyword arguments."""

        def timed(*args: Any, **options: Any) -> Any:
            with self(name(options)):
                return call(*args, **options)

        return timed


@dataclass(frozen=True)
class Arm:
    """One way to train: `step(phases)` takes a step and returns its loss; `own` is what a run of it alone keeps."""

    step: Callable[[PhaseTimer | None], Any]
    own: Callable[[], list[torch.Tensor]]


@dataclass(frozen=True)
class Bench:
    """What is compared: the arms by name, and the backbone of those that are this project's."""

    arms: dict[str, Arm]
    model: Backbone
    wait: Callable[[], None]


def write_dataset(folder: Path, count: int, size: int) -> Path:
    """A dataset of smooth random JPEGs with a prompt and a hard label each."""
    from PIL import Image

    from dedpo_diffusion.core.records import Pair, Targets
    from dedpo_diffusion.labels.files import write_targets
    from dedpo_diffusion.pairs.dataset import PairWriter

    rng = np.random.default_rng(0)

    def picture() -> bytes:
        buffer = io.BytesIO()
        coarse = Image.fromarray(rng.integers(0, 256, (size // 16, size // 16, 3), dtype=np.uint8))
        coarse.resize((size, size), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
        return buffer.getvalue()

    with PairWriter(folder) as writer:
        for k in track(range(count), f"making {count} pairs", count):
            writer.add(Pair(f"pair-{k}", PROMPT.format(k), picture(), picture()))
    target = (np.arange(count) % 3 == 0).astype(np.float64)
    write_targets(folder, "benchmark", Targets([f"pair-{k}" for k in range(count)], target, np.ones(count)), {})
    return folder


def ours(sessions: dict[str, Session], name: str) -> Callable[[PhaseTimer | None], Any]:
    """The step of `dedpo train` in this arm."""
    from dedpo_diffusion.dpo.noising import draw
    from dedpo_diffusion.pipelines import train

    session, done = sessions[name], [0]
    loads, pairs, clip = train.micro_batches(session, 0), session.settings.optim.batch, session.settings.optim.clip

    def step(loaded: Loaded) -> torch.Tensor:
        result, *_ = train.learn(session, loaded)
        session.accelerator.clip_grad_norm_(session.model.trainable().values(), clip)
        session.optimizer.step()
        session.optimizer.zero_grad()
        return result.loss.detach().mean()  # not read: `dedpo train` waits for the device at every tenth step alone

    def load() -> Loaded:
        """What another thread does in training."""
        now = draw(session.settings.seed, done[0], pairs, session.loader.shape(0), timesteps=session.timesteps, caption_dropout=0.0)
        done[0] += 1
        return session.loader.load((done[0] - 1) * pairs, now)

    def watched(phases: PhaseTimer | None) -> torch.Tensor:
        if phases is None:
            return step(next(loads))
        parts = [(session.model, "encode_images", "latents"), (session.model, "encode_tokens", "text"),
                 (session.accelerator, "backward", "backward"), (session.accelerator, "clip_grad_norm_", "optimizer"),
                 (session.optimizer, "step", "optimizer"), (session.optimizer, "zero_grad", "optimizer")]  # fmt: skip
        with ExitStack() as stack:
            for owner, call, part in parts:
                timed = phases.around(getattr(owner, call), lambda _, part=part: part)
                stack.enter_context(mock.patch.object(owner, call, timed))
            predict = phases.around(session.model.predict, lambda given: "reference" if given.get("reference") else "policy")
            stack.enter_context(mock.patch.object(session.model, "predict", predict))
            with phases("loading"):
                loaded = load()
            with phases("noise, target, loss"):
                return step(loaded)

    return watched


def train_settings(settings: ThroughputSettings, pairs: Path, cache: Path) -> Any:
    """What `dedpo train` would be told."""
    from dedpo_diffusion.settings import DataSettings, LoraSettings, OptimSettings, TrainSettings

    return TrainSettings(
        model=settings.model, out=pairs / "run",
        data=DataSettings(pairs, "benchmark", cache=cache, sampling="uniform", reference_draws=2),
        weights=settings.weights, lora=LoraSettings(rank=settings.rank, alpha=settings.rank),
        optim=OptimSettings(batch=settings.pairs, learning_rate=1e-6),
        mixed_precision="no" if settings.dtype == "float32" else "bf16", gradient_checkpointing=settings.gradient_checkpointing,
    )  # fmt: skip


def set_up(settings: ThroughputSettings, model: Backbone, folder: Path) -> Bench:
    """All arms on one dataset: the published step on a UNet of its own, the project's on the backbone."""
    from accelerate import Accelerator

    from dedpo_diffusion.evaluation.benchmarks.published_step import Examples, PublishedStep
    from dedpo_diffusion.pairs.dataset import PairReader
    from dedpo_diffusion.training.base import add_lora
    from dedpo_diffusion.training.data import PairLoader
    from dedpo_diffusion.training.optimizers import build_optimizer
    from dedpo_diffusion.training.setup import Session, open_grid, timestep_draw
    from dedpo_diffusion.training.sources import CachedSource, LiveSource, open_cache
    from dedpo_diffusion.training.trackers import Trackers

    size = model.size
    reader = PairReader(write_dataset(folder / "pairs", settings.dataset, size))
    told = train_settings(settings, reader.folder, folder / "cache")
    optim, data = told.optim, told.data
    accelerator = Accelerator(mixed_precision=told.mixed_precision, cpu=settings.device == "cpu")
    live = LiveSource(reader, model, data, size=size, seed=told.seed)
    cached = CachedSource(open_cache(reader, model, data, root=data.cache, fingerprint=reader.fingerprint(), size=size), model.channels)
    visited: dict[str, Any] = {"targets": data.targets, "seed": told.seed, "sampling": data.sampling, "together": optim.batch}
    loaders = {name: PairLoader(reader, live if name == "live" else cached, **visited) for name in OURS}
    model.place()
    preferred = (loaders["live"].target < 0.5).int().numpy()
    arms = {}
    if settings.weights == "lora":
        published = PublishedStep(
            model, Examples(reader, preferred, model.text.tokenizers, size, flip=True), rank=settings.rank, batch=optim.batch,
            beta=told.objective.beta, learning_rate=optim.learning_rate, checkpointing=settings.gradient_checkpointing is True,
        )  # fmt: skip
        theirs = [published.unet, published.vae, *published.text_encoders]
        arms["published"] = Arm(lambda phases: _published(published, phases), lambda: _tensors(theirs, published.optimizer))
        add_lora(told, model)
    loaders["stored"].grid = open_grid(told, reader, cached, model, loaders["stored"])
    if settings.weights == "full":
        model.train_all(reference=True)
    if settings.gradient_checkpointing:
        model.checkpoint(selective=settings.gradient_checkpointing == "selective")
    optimizer = build_optimizer(
        optim.optimizer, model.trainable().values(), learning_rate=optim.learning_rate, betas=optim.betas, weight_decay=optim.weight_decay
    )
    model.policy, prepared = accelerator.prepare(model.network, optimizer)
    common: dict[str, Any] = {"settings": told, "accelerator": accelerator, "model": model, "optimizer": prepared}
    common |= {"timesteps": timestep_draw(told.objective, len(model.process)), "average": None, "adaptive": None}
    common |= {"validation": None, "hosts": None, "trackers": Trackers(told, active=False)}
    sessions = {name: Session(loader=loader, **common) for name, loader in loaders.items()}

    def held(name: str) -> list[torch.Tensor]:
        modules = [model.unet] + ([model.vae, *model.text.encoders] if name == "live" else [])
        modules += [model.frozen] if name != "stored" and model.frozen is not None else []
        return _tensors(modules, optimizer)

    arms |= {name: Arm(ours(sessions, name), lambda name=name: held(name)) for name in OURS}
    return Bench(arms, model, torch.cuda.synchronize if settings.device == "cuda" else lambda: None)


def _published(published: Any, phases: PhaseTimer | None) -> float:
    if phases is None:
        return published.step()
    with phases("noise, target, loss"):
        return published.step(phases)


def _tensors(modules: list[Any], optimizer: Any) -> list[torch.Tensor]:
    """Weights of modules, and what an optimizer remembers."""
    found = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
    return found + [value for state in optimizer.state.values() for value in state.values() if isinstance(value, torch.Tensor)]
