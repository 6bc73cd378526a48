"""The judge "self": trained policies label pairs by their implicit reward, fold-wise.

    SelfTrainedJudge(["runs/human_only-fold-0", "runs/human_only-fold-1"], pairs, SelfTrainingSettings())

A policy that trained on a person's answer repeats that answer: z - g goes to 0 on the labelled pairs, merging takes the
judge for perfect, and its errors on all other pairs are never corrected. So no policy judges a pair that it trained on.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from scipy.special import log_expit, logsumexp
from torch import Tensor

from dedpo_diffusion.core.console import UserError, say
from dedpo_diffusion.core.files import file_digest
from dedpo_diffusion.core.records import Conditioning
from dedpo_diffusion.dpo.adaptive_power import visited_pairs
from dedpo_diffusion.dpo.losses import implicit_rewards
from dedpo_diffusion.dpo.noising import step_generator
from dedpo_diffusion.judges.judge import Answers, Judge, Question
from dedpo_diffusion.labels.files import read_targets
from dedpo_diffusion.models.backbone import Backbone
from dedpo_diffusion.models.memory import BatchLimit
from dedpo_diffusion.pairs.dataset import PairReader
from dedpo_diffusion.pairs.pixels import pair_views
from dedpo_diffusion.settings import SelfTrainingSettings
from dedpo_diffusion.weights.checkpoints import check_checkpoint
from dedpo_diffusion.weights.run_folder import checkpoints, read_identity, read_settings


@dataclass(frozen=True)
class Policy:
    """A training run as a judge: its settings and inputs, its newest checkpoint, and what it trained on.

    `seen` is (N,) bool, true for the pairs of the dataset that it visited.
    """

    run: Path
    trained: dict[str, Any]
    identity: dict[str, str]
    step: int
    weights: Path
    seen: np.ndarray

    @property
    def beta(self) -> float:
        """Strength of its pull to the reference, as it was trained: objective.sharpness makes another of the one in the settings."""
        return float(self.identity.get("beta", self.trained["objective"]["beta"]))

    @property
    def uncalibrated(self) -> str:
        """Why its margins rank images but are no log-odds of an answer; "" if they are meant to be."""
        kind = self.trained["objective"].get("kind", "sigmoid")
        return "" if kind == "sigmoid" else f"margins of the objective {kind} need not be log-odds"


def read_policy(run: Path, reader: PairReader, fingerprint: str) -> Policy:
    """A run folder whose policy may judge this dataset; no weights are loaded.

    Args:
        run: the run folder.
        reader: the pair dataset.
        fingerprint: the dataset's.

    Raises:
        UserError: no training run, no checkpoint, another dataset, or targets that have changed since.
    """
    trained, identity = read_settings(run), read_identity(run)
    if not {"data", "lora", "objective"} <= set(trained) or not identity:
        raise UserError(f"{run}: no training run; give the --out of `dedpo train`")
    name = trained["data"]["targets"]
    if identity["pairs"] != fingerprint:
        raise UserError(
            f"{run}: was trained on other pairs than {reader.folder}; which of these it has seen is unknown: give runs on this dataset"
        )
    targets, path = read_targets(reader.folder, name), reader.folder / "targets" / f"{name}.parquet"
    if identity["targets"] != file_digest(path):
        raise UserError(
            f"{path} has changed since {run} was trained on it, so which pairs that policy has seen is unknown; "
            "merge them again as they were, or train again into another --out"
        )
    found = checkpoints(run)
    if not found:
        raise UserError(f"{run}: no checkpoint yet; run its `dedpo train` until the end")
    step, folder = found[-1]
    check_checkpoint(folder)
    seen = visited_pairs(targets, path, adaptive=trained["objective"].get("power") == "adaptive")
    return Policy(run, trained, identity, step, folder / "parameters.safetensors", seen)


def who_judges(seen: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
    """Which policies judge which pairs.

    Those that trained on no pair of its prompt: folds are made of whole prompts, and a pair without a human label must be
    judged as blindly as the labelled ones, or their correction says nothing of it. Where there is none, those that did not
    train on the pair itself.

    Args:
        seen: (P, N) bool, the pairs that each policy trained on.
        prompts: of the N pairs.

    Returns:
        (P, N) bool; a pair that every policy trained on has no judge.
    """
    places = {prompt: place for place, prompt in enumerate(dict.fromkeys(prompts))}
    place = np.array([places[prompt] for prompt in prompts])
    met = np.stack([np.bincount(place, weights=row)[place] > 0 for row in seen])
    return np.where(met.all(axis=0), ~seen, ~met)


def pool(rewards: np.ndarray, judges: np.ndarray, temperature: float) -> np.ndarray:
    """Scores of several policies as one, such that its probability is the mean of theirs.

    A mean of probabilities, not of rewards: in it a pair's expected label is the same whether one policy judges it or several.

    Args:
        rewards: (P, N, 2), finite.
        judges: (P, N) bool, the policies that count; at least one a pair.
        temperature: of the probabilities.

    Returns:
        (N, 2); the rewards themselves, up to rounding, where one policy counts.
    """
    share = judges / judges.sum(axis=0)
    logits = (rewards[..., 0] - rewards[..., 1]) / temperature
    gap = temperature * (logsumexp(log_expit(logits), axis=0, b=share) - logsumexp(log_expit(-logits), axis=0, b=share))
    centre = (share * rewards.mean(axis=-1)).sum(axis=0)
    return np.stack([centre + gap / 2, centre - gap / 2], axis=-1)


class PolicyRewards:
    """Implicit rewards under policies against their one base model, averaged over fixed timesteps and noises, in float32.

    The base is the reference whatever a run ended with: that of its last round is the policy itself.

    Whether a policy trained on what it is asked about is not its business; `SelfTrainedJudge` sees to that.

    Args:
        policies: P runs; beta may differ, the base model and the adapter's shape may not.
        settings: draws, and the timesteps and size where they are not to be the runs' own.
        device: torch device; None takes a GPU if there is one.

    Attributes:
        digest: 12 hexadecimal digits over all that the rewards depend on.

    Raises:
        UserError: runs that differ, a base model that is another now, or settings that cannot be used.
    """

    def __init__(self, policies: Sequence[Policy], settings: SelfTrainingSettings, *, device: str | None = None) -> None:
        _check_alike(policies, settings)
        first = policies[0]
        lora, data = first.trained["lora"], first.trained["data"]
        self.policies = list(policies)
        self.model = Backbone(
            first.trained["model"],
            device=torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu")),
            config=first.trained.get("model_config"),
            prediction=first.trained.get("model_prediction"),
        )
        if self.model.fingerprint != first.identity["base_model"]:
            raise UserError(f"{first.run}: the base model {first.trained['model']} is not the one it was trained from; put that one back")
        self.size = settings.size or data["size"] or self.model.size
        self.timesteps = _midpoints(
            settings, first.trained["objective"]["timesteps"] or (0, len(self.model.process)), len(self.model.process)
        )
        shape = self.model.latent_shape(self.size)
        self.noises = [torch.randn(shape, generator=step_generator(settings.seed, k)).to(self.model.device) for k in range(settings.draws)]
        kind = {name: lora.get(name, False) for name in ("rslora", "dora")}
        self.model.add_lora(rank=lora["rank"], alpha=lora["alpha"], targets=lora["targets"], **kind)
        self.weights = [load_file(policy.weights) for policy in policies]
        for policy, weights in zip(policies, self.weights, strict=True):
            if set(weights) != set(self.model.trainable()):
                raise UserError(f"{policy.weights}: holds other layers than the adapter of this model; train the run again")
        parts = [[policy.identity, file_digest(policy.weights), policy.beta] for policy in policies]
        key = json.dumps([parts, self.timesteps, self.size, settings.seed], sort_keys=True)
        self.digest = hashlib.sha256(key.encode()).hexdigest()[:12]

    @torch.no_grad()
    def rewards(self, questions: Sequence[Question], asked: np.ndarray | None = None) -> np.ndarray:
        """The mean implicit reward of each image.

        Args:
            questions: N pairs.
            asked: (P, N) bool, which policy is asked about which pair; None asks every one about all.

        Returns:
            (P, N, 2) float64, 0 where a policy is not asked.

        Raises:
            UserError: a reward is NaN or infinite.
        """
        asked = np.ones((len(self.policies), len(questions)), dtype=bool) if asked is None else asked
        latents, given = self._encode(questions)
        reference = self._errors(latents, given, reference=True)
        found = np.zeros((len(self.policies), len(questions), 2))
        for place, (policy, weights) in enumerate(zip(self.policies, self.weights, strict=True)):
            rows = np.flatnonzero(asked[place])
            if not len(rows):
                continue
            for name, parameter in self.model.trainable().items():
                parameter.copy_(weights[name])
            errors = self._errors(latents[rows], given.at(rows))
            rewards = implicit_rewards(errors.flatten(0, 1), reference[:, rows].flatten(0, 1), beta=policy.beta)
            found[place, rows] = rewards.unflatten(0, (-1, len(rows))).double().mean(dim=0).cpu().numpy()
            if not np.isfinite(found[place]).all():
                raise UserError(f"{policy.run}: a reward is NaN or infinite; train that run again with a lower optim.learning_rate")
        return found

    def _encode(self, questions: Sequence[Question]) -> tuple[Tensor, Conditioning]:
        """Latents (N, 2, C, h, w), the posterior's mean, and the conditioning."""
        pixels, sizes = zip(*(pair_views((q.image_0, q.image_1), self.size) for q in questions), strict=True)
        mean, _ = self.model.encode_images(torch.stack(pixels).flatten(0, 1))
        prompts = {prompt: row for row, prompt in enumerate(dict.fromkeys(q.prompt for q in questions))}
        rows = [prompts[q.prompt] for q in questions]
        given = self.model.encode_prompts(list(prompts)).at(rows)
        return mean.unflatten(0, (-1, 2)) * self.model.scale, replace(given, sizes=torch.stack(sizes).to(mean.device))

    def _errors(self, latents: Tensor, given: Conditioning, *, reference: bool = False) -> Tensor:
        """(draws, N, 2) errors of the adapter that is in place, or of the base model."""
        found = []
        for timestep, noise in zip(self.timesteps, self.noises, strict=True):
            at = torch.full((len(latents),), timestep, device=latents.device)
            found.append(self.model.errors(latents, noise, at, given, reference=reference))
        return torch.stack(found)


