"""The configuration of every stage, one dataclass each, and nothing else.

Field descriptions are the command line's help. Paths are relative to the working folder.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class IngestSettings:
    """Read a preference format into a pair dataset.

    Args:
        format: the source's format, or auto to recognise it.
        source: a file or folder of that format, or a hub id (OWNER/NAME) to stream.
        out: the pair dataset to write; must not exist yet.
        images: folder that image paths in the source are relative to; None takes the folder of the file that names them.
        columns: for your own tables, which column is what: {"prompt": "my caption", "image_0": "left"}; for rapidata, which
            of its questions to read: {"criterion": "alignment"}.
        split: which split of a source that has several; None takes the only one.
        ties: what becomes of answers that call both images equal: a label of 0.5, or no answer.
        unlabelled: what becomes of pairs that nobody judged: a pair without a human label, or no pair.
        identical: what becomes of pairs of one image with itself.
        duplicates: the same two images under one prompt again, on either side: merge adds the answers to the first
            pair's, keep makes another pair.
        unreadable: stop at an image that cannot be read or decoded, or leave its pair out and count it.
        seed: seed of the side shuffle, for sources that list the preferred image first.
        shard_pairs: pairs in one parquet file; an interrupted run goes on after the last whole one.
        workers: threads that read and decode images; None takes one a core.
    """

    format: str
    source: str
    out: Path
    images: Path | None = None
    columns: dict[str, str] = field(default_factory=dict)
    split: str | None = None
    ties: Literal["keep", "drop"] = "keep"
    unlabelled: Literal["keep", "drop"] = "keep"
    identical: Literal["keep", "drop"] = "drop"
    duplicates: Literal["merge", "keep"] = "merge"
    unreadable: Literal["error", "skip"] = "error"
    seed: int = 0
    shard_pairs: int = 1000
    workers: int | None = None


@dataclass(frozen=True)
class ValidateSettings:
    """Check a pair dataset, its labels and votes, and say what training would trip over.

    Args:
        pairs: the pair dataset.
        depth: headers reads the header of every image; decode also decodes each and looks for near-duplicates.
        human: name of the human label file.
        near: largest Hamming distance of two 64-bit perceptual hashes that counts as a near-duplicate.
        out: the report (JSON); None takes PAIRS/validate.json. The same name with .html holds the pictures.
        workers: processes that read; None takes one a core.
        resamples: bootstrap resamples of the agreement's intervals.
        seed: seed of the bootstrap.
    """

    pairs: Path
    depth: Literal["headers", "decode"] = "decode"
    human: str = "human"
    near: int = 3
    out: Path | None = None
    workers: int | None = None
    resamples: int = 2000
    seed: int = 0


@dataclass(frozen=True)
class VoteSettings:
    """Let people label pairs in a web page.

    Args:
        pairs: the pair dataset.
        name: name of the label file that the votes become.
        order: which pairs come first: random, or those that judges disagree on or are unsure of; then each label carries
            the probability with which its pair came up, and merging stays unbiased.
        judges: label files that the disagreement order looks at; empty takes all but the votes' own.
        floor: in the disagreement order, the least pull of a pair on which judges agree, relative to the greatest.
        repeats: share of hidden repetitions with swapped sides, which measure the rater and make no label.
        overlap: share of pairs that every rater is asked about; the others are asked of one rater each.
        seed: seed of order, sides and repeats.
        host: address to listen on; another than this machine's own (127.0.0.1) also needs share.
        port: port to listen on; 0 takes a free one.
        share: allow an address that others can reach; the page then asks for a token, which is printed.
        token: the token to ask for; None makes one when it is needed.
        allow: further host names that browsers may call this server by.
        export_only: write the label file from the votes so far, and stop.
    """

    pairs: Path
    name: str = "human"
    order: Literal["random", "disagreement"] = "random"
    judges: list[str] = field(default_factory=list)
    floor: float = 0.5
    repeats: float = 0.05
    overlap: float = 0.2
    seed: int = 0
    host: str = "127.0.0.1"
    port: int = 8765
    share: bool = False
    token: str | None = None
    allow: list[str] = field(default_factory=list)
    export_only: bool = False


@dataclass(frozen=True)
class ProposeSettings:
    """Make pairs from a model's own images.

    Args:
        model: diffusers folder or hub id; "shapes" is the embedded model.
        prompts: text file, one prompt a line.
        out: the pair dataset to write; must not exist yet.
        images_per_prompt: K images for each prompt line, each with a seed of its own.
        pairing: disjoint gives K / 2 independent pairs a prompt, all gives K (K - 1) / 2.
        seed: the first image's seed; image i gets seed + i.
        steps: sampler steps.
        guidance: classifier-free guidance scale.
        size: pixels of a side; None takes the model's own.
        batch: images sampled at once.
        device: torch device; None takes a GPU if there is one.
        dtype: precision of the sampling model.
        shard_pairs: pairs in one parquet file.
    """

    model: str
    prompts: Path
    out: Path
    images_per_prompt: int = 2
    pairing: Literal["disjoint", "all"] = "disjoint"
    seed: int = 0
    steps: int = 50
    guidance: float = 7.5
    size: int | None = None
    batch: int = 8
    device: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    shard_pairs: int = 1000


@dataclass(frozen=True)
class LabelSettings:
    """Label pairs with a machine judge.

    Args:
        pairs: the pair dataset.
        judge: the judge, as a scorer's name or name=location: pickscore=FOLDER.
        name: name of the label file; None takes the scorer's name.
        temperature: the judge's score difference is divided by this before the sigmoid.
        batch: pairs scored at once.
        device: torch device; None takes a GPU if there is one.
    """

    pairs: Path
    judge: str
    name: str | None = None
    temperature: float = 1.0
    batch: int = 64
    device: str | None = None


@dataclass(frozen=True)
class MergeSettings:
    """Merge human and judge labels into one target and weight per pair.

    Args:
        pairs: the pair dataset.
        method: the estimator; tuned fits the judge's power to the labels, dedpo is the published power 1.
        judge: name of the judge's label file; None takes the only one there is.
        human: name of the human label file.
        name: name of the targets; None takes the method's.
        power: a power to use in place of the tuned one.
        max_overshoot: bound A of how far a labelled target is stretched by the tuned power.
    """

    pairs: Path
    method: Literal["human_only", "naive", "dedpo", "tuned"] = "tuned"
    judge: str | None = None
    human: str = "human"
    name: str | None = None
    power: float | None = None
    max_overshoot: float = 2.0


@dataclass(frozen=True)
class LoraSettings:
    """The adapter.

    Args:
        rank: rank r of every adapted matrix.
        alpha: the adapter's output is scaled by alpha / rank.
        targets: names of the UNet's layers to adapt; None takes the attention projections.
        dropout: dropout on the adapter's input.
    """

    rank: int = 8
    alpha: float = 8.0
    targets: list[str] | None = None
    dropout: float = 0.0


@dataclass(frozen=True)
class DataSettings:
    """What is trained on.

    Args:
        pairs: the pair dataset.
        targets: name of the merged targets in it.
        size: pixels of a side after resizing and cropping; None takes the model's own.
        cache: folder of encoded images and prompts, shared between runs; None encodes them in every step.
        flip: mirror both images of a pair alike, half of the time (not with a cache).
        crop: centre, or random: both images of a pair at the same relative place (not with a cache).
        sampling: how often each pair is visited: uniform, or importance, in proportion to its gradient at margin 0;
            the weights make up for it, so both estimate the same loss.
        caption_dropout: share of pairs trained with the empty prompt, both images alike.
    """

    pairs: Path
    targets: str = "tuned"
    size: int | None = None
    cache: Path | None = None
    flip: bool = False
    crop: Literal["centre", "random"] = "centre"
    sampling: Literal["uniform", "importance"] = "importance"
    caption_dropout: float = 0.0


@dataclass(frozen=True)
class ObjectiveSettings:
    """What is minimised.

    Args:
        beta: strength of the pull to the reference, in the convention of Diffusion-DPO's published code.
        kind: the pair loss.
        balance: Balanced-DPO's gradient reweighting, per pair at its own timestep.
        balance_clip: bound of the balance's log-ratio u.
        margin_cap: bound on what the part of a target outside [0, 1] can add to the margin; None leaves it unbounded.
        timesteps: the range [first, last) that timesteps are drawn from, in steps of the training schedule.
    """

    beta: float = 2000.0
    kind: Literal["sigmoid"] = "sigmoid"
    balance: Literal["none", "output", "relative"] = "output"
    balance_clip: float = 10.0
    margin_cap: float | None = 10.0
    timesteps: tuple[int, int] | None = None


@dataclass(frozen=True)
class OptimSettings:
    """How it is minimised.

    Args:
        learning_rate: peak learning rate of AdamW; it should scale like 1 / beta.
        steps: optimizer steps.
        batch: pairs in one forward pass of one process.
        accumulation: forward passes per optimizer step.
        warmup: steps of linear warm-up.
        schedule: learning rate after the warm-up.
        clip: largest norm of the gradient.
        weight_decay: AdamW's decoupled weight decay.
        betas: AdamW's moment decays.
    """

    learning_rate: float = 1e-4
    steps: int = 1000
    batch: int = 4
    accumulation: int = 1
    warmup: int = 50
    schedule: Literal["constant", "cosine"] = "constant"
    clip: float = 1.0
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.999)


@dataclass(frozen=True)
class TrainSettings:
    """Train a LoRA on merged preference targets.

    Args:
        model: diffusers folder or hub id of the base; "shapes" is the embedded model.
        out: the run folder.
        data: what is trained on.
        lora: the adapter.
        objective: what is minimised.
        optim: how it is minimised.
        seed: seed of every draw.
        mixed_precision: compute precision; weights of the adapter, errors and losses stay float32.
        gradient_checkpointing: trade compute for memory.
        attention: torch's own attention, or that of xformers (CUDA only).
        checkpoint_every: steps between checkpoints.
        keep_checkpoints: how many of the newest checkpoints are kept.
        log_every: steps between lines of metrics.jsonl.
        device: cpu forces the CPU; None lets accelerate choose.
    """

    model: str
    out: Path
    data: DataSettings
    lora: LoraSettings = field(default_factory=LoraSettings)
    objective: ObjectiveSettings = field(default_factory=ObjectiveSettings)
    optim: OptimSettings = field(default_factory=OptimSettings)
    seed: int = 0
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    gradient_checkpointing: bool = False
    attention: Literal["sdpa", "xformers"] = "sdpa"
    checkpoint_every: int = 100
    keep_checkpoints: int = 2
    log_every: int = 10
    device: Literal["cpu"] | None = None


@dataclass(frozen=True)
class ExportSettings:
    """Write a run's adapter as one weight file.

    Args:
        run: the run folder.
        out: the file to write.
        format: layout of the file.
    """

    run: Path
    out: Path
    format: Literal["diffusers"] = "diffusers"


@dataclass(frozen=True)
class SampleSettings:
    """Sample images, seed-paired with every other model sampled with the same prompts and seed.

    Args:
        model: diffusers folder or hub id; "shapes" is the embedded model.
        prompts: text file, one prompt a line.
        out: folder for the images and index.parquet.
        lora: adapter file to load.
        seeds: images per prompt.
        seed: the first image's seed; image i gets seed + i.
        steps: sampler steps.
        guidance: classifier-free guidance scale.
        size: pixels of a side; None takes the model's own.
        batch: images sampled at once.
        device: torch device; None takes a GPU if there is one.
        dtype: precision of the model.
    """

    model: str
    prompts: Path
    out: Path
    lora: Path | None = None
    seeds: int = 1
    seed: int = 0
    steps: int = 50
    guidance: float = 7.5
    size: int | None = None
    batch: int = 8
    device: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"


@dataclass(frozen=True)
class ScoreSettings:
    """Score a folder of samples.

    Args:
        folder: the sample folder.
        scorers: scorers, each as name or name=location: pickscore=FOLDER, oracle_reward.
        batch: images scored at once.
        device: torch device; None takes a GPU if there is one.
    """

    folder: Path
    scorers: list[str]
    batch: int = 64
    device: str | None = None


@dataclass(frozen=True)
class CompareSettings:
    """Compare sample folders that share prompts and seeds; the first is the base.

    Args:
        folders: two or more scored sample folders; their names name the arms.
        out: the page to write; results.json lies beside it.
        primary: the scorer of the verdict; None takes the first that all folders share.
        runs: run folders whose training curves the page shows.
        targets: report (JSON) of merged targets that the page shows.
        held_out: scorers that made no training label; the page marks the others.
        resamples: bootstrap resamples.
        seed: seed of the bootstrap.
    """

    folders: list[Path]
    out: Path = Path("report.html")
    primary: str | None = None
    runs: list[Path] = field(default_factory=list)
    targets: list[Path] = field(default_factory=list)
    held_out: list[str] = field(default_factory=list)
    resamples: int = 10000
    seed: int = 0


@dataclass(frozen=True)
class QuickstartSettings:
    """The whole journey on the embedded world.

    Args:
        out: folder for everything that is made.
        seed: seed of every draw.
        pairs: how many pairs the base model proposes.
        human_share: share of pairs that the simulated human labels.
        steps: optimizer steps of each arm.
        eval_seeds: images per prompt in the evaluation (144 prompts).
    """

    out: Path = Path("quickstart")
    seed: int = 0
    pairs: int = 800
    human_share: float = 0.25
    steps: int = 250
    eval_seeds: int = 3
