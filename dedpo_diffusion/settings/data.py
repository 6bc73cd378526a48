"""Settings of the stages that make and look at pairs."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

from dedpo_diffusion.settings.engine import RaySettings


@dataclass(frozen=True)
class IngestSettings:
    """Read a preference format into a pair dataset.

    Args:
        format: auto to recognise it, or its name: table, ranked, imagefolder, folders, datasets, pickapic, hpdv2, hpdv3, imagereward,
            open_image_preferences, rapidata.
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
        shard_pairs: pairs in one parquet file; an interrupted run resumes after the last whole one.
        workers: threads that read and decode images; None takes one a core.
    """

    format: str = field(metadata={"plugins": ["dedpo_diffusion.importers"]})
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
    FIRST: ClassVar[dict[str, str]] = {  # what `--help` shows
        "what is read": "format source images columns split",
        "what is written": "out",
        "what becomes of odd pairs": "ties unlabelled duplicates unreadable",
    }


@dataclass(frozen=True)
class ValidateSettings:
    """Check a pair dataset, its labels and votes, and say what is wrong with it.

    Args:
        pairs: the pair dataset.
        depth: headers reads the header of every image; decode also decodes each and looks for near-duplicates.
        human: name of the human label file.
        model: the model that is to be trained, as a diffusers folder, hub id, .safetensors file or shapes: prompts are measured in
            tokens of its own tokenizer; None takes CLIP's, which Stable Diffusion's models have.
        near: largest Hamming distance of two 64-bit perceptual hashes that counts as a near-duplicate.
        out: the report (JSON); None takes PAIRS/validate.json. The same name with .html holds the pictures.
        workers: processes of this machine that read; None takes one a core.
        resamples: bootstrap resamples of the agreement's intervals.
        seed: seed of the bootstrap.
        engine: who does the work: local is this process (`accelerate launch` starts one for each GPU of this machine), ray the nodes of a
            Ray cluster.
        ray: the cluster of --engine ray.
    """

    pairs: Path
    depth: Literal["headers", "decode"] = "decode"
    human: str = "human"
    model: str | None = None
    near: int = 3
    out: Path | None = None
    workers: int | None = None
    resamples: int = 2000
    seed: int = 0
    engine: Literal["local", "ray"] = field(default="local", metadata={"recorded": False})
    ray: RaySettings = field(default_factory=RaySettings, metadata={"recorded": False})
    FIRST: ClassVar[dict[str, str]] = {  # what `--help` shows
        "what is checked": "pairs depth human model near",
        "what is written": "out",
        "how": "workers engine",
    }


@dataclass(frozen=True)
class VoteSettings:
    """Let people say in a web page which image of a pair is better: of a pair dataset, or of two models, blind.

    Args:
        folders: the pair dataset; or two sample folders that share prompts and seeds, the base's first.
        name: name of the label file that the votes become, or of the vote file of two sample folders; None takes human, or vs-BASE.
        order: which pairs come first: random, or those that judges disagree on or are unsure of; then each label carries
            the probability with which its pair came up, and merging stays unbiased. Of two sample folders, every prompt comes once,
            in random order, before any comes again.
        rank: rank all images of a prompt at once, 2 to 9, in place of one pair after another; of a pair dataset whose pairs share
            images, as `dedpo propose --pairing all` makes them.
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
        export_only: write the label file from the votes so far, and stop; of two sample folders, also tell which is ahead.
        until: stop by itself once there are so many answers, those of earlier runs among them; None goes on until Ctrl-C.
        open: show the page in this machine's browser, if it has a screen.
    """

    folders: list[Path]
    name: str | None = None
    order: Literal["random", "disagreement"] = "random"
    rank: bool = False
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
    until: int | None = None
    open: bool = False
    FIRST: ClassVar[dict[str, str]] = {  # what `--help` shows
        "what is asked": "folders rank order judges",
        "whose answers": "name overlap",
        "where the page is": "host port share",
        "when it ends": "until",
        "without the page": "export_only",
    }


@dataclass(frozen=True)
class ProposeSettings:
    """Make pairs from a model's own images.

    Args:
        model: diffusers folder, .safetensors file or hub id; "shapes" is the embedded model.
        model_config: for a .safetensors file, the diffusers folder or hub id of its architecture; None takes its family's published one.
        model_prediction: what the model predicts, where its files are wrong or silent: epsilon, v, or v_zero_snr, whose noise
            schedule ends in pure noise; None takes what they say.
        prompts: as in `dedpo sample`: a set's name, a table with prompts and categories, or a text file, one prompt per line.
        out: the pair dataset to write; must not exist yet.
        categories: the categories of prompts to take; none takes all.
        limit: how many prompts to take, as many of each category as of any other; None takes all.
        lora: LoRA files on top of the model, as in `dedpo sample`.
        strength: how strongly each LoRA counts; none takes 1 for each.
        images_per_prompt: K images for each prompt line, each with a seed of its own.
        pairing: disjoint gives K / 2 independent pairs per prompt, all gives K (K - 1) / 2. The others ask `reward`: best_worst takes the
            best image and the worst, threshold all pairs in which the better image is preferred with more than `threshold` (RS-DPO), rso
            disjoint pairs of `accepted` images, drawn by statistical rejection sampling (RSO).
        reward: the scorer that pairs are made by, as in `dedpo score --with`, or adapted=OTHER_PAIRS/labels/adapt.json.
        temperature: of threshold and rso, in units of the reward; None takes the scorer's own.
        threshold: of threshold, a probability from 0.5 on.
        accepted: of rso, an even number of images of each prompt; None takes half of them, at least 2.
        seed: the first image's seed; image i gets seed + i.
        steps: sampler steps.
        guidance: classifier-free guidance scale.
        size: pixels of a side; None takes the model's own.
        batch: images sampled at once, halved where the GPU's memory is too small; auto is 8, or fewer by what the first ones took.
        device: torch device; None takes a GPU if there is one.
        dtype: precision of the sampling model; auto is bfloat16 on a GPU (float16 on one without it) and float32 on a CPU.
        shard_pairs: pairs in one parquet file.
        engine: who does the work: local is this process (`accelerate launch` starts one for each GPU of this machine), ray the nodes of a
            Ray cluster.
        ray: the cluster of --engine ray.
    """

    model: str
    prompts: str
    out: Path
    categories: list[str] = field(default_factory=list)
    limit: int | None = None
    images_per_prompt: int = 2
    pairing: Literal["disjoint", "all", "best_worst", "threshold", "rso"] = "disjoint"
    reward: str | None = field(default=None, metadata={"plugins": ["dedpo_diffusion.scorers"]})
    temperature: float | None = None
    threshold: float = 0.7
    accepted: int | None = None
    seed: int = 0
    steps: int = 50
    guidance: float = 7.5
    size: int | None = None
    batch: int | Literal["auto"] = "auto"
    device: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    shard_pairs: int = 1000
    model_config: str | None = None
    model_prediction: Literal["epsilon", "v", "v_zero_snr"] | None = None
    lora: list[Path] = field(default_factory=list)
    strength: list[float] = field(default_factory=list)
    engine: Literal["local", "ray"] = field(default="local", metadata={"recorded": False})
    ray: RaySettings = field(default_factory=RaySettings, metadata={"recorded": False})
    FIRST: ClassVar[dict[str, str]] = {  # what `--help` shows
        "what the images are made with": "model lora prompts steps guidance",
        "what is written": "out images_per_prompt",
        "memory and speed": "batch dtype device engine",
    }


@dataclass(frozen=True)
class CacheSettings:
    """List and remove caches of encoded pairs.

    Args:
        remove: names of caches to remove, as the list shows them.
        remove_all: remove all of them, but for those in use.
        folder: where they lie; None takes the user's own cache folder.
    """

    remove: list[str] = field(default_factory=list)
    remove_all: bool = False
    folder: Path | None = None
    FIRST: ClassVar[dict[str, str]] = {  # what `--help` shows
        "what is removed": "remove remove_all",
        "where they lie": "folder",
    }


@dataclass(frozen=True)
class PairsSettings:
    """Write a pair dataset for annotation tools and other programs, send it to a hub, or join several.

    Args:
        action: what to do: export writes the pairs into a folder for others; push sends them to a hub of data sets; join makes one
            dataset of several.
        pairs: the pair dataset.
        others: of join, the further datasets.
        repository: of push, where to: OWNER/NAME on the hub.
        to: of export, for what: labelstudio and argilla are annotation tools; datasets is parquet that the `datasets` library reads;
            imagefolder is images with metadata.jsonl; csv is images with a table.
        out: the folder to write; must not exist yet. Push keeps what it sends there; None keeps nothing.
        human: name of the label and vote files whose answers go along; null leaves them out.
        images: how labelstudio gets images: as files, which it serves from this machine's disk, or as data inside the
            tasks; auto takes files for labelstudio. argilla always takes data.
        root: for labelstudio, the folder that it serves files from, which must hold OUT; None takes OUT itself.
        fields: for argilla, two image fields, or html: one field that shows both side by side.
        seed: seed of the shuffle of sides, for annotation tools.
        private: of push, whether a new repository is private; nothing is sent to one that is public.
        raters: of push, what becomes of the people who answered: numbers in place of names, their names, or none.
        without: of push, source columns to leave out, without source_; those that tell of people are left out unless raters is names.
        license: of push, the licence in the card, as the hub abbreviates it: cc-by-4.0, cc0-1.0, other; None writes unknown.
        dry_run: of push, say what would be sent, and send nothing.
    """

    action: Literal["export", "push", "join"]
    pairs: Path
    repository: str | None = None
    to: Literal["labelstudio", "argilla", "datasets", "imagefolder", "csv"] | None = None
    out: Path | None = None
    human: str | None = "human"
    images: Literal["auto", "files", "data"] = "auto"
    root: Path | None = None
    fields: Literal["image", "html"] = "image"
    seed: int = 0
    private: bool = False
    raters: Literal["numbers", "names", "none"] = "numbers"
    without: list[str] = field(default_factory=list)
    license: str | None = None
    dry_run: bool = False
    others: list[Path] = field(default_factory=list)
    FIRST: ClassVar[dict[str, str]] = {  # what `--help` shows
        "what is done": "action pairs repository human",
        "export and join": "to others out",
        "push": "private raters license dry_run",
    }

    @property
    def folder(self) -> Path:
        """OUT of an export or join, which need one."""
        assert self.out is not None
        return self.out