def _check_alike(policies: Sequence[Policy], settings: SelfTrainingSettings) -> None:
    """One reference and one adapter must do for all."""
    for policy in policies:
        if policy.trained.get("weights", "lora") == "full" or policy.trained["lora"].get("start") is not None:
            raise UserError(f"{policy.run}: only runs of a fresh adapter can judge, not weights=full or lora.start; train such a run")
    for name in ("draws", "batch"):
        if getattr(settings, name) < 1:
            raise UserError(f"self_training.{name} is {getattr(settings, name)}; it must be at least 1")

    def shared(policy: Policy) -> dict[str, Any]:
        lora = policy.trained["lora"]
        return {
            "base model": policy.identity["base_model"][:12],
            "lora": {name: lora.get(name) for name in ("rank", "alpha", "targets", "rslora", "dora")},
            "size": settings.size or policy.trained["data"]["size"],
            "timesteps": settings.timesteps or policy.trained["objective"]["timesteps"],
        }

    first = shared(policies[0])
    for policy in policies[1:]:
        for what, value in shared(policy).items():
            if value != first[what]:
                raise UserError(
                    f"{policies[0].run} and {policy.run} cannot judge together: their {what} is {first[what]} and {value}; train all folds "
                    "alike (a size or timesteps that differ can be given: --self_training.size, --self_training.timesteps)"
                )


