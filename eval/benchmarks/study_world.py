"""The world of the study: one pool of pairs whose true preference is known, simulated people and judges, targets, and the verdict."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import brentq
from scipy.special import expit

from dedpo_diffusion.core.console import UserError, track
from dedpo_diffusion.core.files import write_text
from dedpo_diffusion.core.records import Targets
from dedpo_diffusion.debias import Merged, merge_labels
from dedpo_diffusion.judges.summary import judge_answers
from dedpo_diffusion.labels.adaptation import LEAST, Group, adapt
from dedpo_diffusion.labels.calibration import calibrate
from dedpo_diffusion.labels.files import label_names, read_labels, write_targets
from dedpo_diffusion.pairs.dataset import PairReader
from dedpo_diffusion.pairs.decoding import decode_image
from dedpo_diffusion.pairs.features import statistics_group
from dedpo_diffusion.pairs.statistics import measure_statistics
from dedpo_diffusion.shapes import oracle
from dedpo_diffusion.shapes.world import VOCABULARY

METHODS = ("human_only", "tuned", "adapted", "naive", "dedpo")  # that could be the default, the simplest first
ARMS = ("base", "human_100", "judge_only", *METHODS, "temperature")
HONESTY = {"perfect": 1.0, "random-90": 0.9, "random-80": 0.8, "coin": 0.5, "adversarial": 0.3}  # chance to repeat a person's answer
JUDGES = ("clip", "clean", "biased-80", *HONESTY)
PEOPLE = {"quickstart": None, "noisy": 0.70}  # how often two of them agree; None has the quickstart's temperature
SAMPLER: dict[str, Any] = {"steps": 12, "guidance": 1.5}  # the quickstart's
LORA: dict[str, Any] = {"rank": 8, "alpha": 8.0}  # the quickstart's
VERDICT_SEED = 5_000_000  # far from the seeds of the pool


@dataclass(frozen=True)
class Pool:
    """N pairs of one dataset and what is known of them.

    `reward` (N, 2) is the oracle's, `clutter` (N, 2) how cluttered each image is (0 to 1), `clip` (N, 2) the carried CLIP judge's label
    and its score of image 0 less that of image 1, `statistics` differences of image statistics.
    """

    folder: Path
    ids: list[str]
    prompts: list[str]
    reward: np.ndarray
    clutter: np.ndarray
    clip: np.ndarray
    statistics: Group


def all_pairs(images: int) -> int:
    """How many pairs there are among so many images."""
    return images * (images - 1) // 2


def make_pool(work: Path, pairs: int, images: int = 2) -> Pool:
    """Propose the pool (seed 0), label it with the carried judge, measure it, and ask the oracle; what is there already is kept.

    Of `images` images of a prompt all pairs are made, one after another; `pairs` is a multiple of their number.
    """
    from dedpo_diffusion.pipelines import label, propose
    from dedpo_diffusion.pipelines.align import call

    folder, prompts = work / "pool", work / "prompts.txt"
    work.mkdir(parents=True, exist_ok=True)
    if not (folder / "pairs").exists():
        drawn = np.random.default_rng(0).integers(len(VOCABULARY), size=pairs // all_pairs(images))
        write_text(prompts, "\n".join(VOCABULARY[i].prompt for i in drawn) + "\n")
        options = ["--steps", SAMPLER["steps"], "--guidance", SAMPLER["guidance"], "--batch", 48, "--device", "cpu"]
        options += ["--images_per_prompt", images, "--pairing", "all"]
        call(propose.main, "propose", "--model", "shapes", "--prompts", prompts, "--out", folder, *options)
    if "clip" not in label_names(folder):
        judge = files("dedpo_diffusion.shapes") / "model" / "judge"
        call(label.main, "label", folder, "--with", f"pickscore={judge}", "--name", "clip", "--device", "cpu", "--summary", "false")
    reader = PairReader(folder)
    ids = reader.ids()
    if len(ids) != pairs:
        raise UserError(f"{folder} holds {len(ids)} pairs, and the study asks for {pairs}; give another --work")
    said = judge_answers(read_labels(folder, "clip"), ids, folder=folder, name="clip")
    clip = np.stack([said.label_0, said.scores[:, 0] - said.scores[:, 1]], axis=1)
    return Pool(folder, ids, reader.prompts(), *_look(reader), clip, statistics_group(measure_statistics(reader)))


def _look(reader: PairReader) -> tuple[np.ndarray, np.ndarray]:
    """Oracle rewards and clutter (N, 2) of both images of every pair."""
    rows = []
    for row in track(range(len(reader)), "asking the oracle", len(reader)):
        pair, where = reader.pair(row), reader.location(row)
        looks = [oracle.terms(pair.prompt, oracle.read(decode_image(data, where))) for data in (pair.image_0, pair.image_1)]
        rows.append([[look[name] for name in oracle.TERMS] for look in looks])
    values = np.array(rows)
    return values.mean(axis=-1), 1 - values[:, :, oracle.TERMS.index("clean")]


def people_agreement(reward: np.ndarray, temperature: float) -> float:
    """How often two people answer a pair alike, on average over pairs of rewards (N, 2): the mean of p^2 + (1 - p)^2."""
    p = expit((reward[:, 0] - reward[:, 1]) / temperature)
    return float(np.mean(p**2 + (1 - p) ** 2))


def temperature_at(reward: np.ndarray, agreement: float) -> float:
    """The temperature at which people agree with each other so often on pairs of rewards (N, 2), from 1e-6 to 1e3; else a UserError."""
    low, high = (people_agreement(reward, 10.0**power) for power in (3, -6))
    if not low < agreement < high:
        raise UserError(f"people cannot agree on {agreement:.1%} of these pairs, only on more than {low:.1%} and less than {high:.1%}")
    return float(10 ** brentq(lambda power: people_agreement(reward, 10.0**power) - agreement, -6, 3, xtol=1e-9))


@dataclass(frozen=True)
class Sample:
    """One seed's n pairs, as rows of the pool, people's answers (0 or 1) to all of them, and the order in which they are asked."""

    rows: np.ndarray
    answer: np.ndarray
    order: np.ndarray

    def human(self, share: float) -> np.ndarray:
        """(n,) answers of the first `share` of the pairs that are asked, NaN for the others; so shares are nested."""
        found = np.full(len(self.rows), np.nan)
        asked = self.order[: round(share * len(self.rows))]
        found[asked] = self.answer[asked]
        return found


def draw_sample(pool: Pool, *, seed: int, pairs: int, people: str, images: int = 2) -> Sample:
    """Fresh pairs, fresh answers, fresh order, all from `seed`; for all people the same pairs, order and chance.

    Of a pool of more than two `images` a prompt, prompts are drawn with all their pairs; each pair gets an answer of its own.
    """
    agreement = PEOPLE[people]
    temperature = oracle.TEMPERATURE if agreement is None else temperature_at(pool.reward, agreement)
    rng = np.random.default_rng((seed, 1))
    together = all_pairs(images)
    first = together * np.sort(rng.choice(len(pool.ids) // together, pairs // together, replace=False))
    rows = (first[:, None] + np.arange(together)).ravel()
    answer = oracle.answers(rng, pool.reward[rows, 0], pool.reward[rows, 1], temperature=temperature)
    return Sample(rows, answer, rng.permutation(pairs))


def judge_answers_of(pool: Pool, sample: Sample, judge: str, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(n,) labels and (n,) score differences of a judge; clip and clean have scores that are more than their hard labels.

    clip is the carried judge; clean looks at clutter alone and prefers the cleaner image, whatever the prompt says. random-A
    repeats a person's answer with chance A; biased-80 names the more cluttered image where the clutter differs most, on as many
    pairs as leave 80 % agreement, and repeats the answer elsewhere.
    """
    if judge == "clip":
        return pool.clip[sample.rows, 0], pool.clip[sample.rows, 1]
    if judge == "clean":
        cleaner = pool.clutter[sample.rows, 1] - pool.clutter[sample.rows, 0]
        return 0.5 + 0.5 * np.sign(cleaner), cleaner
    if judge in HONESTY:
        honest = np.random.default_rng((seed, 2)).random(len(sample.rows)) < HONESTY[judge]
        labels = np.where(honest, sample.answer, 1 - sample.answer)
    else:
        gap = pool.clutter[sample.rows, 0] - pool.clutter[sample.rows, 1]
        first = np.argsort(-np.abs(gap), kind="stable")
        errors = np.cumsum(((gap > 0) != (sample.answer > 0.5))[first])
        lean = first[: int(np.searchsorted(errors, round(0.2 * len(gap)))) + 1]
        labels = sample.answer.copy()
        labels[lean] = (gap > 0)[lean]
    return labels, 2 * labels - 1


