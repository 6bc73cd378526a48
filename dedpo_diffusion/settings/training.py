"""Settings of training, export and of the stage that looks at weights."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

Kind = Literal["sigmoid", "linear", "ipo", "cdpo", "dr_dpo", "kto", "mapo", "sft"]
Policy = Literal["loop", "apa"]  # trained on the model's own images by a reward, see LoopSettings
Tracker = Literal["tensorboard", "wandb", "mlflow", "trackio", "none"]


@dataclass(frozen=True)
class LoraSettings:
    """The adapter.

    Args:
        rank: rank r of every adapted matrix.
        alpha: the adapter's output is scaled by alpha / rank.
        targets: names of the UNet's layers to adapt; None takes the attention projections.
        dropout: dropout on the adapter's input.
        rslora: scale by alpha / sqrt(rank) instead (arXiv 2312.03732).
        dora: train the magnitudes of the weights' rows apart from their directions (arXiv 2402.09353).
        text_encoders: adapt the text encoders too, on their attention projections; with a cache, they then stay in memory.
        start: an adapter's file to continue training from, of the same rank and layers; the reference is then the base with it.
    """

    rank: int = 8
    alpha: float = 8.0
    targets: list[str] | None = None
    dropout: float = 0.0
    rslora: bool = False
    dora: bool = False
    text_encoders: bool = False
    start: Path | None = None


@dataclass(frozen=True)
class DataSettings:
    """What is trained on.

    Args:
        pairs: the pair dataset. The objectives loop and apa sample its prompts, or those of a prompt set or file given in its place.
        targets: name of the merged targets in it; auto takes the only ones there are.
        size: pixels of a side after resizing and cropping; None takes the model's own.
        cache: folder of encoded images and prompts, shared between runs; None encodes them in every step. auto takes the user's own cache
            folder (`dedpo cache` lists it) where that pays: each pair is visited twice or more on average, which saves 1000 encodings or
            more, and there is room; or where another option needs a cache.
        flip: mirror both images of a pair alike, half of the time.
        crop: centre, or random: both images of a pair at the same relative place.
        views: how many mirrored or cropped versions of a pair a cache keeps; without a cache they are drawn anew at every visit.
        buckets: keep the shape of each pair's images, up to 2 : 1, at about size x size pixels, rather than crop a square; each step then
            takes pairs of one shape. It needs a cache.
        groups: the most images of one prompt that are visited together: they share timestep and noise, each goes through the model once,
            and all pairs among them are learned from. It pays for rankings and for `dedpo propose --pairing all`. optim.batch then counts
            groups; those of a step have equally many images. It needs a cache. None visits single pairs.
        sampling: how often each pair is visited: uniform, or importance, in proportion to its gradient at margin 0. The weights make up
            for it, so both estimate the same loss.
        cluster_weights: what a prompt of many pairs counts against one of few: none weighs every pair as it was merged, sqrt divides by
            the root of the number of its prompt's pairs, equal by that number, so that every prompt counts alike. The sum of all weights
            stays.
        label_share: what part of the visits goes to the pairs that people labelled, with targets of method adapted. auto takes what suits
            a run of this length, and no less than merged, which leaves the weights as they were merged; or a number from 0 to 1.
        caption_dropout: share of pairs trained with the empty prompt, both images alike.
        reference_draws: draw this many timesteps and noises for each pair beforehand and keep the reference's errors at them beside the
            cache, shared by all runs on it that have the same optim.batch: none predicts with the reference again. It pays when several
            runs share them. auto takes 8 where each pair is visited more often than that, and none elsewhere.
        noise: shared gives both images of a pair the same noise, as published; independent draws it for each image. own takes the noise
            that an image was sampled from, where its file tells (`dedpo propose`, same model and size), else the noise that leads to it,
            found once by inverting DDIM with the reference; inverted inverts all. These two need data.reference_draws, and keep noise for
            every image and draw. docs/results.md says what was measured.
        inversion_steps: steps of that inversion beside the draws' own timesteps.
    """

    pairs: Path
    targets: str = "auto"
    size: int | None = None
    cache: Literal["auto"] | Path | None = "auto"
    flip: bool = False
    crop: Literal["centre", "random"] = "centre"
    views: int = 1
    buckets: bool = False
    groups: int | None = None
    sampling: Literal["uniform", "importance"] = "importance"
    cluster_weights: Literal["none", "sqrt", "equal"] = "none"
    label_share: Literal["auto", "merged"] | float = "auto"
    caption_dropout: float = 0.0
    reference_draws: int | Literal["auto"] | None = None
    noise: Literal["shared", "independent", "own", "inverted"] = "shared"
    inversion_steps: int = 20


@dataclass(frozen=True)
class ObjectiveSettings:
    """What is minimised.

    Args:
        beta: strength of the pull to the reference, in the convention of Diffusion-DPO's published code.
        sharpness: the margin, at this beta, at which the median pair is to stop; beta is then divided by what that takes. None leaves
            beta as it is. docs/objectives.md says what it does.
        kind: the objective; docs/objectives.md compares them. Other packages can add some. loop and apa learn from a reward of the
            model's own images instead of pairs, see the options of loop.
        options: numbers of the objective, by name; those left out keep their defaults.
        balance: Balanced-DPO's gradient reweighting, per pair at its own timestep, for objectives that move both errors of a pair by equal
            and opposite gradients; adadpo is AdaDPO's. none won wherever LoRAs were compared at their best strength.
        balance_clip: bound of the balance's log-ratio u.
        balance_tempering: factor of u in balance=probability and adadpo, whose ratios are extreme at small timesteps without it.
        margin_cap: bound on what the part of a target outside [0, 1] can add to the margin; None leaves it unbounded.
        timesteps: the range [first, last) that timesteps are drawn from, in steps of the training schedule.
        timestep_sampling: how they are drawn from it. measured draws them in proportion to the size of the gradients in their tenth of the
            range (the root of their second moment), measured before the first step and followed by a moving average; weights make up for
            it, so the loss is that of uniform, with less noise. One draw in ten stays uniform, so no weight is above 10.
        timestep_location: of the logit-normal; below 0 favours small timesteps.
        timestep_spread: of the logit-normal.
        timestep_strata: the pairs of a step, over all its forward passes and processes, take one timestep from each of as many equal parts
            of the distribution, in random order, rather than independent ones: less noise, the same loss. With data.reference_draws the
            K stored draws of a pair take one from each of K parts, and the pairs of a step draws from each part alike.
        timestep_weighting: factor of the pair losses, outside the sigmoid. equal_noise lets every tenth of the range put equally much noise
            into the gradient, as measured and followed: another objective, in which noisy timesteps count for less. No weight is more than
            50 times as small as the mean gradient asks for.
        timestep_pairs: how many pairs gradients are measured on, at one timestep in each tenth, for measured and equal_noise.
        timestep_decay: of their moving average, for each step.
        snr_gamma: of min_snr.
        power: fixed keeps the power that `dedpo merge` chose; adaptive estimates it anew while margins grow, by a moving average, for
            the kind sigmoid alone; measured measures before the first step how noisy this run's visits are, and takes the power
            that is best in a run of this length, for targets of the methods tuned and dedpo.
        power_pairs: how many pairs the noise is measured on, with power=measured.
        power_draws: how many timesteps and noises are drawn for each of these pairs.
        power_decay: of that moving average, for each step.
        max_overshoot: bound A of how far a labelled target is stretched by an adaptive power, and by a measured one where the merge did
            not tune its own.
    """

    beta: float = 2000.0
    sharpness: float | None = None
    kind: Literal[Kind, Policy] | str = field(default="sigmoid", metadata={"plugins": ["dedpo_diffusion.objectives"]})
    options: dict[str, float] = field(default_factory=dict)
    balance: Literal["none", "output", "relative", "probability", "adadpo"] = "none"
    balance_clip: float = 10.0
    balance_tempering: float = 1e-3
    margin_cap: float | None = 10.0
    timesteps: tuple[int, int] | None = None
    timestep_sampling: Literal["uniform", "logit_normal", "measured"] = "uniform"
    timestep_location: float = 0.0
    timestep_spread: float = 1.0
    timestep_strata: bool = True
    timestep_weighting: Literal["none", "min_snr", "equal_noise"] = "none"
    timestep_pairs: int = 32
    timestep_decay: float = 0.98
    snr_gamma: float = 5.0
    power: Literal["fixed", "adaptive", "measured"] = "fixed"
    power_pairs: int = 64
    power_draws: int = 4
    power_decay: float = 0.98
    max_overshoot: float = 2.0

    def step_options(self) -> dict[str, Any]:
        """What `dpo.step.preference_step` takes of them."""
        names = ("beta", "kind", "options", "margin_cap", "balance", "balance_clip", "balance_tempering")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class LoopSettings:
    """Learning from a reward: how images are sampled in training, and what they are rewarded for. For the kinds loop and apa.

    Rollouts and optimizer steps take turns: some prompts, several images of each by the model as it is, their rewards, then `updates`
    optimizer steps of optim.batch x optim.accumulation visits per process. A visit is of one denoising step of one image.

    Args:
        reward: what scores an image, as in `dedpo score --with`: a scorer, or adapted=PAIRS/labels/adapt.json, the judge that people
            taught. Several are added up.
        weights: factors of these rewards, one each; none are 1 each.
        prompts: prompts of a rollout.
        images: images of each prompt, at least 2: the mean reward of the others is what an image's reward is compared with.
        updates: optimizer steps between two rollouts.
        steps: sampler steps of an image.
        guidance: classifier-free guidance scale, in sampling and in training alike; 1 leaves guidance out, at half the cost.
        eta: share of DDPM's noise in a sampler step, above 0; 1 is DDPM.
        batch: images sampled at once.
        clip: of loop, how far from 1 the probability ratio of a denoising step still counts.
        kl: of loop, weight of the KL divergence of trajectories from the reference's, in units of reward. 0 never asks the reference.
        temperature: of apa, lambda: what a unit of KL divergence from the reference costs, in units of reward.
        uncertainty: beta of AdvPO's lower bound: this many times the uncertainty of a judge's reward is taken off it. It needs a judge that
            embeds images, and the embeddings of data.pairs that `dedpo label --keep_embeddings true` leaves.
        ridge: of that uncertainty: how many images of the unit of embeddings are taken to be known in every direction beforehand.
    """

    reward: list[str] = field(default_factory=list, metadata={"plugins": ["dedpo_diffusion.scorers"]})
    weights: list[float] = field(default_factory=list)
    prompts: int = 8
    images: int = 4
    updates: int = 2
    steps: int = 25
    guidance: float = 5.0
    eta: float = 1.0
    batch: int = 8
    clip: float = 0.2
    kl: float = 0.0
    temperature: float = 1.0
    uncertainty: float = 0.0
    ridge: float = 1.0


@dataclass(frozen=True)
class OptimSettings:
    """How it is minimised.

    Args:
        optimizer: adamw; adamw_8bit (bitsandbytes, CUDA) keeps less in memory.
        learning_rate: peak learning rate; it should scale like 1 / beta.
        steps: optimizer steps; a finished run goes on where they are raised, if its schedule is constant.
        batch: pairs in one forward pass of one process; of the kinds loop and apa, denoising steps.
        accumulation: forward passes per optimizer step.
        warmup: steps of linear warm-up.
        schedule: learning rate after the warm-up.
        clip: largest norm of the gradient.
        weight_decay: AdamW's decoupled weight decay.
        betas: AdamW's moment decays.
        average: decay of a moving average of what is trained, for each step; it is exported in its place. None keeps none.
    """

    optimizer: Literal["adamw", "adamw_8bit"] = "adamw"
    learning_rate: float = 1e-4
    steps: int = 1000
    batch: int = 4
    accumulation: int = 1
    warmup: int = 50
    schedule: Literal["constant", "cosine"] = "constant"
    clip: float = 1.0
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.999)
    average: float | None = None


@dataclass(frozen=True)
class ValidationSettings:
    """What is measured in the course of training, on pairs and prompts that are not trained on.

    Args:
        every: steps between validations, of which the last step is always one; None validates never.
        pairs: a pair dataset whose human labels are held out; None measures no held-out loss. Where it is data.pairs itself, the labelled
            pairs that carry no weight in data.targets are held out (`dedpo merge --folds` leaves a fold out). No image file of them
            may be trained on.
        human: name of its label file.
        draws: timesteps and noises of each held-out pair, the same in every validation; the timesteps lie one in each of as many equal
            parts of objective.timesteps.
        prompts: a text file with one prompt per line; an image of each is sampled before training and at every validation, from the same
            noise. None samples none.
        seed: of these draws, and of the first image's noise; the others count up from it.
        steps: sampler steps of an image.
        guidance: classifier-free guidance scale of an image.
        scorers: what scores these images, as in `dedpo score --with`. They stay in the memory of the run's device.
        keep_best: keep what was trained as it was at the best validation in OUT/best. Best is the lowest held-out loss or, without held-out
            pairs, the highest mean of the first scorer; the first of equals.
    """

    every: int | None = None
    pairs: Path | None = None
    human: str = "human"
    draws: int = 4
    prompts: Path | None = None
    seed: int = 0
    steps: int = 25
    guidance: float = 5.0
    scorers: list[str] = field(default_factory=list, metadata={"plugins": ["dedpo_diffusion.scorers"]})
    keep_best: bool = True


@dataclass(frozen=True)
class TrainSettings:
    """Train a LoRA, or the whole UNet, on merged preference targets.

    Args:
        model: diffusers folder, .safetensors file or hub id of the base; "shapes" is the embedded model.
        out: the run folder.
        data: what is trained on.
        weights: what is trained: an adapter, or every weight of the UNet; then the reference is a frozen copy in the compute
            precision, or none with data.reference_draws.
        lora: the adapter.
        objective: what is minimised.
        optim: how it is minimised.
        loop: of the objectives loop and apa, how images are sampled and rewarded.
        validation: what is measured in the course of training.
        model_config: for a .safetensors file, the diffusers folder or hub id of its architecture; None takes its family's published one.
        model_prediction: what the model predicts, where its files are wrong or silent: epsilon, v, or v_zero_snr, whose noise
            schedule ends in pure noise; None takes what they say.
        seed: seed of every draw.
        mixed_precision: compute precision; trained weights, errors and losses stay float32.
        gradient_checkpointing: trade compute for memory; selective computes less again and saves less.
        compile: compile the UNet's transformer blocks; the first steps then take minutes.
        attention: torch's own attention, or that of xformers (CUDA only).
        checkpoint_every: steps between checkpoints.
        keep_checkpoints: how many of the newest checkpoints are kept.
        log_every: steps between lines of metrics.jsonl.
        tracker: where the curves are shown: tensorboard in the run folder, wandb, mlflow or trackio, or several of them; the latter three
            are packages to be installed, and get settings, sampled images and the label report too. none keeps metrics.jsonl alone.
        tracker_project: the project, in MLflow the experiment, that the run belongs to; None takes that of WANDB_PROJECT,
            MLFLOW_EXPERIMENT_NAME or TRACKIO_PROJECT, else "dedpo".
        health: warn when the curves show a symptom (both errors rise, margins are wide, nothing moves, preferences are reversed, held-out
            loss rises), or stop the run there; the last checkpoint is kept.
        device: cpu forces the CPU, cuda refuses to train without a GPU; None lets accelerate choose.
        smoke: try these settings: three steps on the CPU on a tiny random model of this architecture and random pairs; nothing is kept.
    """

    model: str
    out: Path
    data: DataSettings
    weights: Literal["lora", "full"] = "lora"
    lora: LoraSettings = field(default_factory=LoraSettings)
    objective: ObjectiveSettings = field(default_factory=ObjectiveSettings)
    optim: OptimSettings = field(default_factory=OptimSettings)
    loop: LoopSettings = field(default_factory=LoopSettings)
    validation: ValidationSettings = field(default_factory=ValidationSettings)
    model_config: str | None = None
    model_prediction: Literal["epsilon", "v", "v_zero_snr"] | None = None
    seed: int = 0
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    gradient_checkpointing: bool | Literal["selective"] = False
    compile: bool = False
    attention: Literal["sdpa", "xformers"] = "sdpa"
    checkpoint_every: int = 100
    keep_checkpoints: int = 2
    log_every: int = 10
    tracker: list[Tracker] = field(default_factory=lambda: ["tensorboard"])
    tracker_project: str | None = None
    health: Literal["warn", "stop", "off"] = "warn"
    device: Literal["cpu", "cuda"] | None = None
    smoke: Literal["sd15", "sd21", "sdxl"] | None = None
    FIRST: ClassVar[dict[str, str]] = {  # what `--help` shows
        "what is trained, on what": "model data.pairs data.targets out",
        "how": "lora.rank objective.kind objective.beta optim.learning_rate optim.steps",
        "trying it first": "smoke",
    }


@dataclass(frozen=True)
class ExportSettings:
    """Write what a run trained, or another LoRA, so that other programs load it.

    Args:
        source: a run folder, or a LoRA as a .safetensors file of diffusers, kohya's scripts, ComfyUI or OneTrainer.
        out: the file to write, or the folder.
        format: diffusers and kohya are a LoRA file of that layout (kohya is what ComfyUI and A1111 load); merged is a diffusers folder of
            the whole model; checkpoint is the whole model as one file in the original layout.
        checkpoint: of a run, the last one, or what was trained at the best validation.
        average: of a run, take the moving average, if it kept one.
        dtype: precision of what is written; None takes float16 for a checkpoint and float32 for the others.
        strength: what the change is multiplied by; "best" takes the LoRA's best strength from `results`.
        rank: rank of the LoRA. The nearest one of that rank is written, and how much it leaves out is said; of a run that trained the
            whole UNet, and of a DoRA, it is extracted from the change of the weights.
        add: other LoRA files to add to it, each with its strength, as "other.safetensors=0.5".
        model: the base model; None takes that of the run, or of the settings in the LoRA file.
        model_config: for a .safetensors model, the diffusers folder or hub id of its architecture.
        model_prediction: what the model predicts, where its files are wrong or silent: epsilon, v, or v_zero_snr, whose noise
            schedule ends in pure noise; None takes what they say.
        card: of a run, write a model card (README.md) beside what is written.
        results: the results.json of `dedpo compare`, whose figures and pictures the card shows; of a run it implies the card.
        arm: which arm of the results this model is, or which LoRA where strength is "best"; None finds it by the files that its samples
            were made with.
        push: OWNER/NAME on the model hub to send what is written to, with its card and the results; what goes is said first.
        private: whether a repository that is made for it can be seen by its owners alone.
    """

    source: Path
    out: Path
    format: Literal["diffusers", "kohya", "merged", "checkpoint"] = "diffusers"
    checkpoint: Literal["last", "best"] = "last"
    average: bool = True
    dtype: Literal["float32", "float16", "bfloat16"] | None = None
    strength: float | Literal["best"] = 1.0
    rank: int | None = None
    add: list[str] = field(default_factory=list)
    model: str | None = None
    model_config: str | None = None
    model_prediction: Literal["epsilon", "v", "v_zero_snr"] | None = None
    card: bool = False
    results: Path | None = None
    arm: str | None = None
    push: str | None = None
    private: bool = False
    FIRST: ClassVar[dict[str, str]] = {  # what `--help` shows
        "what is exported": "source checkpoint strength add",
        "what is written": "out format dtype",
        "the model card": "card results",
        "the model hub": "push private",
    }


@dataclass(frozen=True)
class InspectSettings:
    """Say what a weight file or a folder is, for which base, and which programs read it.

    Args:
        path: a .safetensors file, or a folder: of diffusers, of a run or one of its checkpoints, of weight files.
        hash: tell the file's SHA-256; None tells that of files up to 1 GiB.
        json: print everything as JSON instead.
    """

    path: Path
    hash: bool | None = None
    json: bool = False
    FIRST: ClassVar[dict[str, str]] = {  # what `--help` shows
        "what is looked at": "path",
        "what is printed": "hash json",
    }