def _midpoints(settings: SelfTrainingSettings, own: Sequence[int], schedule: int) -> list[int]:
    """The middles of `draws` equal parts of the range of timesteps."""
    first, last = settings.timesteps or own
    if not 0 <= first < last <= schedule:
        raise UserError(f"self_training.timesteps {first}, {last}: give a range within [0, {schedule}]")
    return [first + (2 * k + 1) * (last - first) // (2 * settings.draws) for k in range(settings.draws)]


class SelfTrainedJudge(Judge):
    """P(image 0 is preferred) = sigmoid(reward 0 - reward 1), from policies that did not train on the pair.

    Which pairs those are is read from the runs' own targets (`adaptive_power.visited_pairs`). A pair that several policies may judge gets
    the mean of their probabilities; see `who_judges` and `pool`. Margins of most objectives only rank; that is
    said where no temperature is given.

    Args:
        runs: run folders of `dedpo train`, one for each fold.
        pairs: the pair dataset that they were trained on.
        settings: how a reward is read.
        device: torch device; None takes a GPU if there is one.
        temperature: reward differences are divided by it; None takes 1.

    Raises:
        UserError: a run that cannot judge this dataset (see `read_policy`), runs that cannot judge together, or a pair that
            all of them trained on.
    """

    def __init__(
        self,
        runs: Sequence[str],
        pairs: Path,
        settings: SelfTrainingSettings,
        *,
        device: str | None = None,
        temperature: float | None = None,
    ) -> None:
        reader = PairReader(pairs)
        fingerprint, ids = reader.fingerprint(), reader.ids()
        policies = [read_policy(Path(run), reader, fingerprint) for run in runs]
        seen = np.stack([policy.seen for policy in policies])
        if seen.all(axis=0).any():
            _refuse(pairs, [ids[row] for row in np.flatnonzero(seen.all(axis=0))])
        self.pairs, self.rows = pairs, {pair_id: row for row, pair_id in enumerate(ids)}
        self.judges = who_judges(seen, reader.prompts())
        self.policies = PolicyRewards(policies, settings, device=device)
        self.model = self.policies.model.unet
        self.parallel = settings.batch
        self.limit = BatchLimit(settings.batch, name="self", what="pairs", remedy="lower --self_training.size")
        super().__init__("self", f"self-{self.policies.digest}", 1.0 if temperature is None else temperature)
        for policy, judged in zip(policies, self.judges, strict=True):
            steps = f"step {policy.step} of {policy.trained['optim']['steps']}"
            say(f"{policy.run}: {steps}, beta {policy.beta:g}, trained on {policy.seen.sum()} pairs, judges {judged.sum()}")
            if policy.uncalibrated and temperature is None:
                say(
                    f"Warning: {policy.run}: {policy.uncalibrated}, so its labels are good for ranking only: "
                    "calibrate them (`dedpo calibrate`), or give a --temperature"
                )

    def answer(self, questions: Sequence[Question]) -> Answers:
        """Rewards of both images of N pairs of the dataset.

        Raises:
            UserError: a pair of another dataset, since nobody knows whether a policy trained on it.
        """
        strange = [q.pair_id for q in questions if q.pair_id not in self.rows]
        if strange:
            raise UserError(
                f"pair {strange[0]!r} is none of {self.pairs}'s, and judge self labels only pairs of the dataset that its runs saw"
            )
        judges = self.judges[:, [self.rows[q.pair_id] for q in questions]]

        def rewards(rows: Sequence[int]) -> np.ndarray:
            return self.policies.rewards([questions[row] for row in rows], judges[:, list(rows)])

        found = np.concatenate(list(self.limit.over(range(len(questions)), rewards)), axis=1)
        return Answers(pool(found, judges, self.temperature), [""] * len(questions))


def _refuse(pairs: Path, ids: list[str]) -> None:
    more = f" (and on {len(ids) - 1} more)" if len(ids) > 1 else ""
    raise UserError(
        f"every given policy trained on pair {ids[0]!r}{more}, and would repeat its human label. Train fold-wise: "
        f"`dedpo merge {pairs} --method human_only --folds 2`, then `dedpo train` on each of the targets human_only-fold-0 and -1, "
        "and give both runs: self=RUN,RUN"
    )
