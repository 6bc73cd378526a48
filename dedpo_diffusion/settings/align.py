"""Settings of the two commands that take the whole journey."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

from dedpo_diffusion.core.defaults import DEFAULT_METHOD


@dataclass(frozen=True)
class AlignSettings:
    """The whole journey on your own model: pairs, labels, targets, LoRAs, images, verdict.

    Args:
        model: diffusers folder, .safetensors file or hub id of the base; "shapes" is the embedded model.
        out: folder for everything that is made; the same command goes on in it.
        prompts: the model proposes two images for each of these prompts, as in `dedpo propose`; "shapes" are those of the embedded model.
        pairs: in place of prompts: a pair dataset, or a source that `dedpo ingest` reads.
        format: of a source, its format; auto recognises it.
        limit: how many prompts to propose for; None takes all.
        images_per_prompt: images for each prompt, an even number; two make a pair.
        judges: the judges that label every pair, as in `dedpo label --with`.
        people: real people answer in the page; simulated ones answer for the embedded model alone.
        votes: how many answers of people to wait for in the page; 0 goes on with the human labels that the pairs have.
        human_share: of simulated people, the share of pairs that they label.
        methods: ways to merge the labels, a LoRA each; the first is the one that is recommended at the end.
        recipe: settings of the training, a YAML file as `dedpo train --config` takes it.
        training: further options of `dedpo train`, by name: {"data.reference_draws": "8"}.
        steps: optimizer steps of each LoRA; None takes the recipe's.
        rounds: how often pairs are proposed, labelled and trained on. From the second on the latest LoRA proposes the pairs and is trained
            further, on these and all earlier ones. A round that gains nothing over the one before on the scorer of the verdict, or looks
            over-optimised, is the last.
        round_votes: how many answers of people to wait for in each further round, about the new pairs that judges are least sure of;
            0 asks nobody again.
        round_drift: a round is the last if its images lie further from the base's than this many times what the base's images of one prompt
            lie apart, by the embeddings of the scorers that have them.
        strengths: strengths at which each LoRA is sampled; of several the best is found.
        eval_prompts: prompts of the evaluation, as in `dedpo sample`; "shapes" are those of the embedded model.
        eval_limit: how many of them to take; None takes all.
        eval_seeds: images of each of these prompts.
        scorers: what scores these images, as in `dedpo score --with`.
        held_out: scorers that made no training label, by their names; the first gives the verdict. A served one bears the name that its
            server says.
        sampler_steps: sampler steps of every image; None takes the stages' own number.
        guidance: classifier-free guidance scale of every image; None takes the stages' own.
        size: pixels of a side of every image; None takes the model's own.
        batch: images sampled at once; None takes the stages' own number.
        dtype: precision in which images are sampled; None takes the stages' own.
        device: torch device of every stage; None takes a GPU if there is one.
        model_config: for a .safetensors model, the diffusers folder or hub id of its architecture.
        model_prediction: what the model predicts, where its files are wrong or silent: epsilon, v, or v_zero_snr, whose noise
            schedule ends in pure noise; None takes what they say.
        seed: seed of every draw.
        dry_run: print the commands and what each will cost, and do nothing.
        memory: with dry_run: also compute the GPU memory of training by the carried recipes, which takes a minute or two.
    """

    model: str
    out: Path = Path("align")
    prompts: str | None = None
    pairs: str | None = None
    format: str = "auto"
    limit: int | None = None
    images_per_prompt: int = 2
    judges: list[str] = field(default_factory=list)
    people: Literal["real", "simulated"] = "real"
    votes: int = 0
    human_share: float | None = None
    methods: list[str] = field(default_factory=lambda: [DEFAULT_METHOD])
    recipe: str | None = None
    training: dict[str, str] = field(default_factory=dict)
    steps: int | None = None
    rounds: int = 1
    round_votes: int = 0
    round_drift: float = 2.0
    strengths: list[float] = field(default_factory=lambda: [0.5, 1.0, 1.5, 2.0])
    eval_prompts: str | None = None
    eval_limit: int | None = None
    eval_seeds: int = 2
    scorers: list[str] = field(default_factory=list)
    held_out: list[str] = field(default_factory=list)
    sampler_steps: int | None = None
    guidance: float | None = None
    size: int | None = None
    batch: int | None = None
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    device: str | None = None
    model_config: str | None = None
    model_prediction: Literal["epsilon", "v", "v_zero_snr"] | None = None
    seed: int = 0
    dry_run: bool = False
    memory: bool = False
    FIRST: ClassVar[dict[str, str]] = {  # what `--help` shows
        "what it starts from": "model prompts pairs",
        "labels": "judges votes methods",
        "training": "recipe rounds",
        "judging": "strengths",
        "what is written": "out dry_run",
    }


@dataclass(frozen=True)
class QuickstartSettings:
    """The whole journey on the embedded world: `dedpo align` with settings of its own.

    Args:
        out: folder for everything that is made.
        seed: seed of every draw.
        pairs: how many pairs the base model proposes.
        human_share: share of pairs that the simulated human labels.
        steps: optimizer steps of each arm.
        strengths: strengths at which each LoRA is sampled; 1 is the one that was trained.
        eval_prompts: prompts of the evaluation, spread over the 144 that there are.
        eval_seeds: images per prompt in the evaluation.
        dry_run: print the commands and what each will cost, and do nothing.
    """

    out: Path = Path("quickstart")
    seed: int = 0
    pairs: int = 800
    human_share: float = 0.05
    steps: int = 150
    strengths: list[float] = field(default_factory=lambda: [0.5, 0.7, 1.0, 1.5, 2.0])
    eval_prompts: int = 96
    eval_seeds: int = 2
    dry_run: bool = False
    FIRST: ClassVar[dict[str, str]] = {  # what `--help` shows
        "how much": "pairs human_share steps strengths eval_prompts eval_seeds",
        "what is written": "out seed dry_run",
    }
