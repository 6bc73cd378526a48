"""The world of the study: one pool of pairs whose true preference is known, simulated people and judges, and the verdict on a policy."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dedpo_diffusion.core.console import UserError

if TYPE_CHECKING:
    import torch

    from dedpo_diffusion.core.records import Conditioning
    from dedpo_diffusion.models.backbone import Backbone
    from dedpo_diffusion.pairs.dataset import PairReader

SAMPLER = {"steps": 12, "guidance": 1.0}  # of the pool's images and of the verdict's
JUDGES = ("perfect", "random-90", "random-80", "biased-80", "coin", "adversarial", "clip", "self")
HONESTY = {"perfect": 1.0, "random-90": 0.9, "random-80": 0.8, "coin": 0.5, "adversarial": 0.3}  # chance to repeat the human's answer
DRAWS = 2  # timesteps, evenly spread, at which held-out pairs are judged
LABEL_DRAWS = 8  # at which a self-trained judge reads a reward
VERDICT_SEED = 5_000_000  # far from the seeds of the pool


@dataclass(frozen=True)
class Pool:
    """N pairs of one dataset and what is known of them.

    `reward` (N, 2) is the oracle's, `clutter` (N, 2) how cluttered each image is (0 to 1), `clip` (N,) the carried CLIP judge's label.
    """

    folder: Path
    ids: list[str]
    prompts: list[str]
    reward: np.ndarray
    clutter: np.ndarray
    clip: np.ndarray


def make_pool(work: Path, pairs: int) -> Pool:
    """Propose the pool (seed 0), label it with the carried judge, and look at it with the oracle; what is there already is kept.

    Raises:
        UserError: a pool of another size is there.
    """
    from dedpo_diffusion.core.files import write_text
    from dedpo_diffusion.labels.files import align, label_names, read_labels
    from dedpo_diffusion.pairs.dataset import PairReader
    from dedpo_diffusion.pipelines import label, propose
    from dedpo_diffusion.pipelines.quickstart import call
    from dedpo_diffusion.shapes.world import VOCABULARY

    folder, prompts = work / "pool", work / "prompts.txt"
    work.mkdir(parents=True, exist_ok=True)
    if not (folder / "pairs").exists():
        drawn = np.random.default_rng(0).integers(len(VOCABULARY), size=pairs)
        write_text(prompts, "\n".join(VOCABULARY[i].prompt for i in drawn) + "\n")
        options = ["--steps", SAMPLER["steps"], "--guidance", SAMPLER["guidance"], "--batch", 48, "--device", "cpu"]
        call(propose.main, "propose", "--model", "shapes", "--prompts", prompts, "--out", folder, *options)
    if "clip" not in label_names(folder):
        judge = files("dedpo_diffusion.shapes") / "model" / "judge"
        call(label.main, "label", folder, "--with", f"pickscore={judge}", "--name", "clip", "--device", "cpu", "--summary", "false")
    reader = PairReader(folder)
    ids = reader.ids()
    if len(ids) != pairs:
        raise UserError(f"{folder} holds {len(ids)} pairs, and the study asks for {pairs}; give another --work")
    clip = align(read_labels(folder, "clip"), ids, folder=folder, name="clip", complete=True)
    return Pool(folder, ids, reader.prompts(), *_look(reader, work / "oracle.json"), clip)


def _look(reader: PairReader, file: Path) -> tuple[np.ndarray, np.ndarray]:
    """Oracle rewards and clutter of both images of every pair, kept in `file`."""
    import json

    from dedpo_diffusion.core.console import track
    from dedpo_diffusion.core.files import write_json
    from dedpo_diffusion.pairs.decoding import decode_image
    from dedpo_diffusion.shapes.oracle import TERMS, read, terms

    if not file.is_file():
        rows = []
        for row in track(range(len(reader)), "asking the oracle", len(reader)):
            pair, where = reader.pair(row), reader.location(row)
            looks = [terms(pair.prompt, read(decode_image(data, where))) for data in (pair.image_0, pair.image_1)]
            rows.append([[look[name] for name in TERMS] for look in looks])
        write_json(file, {"terms": list(TERMS), "pairs": rows})
    found = json.loads(file.read_text(encoding="utf-8"))
    values = np.array(found["pairs"])
    return values.mean(axis=-1), 1 - values[:, :, found["terms"].index("clean")]


# ---- people and judges


@dataclass(frozen=True)
class Sample:
    """One seed's pairs and the answers that people would give to all of them.

    `rows` (n,) of the pool, `answer` (n,) 0 or 1, `order` (n,) the order in which people are asked: shares are nested.
    """

    rows: np.ndarray
    answer: np.ndarray
    order: np.ndarray


def draw_sample(pool: Pool, *, seed: int, pairs: int, held_out: int, temperature: float) -> Sample:
    """Fresh pairs, fresh answers, fresh order, all from `seed`; the last `held_out` pairs of the pool are never drawn."""
    from dedpo_diffusion.shapes.oracle import answers

    rng = np.random.default_rng((seed, 1))
    rows = np.sort(rng.choice(len(pool.ids) - held_out, pairs, replace=False))
    answer = answers(rng, pool.reward[rows, 0], pool.reward[rows, 1], temperature=temperature)
    return Sample(rows, answer, rng.permutation(pairs))


def human_labels(sample: Sample, share: float) -> np.ndarray:
    """(n,) answers of the first `share` of the pairs that are asked, NaN for the others."""
    labelled = np.zeros(len(sample.rows), dtype=bool)
    labelled[sample.order[: round(share * len(sample.rows))]] = True
    return np.where(labelled, sample.answer, np.nan)


def judge_labels(pool: Pool, sample: Sample, judge: str, seed: int) -> np.ndarray:
    """(n,) labels of a judge that did not learn from people's.

    random-A repeats the human's answer with chance A; biased-80 names the more cluttered image where the clutter differs most, on as
    many pairs as leave 80 % agreement, and repeats the answer elsewhere; clip is the carried judge.
    """
    if judge == "clip":
        return pool.clip[sample.rows]
    rng = np.random.default_rng((seed, 2))
    if judge in HONESTY:
        return np.where(rng.random(len(sample.rows)) < HONESTY[judge], sample.answer, 1 - sample.answer)
    gap = pool.clutter[sample.rows, 0] - pool.clutter[sample.rows, 1]
    wrong = (gap > 0) != (sample.answer > 0.5)
    first = np.argsort(-np.abs(gap), kind="stable")
    errors = np.cumsum(wrong[first])
    stop = int(np.searchsorted(errors, round(0.2 * len(gap)))) + 1
    labels = sample.answer.copy()
    labels[first[:stop]] = (gap > 0)[first[:stop]]
    return labels


# ---- the verdict


class Verdict:
    """Judges policies on one model held in memory: images of all prompts, and held-out pairs.

    Args:
        pool: its last `held_out` pairs are the held-out ones.
        held_out: their number.
        images: prompts of the grammar that an image is made of.
        rank, alpha: of the adapters.
    """

    def __init__(self, pool: Pool, *, held_out: int, images: int, rank: int, alpha: float) -> None:
        import torch

        from dedpo_diffusion.judges.scorers import load_scorer
        from dedpo_diffusion.models.backbone import Backbone
        from dedpo_diffusion.sampling.sampler import load_sampler
        from dedpo_diffusion.shapes.world import VOCABULARY

        self.pool = pool
        self.rows = np.arange(len(pool.ids) - held_out, len(pool.ids))
        self.model: Backbone = Backbone("shapes", device=torch.device("cpu"))
        self.model.add_lora(rank=rank, alpha=alpha)
        self.pipe = load_sampler("shapes", device="cpu")
        self.pipe.unet = self.model.unet
        self.scorer = load_scorer(f"pickscore={files('dedpo_diffusion.shapes') / 'model' / 'judge'}", device="cpu", batch=64)
        self.prompts = [attributes.prompt for attributes in VOCABULARY[:images]]
        self.encoded: dict[int, tuple[torch.Tensor, Conditioning]] = {}
        self.known: dict[tuple[int, int], torch.Tensor] = {}

    def load(self, parameters: dict[str, torch.Tensor] | None) -> None:
        """Put a policy's adapter in place; None is the base model."""
        import torch

        with torch.no_grad():
            for name, parameter in self.model.trainable().items():
                if parameters is not None:
                    parameter.copy_(parameters[name])
                elif "lora_B" in name:
                    parameter.zero_()

    def images(self) -> dict[str, Any]:
        """Mean oracle reward and mean score of the carried judge over one image a prompt, with the same seeds for every policy."""
        from dedpo_diffusion.sampling.sampler import sample
        from dedpo_diffusion.shapes.oracle import reward

        made = []
        for start in range(0, len(self.prompts), 48):
            part = range(start, min(start + 48, len(self.prompts)))
            made += sample(self.pipe, [self.prompts[k] for k in part], [VERDICT_SEED + k for k in part], **SAMPLER)  # type: ignore[arg-type]
        rewards = reward(self.prompts, made)
        score = np.asarray(self.scorer.score(self.prompts, made), dtype=np.float64)
        return {"reward": float(rewards.mean()), "pickscore": float(score.mean())}

    def accuracy(self) -> float:
        """Share of held-out pairs on which the policy's implicit reward names the image that the oracle prefers; ties count half."""
        gap = self.pool.reward[self.rows, 0] - self.pool.reward[self.rows, 1]
        decided = gap != 0
        margins = self.margins(self.rows[decided], beta=1.0, draws=DRAWS)
        return float(np.mean((np.sign(margins) * np.sign(gap[decided]) + 1) / 2))

    def margins(self, rows: np.ndarray, *, beta: float, draws: int) -> np.ndarray:
        """(n,) mean margin of pairs of the pool over evenly spread timesteps, noises the same for every policy."""
        import torch

        from dedpo_diffusion.dpo.losses import implicit_rewards, margin

        found = []
        for start in range(0, len(rows), 32):
            part = [int(row) for row in rows[start : start + 32]]
            total = torch.zeros(len(part))
            for k in range(draws):
                errors, reference = self._errors(part, k, draws)
                total += margin(implicit_rewards(errors, reference, beta=beta)) / draws
            found.append(total.numpy())
        return np.concatenate(found)

    def _errors(self, rows: list[int], number: int, draws: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Errors of the policy and of the reference, (B, 2) each; the reference's are computed once a pair and draw."""
        import torch

        from dedpo_diffusion.core.records import Conditioning
        from dedpo_diffusion.dpo.noising import step_generator

        encoded = [self._encode(row) for row in rows]
        latents, given = torch.stack([part for part, _ in encoded]), Conditioning.stack([part for _, part in encoded])
        t = (2 * number + 1) * len(self.model.process) // (2 * draws)
        noise = torch.stack([torch.randn(latents.shape[2:], generator=step_generator(row, t, 7)) for row in rows])[:, None]
        at = torch.full((len(rows),), t)
        missing = [k for k, row in enumerate(rows) if (row, t) not in self.known]
        if missing:
            base = self.model.errors(latents[missing], noise[missing], at[missing], given.at(missing), reference=True)
            self.known |= {(rows[k], t): base[place] for place, k in enumerate(missing)}
        return self.model.errors(latents, noise, at, given), torch.stack([self.known[row, t] for row in rows])

    def _encode(self, row: int) -> tuple[torch.Tensor, Conditioning]:
        """Latents (2, C, h, w), the posterior's mean, and the conditioning of a pair of the pool."""
        from dedpo_diffusion.pairs.dataset import PairReader
        from dedpo_diffusion.pairs.pixels import pair_views
        from dedpo_diffusion.training.data import decode_pair

        if row not in self.encoded:
            reader = PairReader(self.pool.folder)
            pixels, _ = pair_views(decode_pair(reader.pair(row), reader.location(row)), self.model.size)
            mean, _ = self.model.encode_images(pixels)
            given = self.model.encode_prompts([self.pool.prompts[row]]).at(0)
            self.encoded[row] = mean * self.model.scale, given
        return self.encoded[row]