def placed(arm: str, judge: str, share: float, people: str) -> tuple[str, str, float, str]:
    """Arm, judge, share and people, without what the arm does not look at: so it is trained once for all of them."""
    if arm in ("base", "human_only", "human_100"):
        judge, share = "none", {"base": 0.0, "human_only": share, "human_100": 1.0}[arm]
    return arm, judge, 0.0 if arm == "judge_only" else share, "none" if arm == "base" else people


def known(pool: Pool, sample: Sample, judge: str, difference: np.ndarray) -> tuple[Group, Group, list[str]]:
    """What `adapt` is given besides answers: a judge's score differences (n,), the images' statistics, and the prompts."""
    images = Group(pool.statistics.name, pool.statistics.columns, pool.statistics.values[sample.rows])
    return Group("scores", [judge], difference[:, None]), images, [pool.prompts[row] for row in sample.rows]


def merged_targets(pool: Pool, sample: Sample, arm: str, judge: str, share: float, seed: int) -> Merged:
    """Targets of an arm. judge_only are the judge's labels as they come.

    adapted is `dedpo merge --method adapted`: people teach the judge, or, with fewer than 20 labels, tune its power. temperature merges the
    labels of `dedpo calibrate`, in fewer folds where 5 need more labels, as adapted merges a taught judge's; raw ones below 4 labels.
    """
    human = sample.human(share)
    if arm in ("human_only", "human_100"):
        return merge_labels(human, None, method="human_only")
    label, difference = judge_answers_of(pool, sample, judge, seed)
    asked = int((~np.isnan(human)).sum())
    if arm == "judge_only":
        return merge_labels(np.full(len(label), np.nan), label, method="naive")
    if arm not in ("adapted", "temperature") or (arm == "adapted" and asked < LEAST):
        return merge_labels(human, label, method="tuned" if arm == "adapted" else arm)
    scores, images, prompts = known(pool, sample, judge, difference)
    if arm == "adapted":
        label = adapt(scores, [images], human, prompts=prompts, seed=seed).probability
    elif asked >= 4:
        label = calibrate(difference, human, folds=min(5, asked // 2), groups=prompts, seed=seed).probability
    return merge_labels(human, label, method="adapted", features=np.concatenate([scores.values, images.values], axis=1))


def write_rows(pool: Pool, name: str, rows: np.ndarray, made: Merged | np.ndarray) -> None:
    """Write targets of these rows of the pool; all other pairs have weight 0, and the weights make up for their number.

    `made` is a merge, whose labels and method the files then tell too, or (n,) targets of weight 1.
    """

    def placed(values: Any, elsewhere: float) -> np.ndarray:
        every = np.full(len(pool.ids), elsewhere)
        every[rows] = elsewhere if values is None else values
        return every

    target, weight, labels, report = made, np.ones(len(rows)), {}, {}
    if isinstance(made, Merged):
        target, weight, report = made.target, made.weight, {"method": made.report["method"]}
        labels = {"human": placed(made.human, np.nan), "judge": placed(made.judge, np.nan)}
    scaled = placed(weight * len(pool.ids) / len(rows), 0.0)
    write_targets(pool.folder, name, Targets(pool.ids, placed(target, 0.5), scaled, **labels), report)


class Verdict:
    """Judges policies by `seeds` images of each of `prompts` prompts of the grammar (at most 144, spread evenly), the same for all.

    The LoRA is merged into weights held in memory. The UNet samples in bfloat16 on CPUs that compute in it, which halves the time; others
    would take three times as long as in float32. The base's mean reward on 144 prompts is the same within .0015 in both.
    """

    def __init__(self, prompts: int, seeds: int) -> None:
        import torch

        from dedpo_diffusion.models.backbone import Backbone
        from dedpo_diffusion.sampling.sampler import load_sampler

        computes = getattr(torch.cpu, "get_capabilities", dict)()  # older torch does not tell
        self.half = bool(computes.get("amx_bf16") or computes.get("avx512_bf16"))
        self.model: Backbone = Backbone("shapes", device=torch.device("cpu"))
        self.model.add_lora(**LORA)
        self.pipe = load_sampler("shapes", device="cpu")
        self.base = {name: value.clone() for name, value in self.pipe.unet.state_dict().items()}
        self.seeds = seeds
        self.prompts = [VOCABULARY[k * len(VOCABULARY) // prompts].prompt for k in range(prompts) for _ in range(seeds)]

    def load(self, parameters: dict[str, Any] | None, strength: float = 1.0) -> None:
        """Put a policy's LoRA in place, counting `strength` times as much as trained; None is the base model."""
        import torch

        with torch.no_grad():
            self.pipe.unet.load_state_dict(self.base)
            if parameters is None:
                return
            for name, parameter in self.model.trainable().items():
                parameter.copy_(parameters[name])
            for name, layer in self.model.unet.named_modules():
                if hasattr(layer, "get_delta_weight"):
                    self.pipe.unet.get_parameter(f"{name}.weight").add_(layer.get_delta_weight("default"), alpha=strength)

    def rewards(self) -> list[float]:
        """Mean oracle reward of the images of each prompt."""
        import torch

        from dedpo_diffusion.sampling.sampler import sample

        made = []
        with torch.autocast("cpu", torch.bfloat16, enabled=self.half):
            for start in range(0, len(self.prompts), 48):
                part = range(start, min(start + 48, len(self.prompts)))
                made += sample(self.pipe, [self.prompts[k] for k in part], [VERDICT_SEED + k for k in part], **SAMPLER)
        return oracle.reward(self.prompts, made).reshape(-1, self.seeds).mean(axis=1).tolist()

    def at_strengths(self, parameters: dict[str, Any] | None, strengths: Sequence[float]) -> list[dict[str, Any]]:
        """The rewards of a policy at each of these strengths, a line each."""
        found = []
        for strength in strengths:
            self.load(parameters, strength)
            found.append({"strength": strength, "rewards": self.rewards()})
        return found
