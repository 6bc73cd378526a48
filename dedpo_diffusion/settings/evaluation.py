"""Settings of the stages that sample and judge."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

from dedpo_diffusion.settings.engine import RaySettings


@dataclass(frozen=True)
class SampleSettings:
    """Sample images, seed-paired with every other model sampled with the same prompts and seed.

    Args:
        model: diffusers folder, .safetensors file or hub id; "shapes" is the embedded model.
        model_config: for a .safetensors file, the diffusers folder or hub id of its architecture; None takes its family's published one.
        model_prediction: what the model predicts, where its files are wrong or silent: epsilon, v, or v_zero_snr, whose noise
            schedule ends in pure noise; None takes what they say.
        prompts: parti, geneval or hpsv2; a folder with HPSv2's four lists; a .json, .jsonl, .csv, .tsv or .parquet file with prompts
            and, if they are there, categories; or a text file, one prompt per line.
        out: folder for the images and index.parquet; of several strengths of one LoRA, for a folder each (strength-0.5, ...).
        categories: the categories of prompts to sample; none takes all.
        limit: how many prompts to sample, as many of each category as of any other; None takes all.
        lora: LoRA files, in the layout of diffusers or kohya; several add up.
        strength: how strongly each LoRA counts, one number a file; none takes 1 for each. Of one LoRA, several numbers make a sample
            folder for each within `out`, with the model loaded once.
        seeds: images per prompt.
        seed: the first image's seed; image i gets seed + i.
        steps: sampler steps.
        guidance: classifier-free guidance scale.
        negative: negative prompt of every image; None takes what the model's pipeline takes for none.
        scheduler: the sampler; None takes the model's own, in which two models may differ.
        size: pixels of a side; None takes the model's own.
        height: pixels, in place of size.
        width: pixels, in place of size.
        batch: images sampled at once, halved where the GPU's memory is too small; auto is 8, or fewer by what the first ones took.
        device: torch device; None takes a GPU if there is one.
        dtype: precision of the model; auto is bfloat16 on a GPU (float16 on one without it) and float32 on a CPU.
        engine: who does the work: local is this process (`accelerate launch` starts one for each GPU of this machine), ray the nodes of a
            Ray cluster.
        ray: the cluster of --engine ray.
    """

    model: str
    prompts: str
    out: Path
    categories: list[str] = field(default_factory=list)
    limit: int | None = None
    lora: list[Path] = field(default_factory=list)
    strength: list[float] = field(default_factory=list)
    seeds: int = 1
    seed: int = 0
    steps: int = 50
    guidance: float = 7.5
    negative: str | None = None
    scheduler: Literal["ddim", "euler", "euler_a", "dpmpp_2m", "unipc"] | None = None
    size: int | None = None
    height: int | None = None
    width: int | None = None
    batch: int | Literal["auto"] = "auto"
    device: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    model_config: str | None = None
    model_prediction: Literal["epsilon", "v", "v_zero_snr"] | None = None
    engine: Literal["local", "ray"] = field(default="local", metadata={"recorded": False})
    ray: RaySettings = field(default_factory=RaySettings, metadata={"recorded": False})
    FIRST: ClassVar[dict[str, str]] = {  # what `--help` shows
        "what the images are made with": "model lora strength prompts seeds steps guidance",
        "what is written": "out",
        "memory and speed": "batch dtype engine",
    }


@dataclass(frozen=True)
class ScoreSettings:
    """Score sample folders.

    Args:
        folders: the sample folders; a folder of strengths of one LoRA stands for all of them.
        scorers: scorers, each as name or name=location: pickscore, clip=MODEL:TAG, hps, aesthetic=HEAD, http=URL; for Shapes
            oracle_reward, oracle_accuracy, and one attribute each, oracle_shape, _colour, _size, _background, _clean.
        batch: images scored at once, halved where the GPU's memory is too small; auto is 64, or fewer by what the first ones took.
        device: torch device; None takes a GPU if there is one.
        dtype: precision of the scorers' towers; scores are float32 always.
            Auto is bfloat16 on a GPU (float16 on one without it) and float32 on a CPU.
        embeddings: also write what the scorers' image towers saw, for diversity and drift in `dedpo compare`.
        engine: who does the work: local is this process (`accelerate launch` starts one for each GPU of this machine), ray the nodes of a
            Ray cluster.
        ray: the cluster of --engine ray.
    """

    folders: list[Path]
    scorers: list[str] = field(metadata={"plugins": ["dedpo_diffusion.scorers"]})
    batch: int | Literal["auto"] = "auto"
    device: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    embeddings: bool = True
    engine: Literal["local", "ray"] = field(default="local", metadata={"recorded": False})
    ray: RaySettings = field(default_factory=RaySettings, metadata={"recorded": False})
    FIRST: ClassVar[dict[str, str]] = {  # what `--help` shows
        "what is scored": "folders with embeddings",
        "memory and speed": "batch dtype device engine",
    }


@dataclass(frozen=True)
class CompareSettings:
    """Compare sample folders that share prompts and seeds; the first is the base.

    Args:
        folders: two or more scored sample folders; their names name the arms. A folder of strengths of one LoRA, as `dedpo sample
            --strength 0.5 1 2` makes it, stands for all of them.
        out: the page to write; results.json is written beside it.
        primary: the scorer of the verdict, or "people"; None takes the first held-out scorer that all folders share, or else the first.
        choose_by: the scorer, or "people", that chooses each LoRA's best strength, on one half of the prompts for the other; None takes
            that of the verdict.
        runs: run folders whose training curves the page shows.
        targets: reports (JSON) of the targets that the arms were trained on: their judges made the labels, other scorers are held out.
        held_out: scorers that made no training label; needed where no report of targets says so.
        resamples: bootstrap resamples.
        seed: seed of the bootstrap.
    """

    folders: list[Path]
    out: Path = Path("report.html")
    primary: str | None = None
    choose_by: str | None = None
    runs: list[Path] = field(default_factory=list)
    targets: list[Path] = field(default_factory=list)
    held_out: list[str] = field(default_factory=list)
    resamples: int = 10000
    seed: int = 0
    FIRST: ClassVar[dict[str, str]] = {  # what `--help` shows
        "what is compared": "folders primary held_out choose_by",
        "what the report shows beside": "runs targets",
        "what is written": "out",
    }
