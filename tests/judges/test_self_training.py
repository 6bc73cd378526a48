"""The judge "self": rewards by hand, no policy judges what it trained on, refusals."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy.special import expit

from dedpo_diffusion.core.console import UserError
from dedpo_diffusion.core.records import Labels, Pair, Targets
from dedpo_diffusion.debias import inverse_propensity, pair_targets, pair_weights
from dedpo_diffusion.judges.judge import Question, probability
from dedpo_diffusion.judges.registry import load_judge
from dedpo_diffusion.judges.self_training import PolicyRewards, SelfTrainedJudge, pool, read_policy, who_judges
from dedpo_diffusion.labels.calibration import assign_folds
from dedpo_diffusion.labels.files import read_targets, write_labels, write_targets
from dedpo_diffusion.pairs.dataset import PairReader, PairWriter
from dedpo_diffusion.pairs.decoding import decode_image
from dedpo_diffusion.pipelines import merge, train
from dedpo_diffusion.settings import LabelSettings, SelfTrainingSettings
from dedpo_diffusion.weights.run_folder import checkpoints
from support.pictures import picture

IDS = [f"p{k}" for k in range(16)]
PROMPTS = [f"a {size} {shape}" for size in ("small", "large") for shape in ("circle", "cross")]
HUMAN = {"p0": 1.0, "p1": 0.0, "p2": 1.0, "p3": 1.0, "p4": 0.0, "p5": 1.0, "p6": 0.0, "p7": 0.0}
FEW = SelfTrainingSettings(draws=3)
BETA = {0: 200.0, 1: 300.0}


@pytest.fixture(autouse=True)
def _fresh_accelerate_state():
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def write_dataset(folder: Path) -> Path:
    """16 pairs of four prompts, half of them labelled, all four prompts among the labelled."""
    with PairWriter(folder) as writer:
        for k, pair_id in enumerate(IDS):
            writer.add(Pair(pair_id, PROMPTS[k % 4], picture(2 * k), picture(2 * k + 1)))
    write_labels(folder, "human", Labels(list(HUMAN), np.array(list(HUMAN.values()))))
    assert merge.main([str(folder), "--method", "human_only", "--folds", "2"]) == 0
    return folder


def train_run(base: Path, pairs: Path, out: Path, targets: str, **changes: object) -> Path:
    settings = {
        "model": base, "data.pairs": pairs, "data.targets": targets, "out": out, "device": "cpu", "optim.steps": 3, "optim.batch": 4,
        "optim.learning_rate": 0.003, "optim.warmup": 1, "objective.beta": 200, "lora.rank": 2,
    } | {key.replace("__", "."): value for key, value in changes.items()}  # fmt: skip
    assert train.main([part for key, value in settings.items() for part in (f"--{key}", str(value))]) == 0
    return out


@pytest.fixture(scope="module")
def trained(tiny_model, tmp_path_factory) -> tuple[Path, list[Path]]:
    """The dataset, and the runs of folds 0 and 1, of different betas."""
    folder = tmp_path_factory.mktemp("self")
    pairs = write_dataset(folder / "data")
    runs = []
    for k, beta in BETA.items():
        runs.append(train_run(tiny_model, pairs, folder / f"run-{k}", f"human_only-fold-{k}", objective__beta=beta))
    return pairs, runs


@pytest.fixture(scope="module")
def everything(trained, tiny_model, tmp_path_factory) -> Path:
    """A run on all human labels."""
    return train_run(tiny_model, trained[0], tmp_path_factory.mktemp("all") / "run", "human_only")


def questions(pairs: Path) -> list[Question]:
    return [Question(p.pair_id, p.prompt, decode_image(p.image_0, ""), decode_image(p.image_1, "")) for p in PairReader(pairs).iter_pairs()]


def judge_of(trained, settings: SelfTrainingSettings = FEW, **options) -> SelfTrainedJudge:
    pairs, runs = trained
    return SelfTrainedJudge([str(run) for run in runs], pairs, settings, device="cpu", **options)


def single(pairs: Path, run: Path, settings: SelfTrainingSettings = FEW) -> PolicyRewards:
    reader = PairReader(pairs)
    return PolicyRewards([read_policy(run, reader, reader.fingerprint())], settings, device="cpu")


# ---- rewards


@torch.no_grad()
def test_rewards_equal_a_plain_loop_over_images_and_draws(trained, tiny_model):
    """One image, one draw at a time, with the libraries' own calls; adapter loaded from the checkpoint, on and off."""
    from diffusers import StableDiffusionPipeline
    from peft import LoraConfig

    from dedpo_diffusion.dpo.noising import step_generator

    pairs, runs = trained
    pipe = StableDiffusionPipeline.from_pretrained(tiny_model, safety_checker=None)
    pipe.unet.add_adapter(LoraConfig(r=2, lora_alpha=8, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    stored = load_file(checkpoints(runs[1])[-1][1] / "parameters.safetensors")
    assert pipe.unet.load_state_dict(stored, strict=False).unexpected_keys == []
    alphas, asked = pipe.scheduler.alphas_cumprod, questions(pairs)[:4]
    found = single(pairs, runs[1]).rewards(asked)[0]
    for question, pair in zip(asked, found, strict=True):
        tokens = pipe.tokenizer(question.prompt, padding="max_length", max_length=16, return_tensors="pt").input_ids
        text = pipe.text_encoder(tokens)[0]
        for image, reward in zip((question.image_0, question.image_1), pair, strict=True):
            pixels = torch.from_numpy(np.array(image, dtype=np.float32)).permute(2, 0, 1)[None] / 127.5 - 1
            latent = pipe.vae.encode(pixels).latent_dist.mean * pipe.vae.config.scaling_factor
            total = 0.0
            for k, timestep in enumerate((166, 500, 833)):  # the middles of three equal parts of 0 to 1000
                noise = torch.randn(4, 8, 8, generator=step_generator(0, k))
                noisy = alphas[timestep].sqrt() * latent + (1 - alphas[timestep]).sqrt() * noise
                error = []
                for switch in (pipe.unet.enable_adapters, pipe.unet.disable_adapters):
                    switch()
                    error.append((pipe.unet(noisy, torch.tensor([timestep]), text).sample - noise).square().mean().item())
                total += -0.5 * BETA[1] * (error[0] - error[1])
            assert reward == pytest.approx(total / 3, abs=5e-5)  # beta / 2 times the rounding of errors near 1
    assert np.abs(found).max() > 1e-3


def test_an_untrained_adapter_is_undecided(trained, tiny_model, tmp_path):
    pairs, _ = trained
    run = train_run(tiny_model, pairs, tmp_path / "run", "human_only-fold-0")
    file = checkpoints(run)[-1][1] / "parameters.safetensors"
    fresh = {name: torch.zeros_like(value) if "lora_B" in name else value for name, value in load_file(file).items()}
    save_file(fresh, file)
    (file.parent / "checksums.json").unlink()  # a changed file would be taken for a damaged one
    rewards = single(pairs, run).rewards(questions(pairs))
    assert (rewards == 0).all()
    assert (probability(pool(rewards, np.ones((1, 16), dtype=bool), 1.0), 1.0) == 0.5).all()


@pytest.mark.slow
def test_batch_1_equals_batch_n_and_swapped_images_give_one_minus_p(trained):
    judge, asked = judge_of(trained), questions(trained[0])
    together = probability(judge.answer(asked).scores, 1.0)
    alone = np.concatenate([probability(judge.answer([question]).scores, 1.0) for question in asked])
    np.testing.assert_allclose(alone, together, atol=1e-5)
    swapped = [Question(q.pair_id, q.prompt, q.image_1, q.image_0) for q in asked]
    np.testing.assert_allclose(probability(judge.answer(swapped).scores, 1.0), 1 - together, atol=1e-5)
    assert np.ptp(together) > 1e-3
    assert (judge.answer(asked).scores == judge.answer(asked).scores).all()


@pytest.mark.slow
def test_little_memory_halves_the_batch_and_leaves_the_rewards(trained, capsys):
    judge, asked = judge_of(trained), questions(trained[0])[:8]
    whole, most = probability(judge.answer(asked).scores, 1.0), judge.parallel

    def refuse(module, given):
        if len(given[0]) > 4:  # two pairs
            raise torch.OutOfMemoryError("CUDA out of memory")

    judge.model.register_forward_pre_hook(refuse)
    np.testing.assert_allclose(probability(judge.answer(asked).scores, 1.0), whole, atol=1e-5)
    halves = [half for half in (8, 4) if half <= most]
    words = "self: the GPU's memory is too small for {} pairs at once; going on with {}\n"
    assert capsys.readouterr().out.endswith("".join(words.format(half, half // 2) for half in halves))


@pytest.mark.slow
def test_the_version_follows_everything_that_the_labels_depend_on(trained):
    pairs, runs = trained
    same, names = judge_of(trained), [str(run) for run in runs]
    changed = [
        SelfTrainedJudge(names[::-1], pairs, FEW, device="cpu"),
        judge_of(trained, temperature=2.0),
        judge_of(trained, SelfTrainingSettings(draws=4)),
        judge_of(trained, SelfTrainingSettings(draws=3, seed=1)),
        judge_of(trained, SelfTrainingSettings(draws=3, timesteps=(0, 500))),
        judge_of(trained, SelfTrainingSettings(draws=3, size=32)),
    ]
    assert len({same.version, *(judge.version for judge in changed)}) == 7
    assert judge_of(trained).version == same.version
    by_name = load_judge(f"self={','.join(names)}", LabelSettings(pairs=pairs, judges=[], device="cpu", self_training=FEW))
    assert (by_name.name, by_name.version) == ("self", same.version)


# ---- who judges what


def test_each_labelled_pair_is_judged_only_by_the_policy_that_did_not_train_on_it(trained):
    pairs, runs = trained
    asked, judge = questions(pairs), judge_of(trained)
    apart = np.concatenate([single(pairs, run).rewards(asked) for run in runs])
    scores = judge.answer(asked).scores
    assert np.abs(apart[0] - apart[1]).max() > 1e-3
    judged_by = set()
    for row, pair_id in enumerate(IDS):
        seen = [bool(read_targets(pairs, f"human_only-fold-{k}").weight[row]) for k in (0, 1)]
        assert seen.count(True) == (pair_id in HUMAN)
        if pair_id in HUMAN:
            np.testing.assert_allclose(scores[row], apart[seen.index(False), row], atol=1e-4)  # of 0.1, in float32, other batches
            judged_by.add(seen.index(False))
    assert judged_by == {0, 1}


def test_pairs_without_a_label_are_judged_as_blindly_as_the_labelled_ones():
    """Two labelled prompts in two folds, a third that nobody labelled, and a policy that saw other pairs of its own prompt."""
    prompts = ["a", "a", "b", "b", "c"]
    seen = np.array([[False, False, True, False, False], [True, False, False, False, False]])
    assert who_judges(seen, prompts).tolist() == [[True, True, False, False, True], [False, False, True, True, True]]
    assert who_judges(np.array([[True, False], [False, True]]), ["a", "a"]).tolist() == [[False, True], [True, False]]
    assert who_judges(np.array([[True, False]]), ["a", "a"]).tolist() == [[False, True]]


def logistic(features: np.ndarray, z: np.ndarray) -> np.ndarray:
    """Weights of a ridge logistic regression, by Newton's method."""
    weights = np.zeros(features.shape[1])
    for _ in range(6):
        p = expit(features @ weights)
        hessian = (features * (p * (1 - p))[:, None]).T @ features + 0.3 * np.eye(len(weights))
        weights -= np.linalg.solve(hessian, features.T @ (p - z) + 0.3 * weights)
    return weights


def test_judging_by_prompt_keeps_the_merge_unbiased_and_a_mean_over_all_policies_does_not():
    """Policies that learn prompts by heart, 300 draws of people and pairs: how much of the judge's error stays in the targets."""
    rng, left = np.random.default_rng(0), {"by prompt": [], "by pair": [], "in-sample": []}
    for draw in range(300):
        prompt = rng.integers(40, size=160)
        features = np.hstack([rng.normal(size=(160, 4)), np.eye(40)[prompt]])
        p = expit(features @ np.concatenate([rng.normal(0, 0.5, 4), rng.normal(0, 1, 40)]))
        labelled = np.isin(np.arange(160), rng.permutation(160)[:80])
        z = np.where(labelled, rng.random(160) < p, np.nan)
        names = [str(k) for k in prompt]
        seen = labelled & (assign_folds(names, 2, draw) != np.arange(2)[:, None])
        margins = np.stack([features @ logistic(features[rows], z[rows]) for rows in (*seen, labelled)])
        rewards = np.stack([margins, np.zeros_like(margins)], axis=-1)
        whole = pool(rewards[2:], np.ones((1, 160), dtype=bool), 1.0)
        arms = {"by prompt": pool(rewards[:2], who_judges(seen, names), 1.0), "by pair": pool(rewards[:2], ~seen, 1.0), "in-sample": whole}
        for arm, scores in arms.items():
            g, h = probability(scores, 1.0), inverse_propensity(z)
            weight = pair_weights(h, 0.7)
            added = weight * (pair_targets(z, g, h, weight) - 0.5) - (p - 0.5)
            left[arm].append((added * (g - p)).sum() / ((g - p) ** 2).sum())
    mean, error = ({arm: f(found) for arm, found in left.items()} for f in (np.mean, lambda found: np.std(found) / np.sqrt(300)))
    assert abs(mean["by prompt"]) < 4 * error["by prompt"] < 0.08
    assert mean["by pair"] < -4 * error["by pair"]
    assert mean["in-sample"] > 1


def test_several_policies_are_pooled_to_the_mean_of_their_probabilities():
    rewards = np.random.default_rng(0).normal(0, 3, (3, 40, 2))
    judges = np.random.default_rng(1).random((3, 40)) < 0.6
    judges[0] |= ~judges.any(axis=0)
    for temperature in (1.0, 2.5):
        each = expit((rewards[..., 0] - rewards[..., 1]) / temperature)
        expected = [each[judges[:, row], row].mean() for row in range(40)]
        scores = pool(rewards, judges, temperature)
        np.testing.assert_allclose(probability(scores, temperature), expected, atol=1e-12)
        alone = judges.sum(axis=0) == 1
        np.testing.assert_allclose(scores[alone], rewards[judges.argmax(axis=0)[alone], alone.nonzero()[0]], atol=1e-12)
    assert pool(np.array([[[900.0, -900.0]], [[900.0, -900.0]]]), np.ones((2, 1), dtype=bool), 1.0).tolist() == [[900.0, -900.0]]


@pytest.mark.slow
def test_a_persons_answer_reaches_neither_the_policy_that_judges_it_nor_its_label(trained, tiny_model, tmp_path):
    """Change the answers to all pairs of fold 0: that fold's targets stay byte for byte, so does its policy, so do their labels."""
    pairs, runs = trained
    other = write_dataset(tmp_path / "data")
    held_out = [i for i in HUMAN if read_targets(pairs, "human_only-fold-0").weight[IDS.index(i)] == 0]
    changed = {pair_id: 1 - label if pair_id in held_out else label for pair_id, label in HUMAN.items()}
    write_labels(other, "human", Labels(list(changed), np.array(list(changed.values()))))
    assert merge.main([str(other), "--method", "human_only", "--folds", "2"]) == 0

    def content(folder: Path, k: int) -> bytes:
        return (folder / "targets" / f"human_only-fold-{k}.parquet").read_bytes()

    assert held_out and content(other, 0) == content(pairs, 0) and content(other, 1) != content(pairs, 1)
    again = [train_run(tiny_model, other, tmp_path / f"run-{k}", f"human_only-fold-{k}", objective__beta=BETA[k]) for k in (0, 1)]
    asked = [question for question in questions(pairs) if question.pair_id in held_out]
    scores = SelfTrainedJudge([str(run) for run in again], other, FEW, device="cpu").answer(asked).scores
    assert (scores == judge_of(trained).answer(asked).scores).all()


# ---- runs that only rank, and what a run has visited


def with_objective(run: Path, copy: Path, **changes: object) -> Path:
    """A copy of a run that says it was trained with another objective."""
    import yaml

    shutil.copytree(run, copy)
    settings = yaml.safe_load((copy / "settings.yaml").read_text())
    settings["objective"] |= changes
    (copy / "settings.yaml").write_text(yaml.safe_dump(settings))
    return copy


@pytest.mark.parametrize("kind", ["ipo", "mapo", "sigmoid"])
def test_margins_of_other_objectives_are_said_to_rank_only(trained, tmp_path, capsys, kind):
    pairs, runs = trained
    copy = with_objective(runs[0], tmp_path / "copy", kind=kind)
    capsys.readouterr()
    SelfTrainedJudge([str(copy), str(runs[1])], pairs, FEW, device="cpu")
    assert (f"{copy}: margins of the objective {kind} need not be log-odds" in capsys.readouterr().out) == (kind != "sigmoid")


@pytest.mark.slow
def test_a_power_that_follows_has_visited_the_pairs_it_started_without(trained, tiny_model, tmp_path):
    """Merged at power 0: a fixed run visits the labelled pairs, one that follows all that the judge labelled; never the fold left out."""
    pairs = write_dataset(tmp_path / "data")
    write_labels(pairs, "judge", Labels(IDS, np.linspace(0.1, 0.9, 16)))
    assert merge.main([str(pairs), "--method", "tuned", "--power", "0", "--folds", "2"]) == 0
    targets = read_targets(pairs, "tuned-fold-0")
    inside, reader = ~np.isnan(targets.judge), PairReader(pairs)
    assert 0 < (targets.weight > 0).sum() < inside.sum() < 16
    for power, seen in (("fixed", targets.weight > 0), ("adaptive", inside)):
        run = train_run(tiny_model, pairs, tmp_path / power, "tuned-fold-0", objective__power=power)
        assert read_policy(run, reader, reader.fingerprint()).seen.tolist() == seen.tolist()


# ---- refusals


def refusal(runs: list[Path], pairs: Path, settings: SelfTrainingSettings = FEW) -> str:
    with pytest.raises(UserError) as caught:
        SelfTrainedJudge([str(run) for run in runs], pairs, settings, device="cpu")
    return str(caught.value)


def test_a_pair_that_every_policy_trained_on_is_refused_before_the_model_is_loaded(trained, everything, monkeypatch):
    from dedpo_diffusion.judges import self_training

    monkeypatch.setattr(self_training, "Backbone", None)
    pairs, runs = trained
    message = refusal([everything], pairs)
    assert "trained on pair 'p0' (and on 7 more)" in message
    assert f"`dedpo merge {pairs} --method human_only --folds 2`" in message
    assert "every given policy trained on pair" in refusal([everything, runs[0]], pairs)


def test_another_dataset_and_changed_targets_are_refused(trained, tiny_model, tiny_pairs, tmp_path):
    assert "was trained on other pairs than" in refusal(trained[1], tiny_pairs)
    pairs = write_dataset(tmp_path / "data")
    run = train_run(tiny_model, pairs, tmp_path / "run", "human_only-fold-0")
    write_targets(pairs, "human_only-fold-0", Targets(IDS, np.ones(16), np.ones(16)), {})
    assert "human_only-fold-0.parquet has changed since" in refusal([run], pairs)
    (pairs / "targets" / "human_only-fold-0.parquet").unlink()
    assert "human_only-fold-0.parquet" in refusal([run], pairs)


def test_runs_that_cannot_judge_together_are_refused(trained, tiny_model, tmp_path):
    pairs, runs = trained
    other = train_run(tiny_model, pairs, tmp_path / "rank", "human_only-fold-1", lora__rank=4)
    message = refusal([runs[0], other], pairs)
    assert "their lora is" in message and "'rank': 2" in message and "'rank': 4" in message
    copies = [Path(shutil.copytree(run, tmp_path / run.name)) for run in runs]
    for copy, words in zip(copies, ("their base model is", "is not the one it was trained from"), strict=True):
        identity = json.loads((copy / "identity.json").read_text())
        (copy / "identity.json").write_text(json.dumps(identity | {"base_model": "f" * 64}))
        assert words in refusal(copies, pairs)


def test_folders_that_are_no_finished_training_run_are_refused(trained, tiny_model, tmp_path):
    pairs, runs = trained
    assert "no run folder" in refusal([tmp_path / "nowhere"], pairs)
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples" / "settings.yaml").write_text("model: shapes\n")
    assert "no training run" in refusal([tmp_path / "samples"], pairs)
    for name in ("settings.yaml", "identity.json"):
        (tmp_path / "begun").mkdir(exist_ok=True)
        (tmp_path / "begun" / name).write_bytes((runs[0] / name).read_bytes())
    assert "no checkpoint yet" in refusal([tmp_path / "begun"], pairs)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (SelfTrainingSettings(draws=0), "draws is 0"),
        (SelfTrainingSettings(timesteps=(500, 500)), "within [0, 1000]"),
        (SelfTrainingSettings(timesteps=(0, 1001)), "within [0, 1000]"),
        (SelfTrainingSettings(size=15), "no multiple of"),
    ],
)
def test_settings_that_cannot_be_used_are_refused(trained, settings, words):
    assert words in refusal(trained[1], trained[0], settings)


def test_a_pair_of_nowhere_is_refused(trained):
    question = questions(trained[0])[0]
    with pytest.raises(UserError, match="is none of"):
        judge_of(trained).prefer([question.prompt], [question.image_0], [question.image_1])
