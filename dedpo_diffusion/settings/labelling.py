"""Settings of the stages that make labels and merge them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

from dedpo_diffusion.core.defaults import DEFAULT_METHOD
from dedpo_diffusion.settings.engine import RaySettings


@dataclass(frozen=True)
class VlmSettings:
    """How a vision-language model is asked.

    Args:
        prompt: a text file with the question; {prompt} in it stands for the pair's prompt. None takes the package's own.
        min_validity: the least probability of the two allowed answers together; below it the pair has no answer.
        max_side: longer images are shrunk to this many pixels before the model sees them; None leaves them.
        batch: pairs that a local model sees at once, each in both orders; a server takes what server.concurrency says.
    """

    prompt: Path | None = None
    min_validity: float = 0.5
    max_side: int | None = 1024
    batch: int = 4


@dataclass(frozen=True)
class ServerSettings:
    """A model behind a server that speaks OpenAI's protocol.

    Args:
        model: the model's name there; None takes the only one that the server lists.
        key_variable: the environment variable that holds the key, if the server wants one; the key itself is never stored.
        logprobs: ask for token probabilities; auto falls back to sampled text where the server has none.
        samples: how often a pair is asked in each order where there are no token probabilities.
        answer_tokens: tokens that a written answer may have, thinking included; None is 16, and more where the first contact shows that
            the model writes sentences (256) or thinks (4096).
        concurrency: requests under way at once, of each process or worker.
        per_minute: requests begun in a minute, at most, of each process or worker; None has no limit.
        retries: further attempts after a timeout, a lost connection, a busy or a failing server.
        timeout: seconds until an attempt counts as failed.
        failures: consecutive pairs that may fail for the server's sake before the run stops.
        price_in: price of a million prompt tokens, for the summary.
        price_out: price of a million answer tokens.
        budget: the run stops, and keeps what it has, once its answers cost this much, of each process or worker; None has no limit.
    """

    model: str | None = None
    key_variable: str = "OPENAI_API_KEY"
    logprobs: Literal["auto", "yes", "no"] = "auto"
    samples: int = 5
    answer_tokens: int | None = None
    concurrency: int = 8
    per_minute: float | None = None
    retries: int = 5
    timeout: float = 120.0
    failures: int = 20
    price_in: float = 0.0
    price_out: float = 0.0
    budget: float | None = None


@dataclass(frozen=True)
class SelfTrainingSettings:
    """How a trained policy's implicit reward is read.

    Args:
        draws: fixed pairs of a timestep and a noise that every image's errors are averaged over.
        timesteps: range [first, last) of the timesteps, evenly spread; None takes the run's own.
        size: image side in pixels; None takes the run's own.
        seed: seed of the noises.
        batch: pairs that go through the model at once.
    """

    draws: int = 16
    timesteps: tuple[int, int] | None = None
    size: int | None = None
    seed: int = 0
    batch: int = 8


@dataclass(frozen=True)
class LabelSettings:
    """Label pairs with machine judges.

    Args:
        pairs: the pair dataset.
        judges: the judges: a scorer's name or name=location (pickscore, clip=MODEL:TAG, hps, aesthetic, http=URL), or
            vlm=FOLDER, openai=URL, self=RUN,RUN.
        name: name of the label file, for one judge; None takes the judge's name.
        temperature: a judge's score difference is divided by this before the sigmoid; None takes each judge's own.
        batch: pairs judged at once, halved where the GPU's memory is too small; auto is 64, or fewer by what the first ones took.
        shard: pairs after which labels are kept on disk; a killed run repeats at most one shard for each process or worker.
        device: torch device; None takes a GPU if there is one.
        dtype: precision of scorers' towers and of a local vision-language model; scores are float32 always.
            Auto is bfloat16 on a GPU (float16 on one without it) and float32 on a CPU.
        workers: threads that read and decode images ahead of the judges.
        human: name of the human label file that the summary compares with.
        summary: compare the labels with people's when done, if there are any.
        keep_embeddings: keep what a scorer's image tower saw (PAIRS/embeddings), from which `dedpo calibrate --method adapt` may learn.
        vlm: how vision-language models are asked.
        server: the server of judge openai.
        self_training: how judge self reads a policy's reward.
        engine: who does the work: local is this process (`accelerate launch` starts one for each GPU of this machine), ray the nodes of a
            Ray cluster.
        ray: the cluster of --engine ray.
    """

    pairs: Path
    judges: list[str] = field(metadata={"plugins": ["dedpo_diffusion.judges", "dedpo_diffusion.scorers"]})
    name: str | None = None
    temperature: float | None = None
    batch: int | Literal["auto"] = "auto"
    shard: int = 256
    device: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    workers: int = 2
    human: str = "human"
    summary: bool = True
    keep_embeddings: bool = False
    vlm: VlmSettings = field(default_factory=VlmSettings)
    server: ServerSettings = field(default_factory=ServerSettings)
    self_training: SelfTrainingSettings = field(default_factory=SelfTrainingSettings)
    engine: Literal["local", "ray"] = field(default="local", metadata={"recorded": False})
    ray: RaySettings = field(default_factory=RaySettings, metadata={"recorded": False})
    FIRST: ClassVar[dict[str, str]] = {  # what `--help` shows
        "what is labelled, and by whom": "pairs with name human",
        "memory and speed": "batch dtype device workers engine",
        "of judges that answer questions": "vlm.prompt server.model",
    }


@dataclass(frozen=True)
class CalibrateSettings:
    """Calibrate judges' labels on the human ones, and stack several judges into one.

    Args:
        pairs: the pair dataset.
        judges: label files to use; empty takes all that hold raw scores, but calibrated ones and those of judge self, which learned
            from people's labels already.
        method: temperature makes one label file for each judge, stack one of all judges. adapt makes one of all judges too
            and teaches it what people mind that they do not: image statistics, generators, embeddings, each where it helps.
        name: name of the new label file, for one judge, a stack or an adapted one; None takes JUDGE-METHOD, stack or adapt.
        human: name of the human label file.
        folds: the labelled pairs are split into this many parts; each is calibrated on the others.
        invert: let a judge that agrees with people less often than a coin count the other way round.
        statistics: let method adapt look at every image (brightness, contrast, clutter, ...); they are measured once.
        seed: seed of the folds and the bootstrap.
    """

    pairs: Path
    judges: list[str] = field(default_factory=list)
    method: Literal["temperature", "stack", "adapt"] = "temperature"
    name: str | None = None
    human: str = "human"
    folds: int = 5
    invert: bool = False
    statistics: bool = True
    seed: int = 0
    FIRST: ClassVar[dict[str, str]] = {  # what `--help` shows
        "what is calibrated": "pairs judges human",
        "how": "method folds invert statistics",
        "what is written": "name",
    }


@dataclass(frozen=True)
class MergeSettings:
    """Merge human and judge labels into one target and weight per pair.

    Args:
        pairs: the pair dataset.
        method: the estimator; tuned fits the judge's power to the labels, dedpo is the published power 1. adapted takes the labels of a
            judge that people taught everywhere, and corrects them by what is surely systematic; where no judge is named, people teach
            those that are there first (`dedpo calibrate --method adapt`), and where they cannot, the method is tuned.
        judge: name of the judge's label file; None takes the only one there is.
        judges: several judges' label files, each of which gets a power of its own: A,B.
        human: name of the human label file.
        name: name of the targets; None takes the method's.
        power: a power to use in place of the tuned one; for several judges one each: [0.3,0.2].
        rule: how the power is fitted: plug_in takes the estimate, half half of it (three quarters of the gain at the start of
            training, and safer once margins have grown), minus_se one standard error less, cross_fitted for each pair the
            estimate from labels of other pairs.
        max_overshoot: bound A of how far a labelled target is stretched by the tuned power.
        propensities: how likely each pair was to be labelled: stored takes what the human label file says, at random if it says
            nothing; estimate fits it to the judge's label and confidence and source columns (numbers, and texts of at
            most 50 values); none takes labels as taken at random.
        population: people labelled pairs of another population than those that are trained on: a column that says which pairs were drawn
            for them, source_NAME of the dataset or of the human label file, of truth values, or NAME=VALUE. Labels are then weighted
            by a density ratio, estimated from what is known of the pairs, and the other pairs are what targets are for. With
            method adapted, judges are taught with these weights.
        other: the same where the human labels lie in another pair dataset, whose images are not trained on.
        correction: of method adapted, from 0 (labelled pairs keep the human label) to 1 (DeDPO); None takes what the labels ask for.
        rater_agreement: of method adapted: how often two people agree on a pair, if that is known; a single answer then moves its pair
            only as far as its noise allows.
        visits: optimizer steps times pairs of a step: tuned takes the power that is best for a run of this length.
        noise_ratio: with visits: the mean squared gradient of one visit over that of its pair.
        plan: write no targets, but tell how many more human labels, taken at random, make the labels worth this many.
        missing: what becomes of pairs without the judge's answer: an error, or the judge counts as undecided there (0.5).
        folds: also write targets NAME-fold-0, -1, ..., each without the pairs of one fold, so that policies can be trained
            whose rewards label the pairs that they never saw (judge self); 0 writes none.
        picture: draw the report beside the targets (NAME.png).
        seed: seed of the folds, of intervals and of what is fitted in folds.
    """

    pairs: Path
    method: Literal["human_only", "naive", "dedpo", "tuned", "adapted"] = DEFAULT_METHOD
    judge: str | None = None
    judges: list[str] = field(default_factory=list)
    human: str = "human"
    name: str | None = None
    power: float | list[float] | None = None
    rule: Literal["plug_in", "half", "minus_se", "cross_fitted"] = "plug_in"
    max_overshoot: float = 2.0
    propensities: Literal["stored", "estimate", "none"] = "stored"
    population: str | None = None
    other: Path | None = None
    correction: float | None = None
    rater_agreement: float | None = None
    visits: int | None = None
    noise_ratio: float | None = None
    plan: float | None = None
    missing: Literal["error", "tie"] = "error"
    folds: int = 0
    picture: bool = True
    seed: int = 0
    FIRST: ClassVar[dict[str, str]] = {  # what `--help` shows
        "what is merged": "pairs human judge judges",
        "how": "method power missing",
        "what is written": "name plan",
    }
