"""Training on a reward of the model's own images: gradients, resuming, several processes, what is refused, and that rewards rise."""

from __future__ import annotations

import multiprocessing
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from dedpo_diffusion.core.records import Conditioning
from dedpo_diffusion.dpo.noising import ForwardProcess
from dedpo_diffusion.dpo.policy_gradient import ddim_mean, ddim_timesteps, leave_one_out, log_probability, step_deviation
from dedpo_diffusion.judges import scorers
from dedpo_diffusion.pipelines import export, train
from dedpo_diffusion.sampling.trajectories import sample_trajectories
from dedpo_diffusion.settings import LoopSettings
from dedpo_diffusion.shapes.world import VOCABULARY
from dedpo_diffusion.training.rewards import uncertainty
from dedpo_diffusion.training.rollouts import Visits, policy_loss
from dedpo_diffusion.weights.run_folder import checkpoints
from support.doubles import Brightness
from support.processes import together
from support.training import deviation, final, fresh_accelerate_state, metrics, stop_after, train_into  # noqa: F401 - one is a fixture

PROMPTS = [attributes.prompt for attributes in VOCABULARY[::29]]  # five


class Odd(Brightness):
    """Brightness with one answer in place of its own."""

    value = np.nan

    def score(self, prompts, images):
        found = super().score(prompts, images)
        return np.where(np.arange(len(found)) == 1, np.nan, found) if np.isnan(self.value) else np.full(len(found), self.value)


@pytest.fixture(autouse=True)
def brightness(monkeypatch):
    monkeypatch.setitem(scorers.SCORERS, "brightness", lambda location, **options: Brightness())


@pytest.fixture(scope="module")
def prompts(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    file.write_text("\n".join(PROMPTS))
    return file


def arguments(base: Path, prompts: Path, out: Path, **changes: object) -> list[str]:
    """Two rollouts of 2 x 3 images of 3 draws, each visited once in 2 steps of 9."""
    settings = {
        "model": base, "data.pairs": prompts, "out": out, "device": "cpu", "objective.kind": "loop", "loop.reward": "brightness",
        "loop.prompts": 2, "loop.images": 3, "loop.updates": 2, "loop.steps": 4, "loop.guidance": 1.5, "loop.batch": 4, "optim.steps": 4,
        "optim.batch": 9, "optim.learning_rate": 0.003, "optim.warmup": 1, "lora.rank": 2, "checkpoint_every": 1, "keep_checkpoints": 9,
        "log_every": 1, "tracker": "none",
    } | {key.replace("__", "."): value for key, value in changes.items()}  # fmt: skip
    return [part for key, value in settings.items() for part in (f"--{key}", str(value))]


def last(run: Path) -> bytes:
    return (checkpoints(run)[-1][1] / "parameters.safetensors").read_bytes()


# ---- the gradient


def small_policy(seed: int = 0):
    """A policy of three parameters on latents of 2 x 2 x 2, trajectories of two prompts of three images, and their visits."""
    cumulated = torch.cumprod(1 - torch.linspace(0.03, 0.14, 50) ** 2, dim=0)
    process, steps, eta = ForwardProcess(cumulated, "epsilon"), ddim_timesteps(50, 5), 0.8
    theta = torch.tensor([0.7, -0.3, 0.1], requires_grad=True)

    start = theta.detach().clone()

    def predict(states, timesteps, *, reference=False):
        w = start if reference else theta
        return w[0] * states + w[1] * torch.tanh(states.flip(-1)) + w[2] * timesteps.view(-1, 1, 1, 1) / 50

    made = sample_trajectories(predict, process, list(range(6)), timesteps=steps, eta=eta, shape=(2, 2, 2), device=torch.device("cpu"))
    advantage = leave_one_out(torch.randn(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))).flatten()
    image, place = torch.arange(6).repeat_interleave(4), torch.arange(4).repeat(6)
    states, nothing = made.states, Conditioning(torch.zeros(24, 1, 1))
    drawn, chance = states[image, place + 1], made.log_probability[image, place]
    visits = Visits(states[image, place], drawn, steps[place], steps[place + 1], advantage[image], chance, nothing)
    return theta, predict, process, visits, made, steps, eta


@pytest.mark.parametrize("kind", ["loop", "apa"])
@pytest.mark.parametrize("kl", [0.0, 0.7])
def test_at_ratio_1_the_gradient_is_reinforce_with_a_leave_one_out_baseline(kind, kl):
    """APA's too, and a divergence from the reference that the policy still is adds nothing."""
    theta, predict, process, visits, made, steps, eta = small_policy()
    result = policy_loss(predict, process, visits, kind=kind, loop=LoopSettings(eta=eta, kl=kl, temperature=0.3), steps=4)
    assert result.log_ratio.abs().max() < 1e-6 and not result.clipped.any()
    assert (kind == "loop" and not kl) or bool((result.kl == 0).all())
    (found,) = torch.autograd.grad(result.loss.mean(), theta)

    reinforce = torch.zeros(())  # -1/N sum over images and steps of A log pi
    for image in range(6):
        for place in range(4):
            t, p = steps[place].view(1), steps[place + 1].view(1)
            mean = ddim_mean(process, made.states[image, place][None], predict(made.states[image, place][None], t), t, p, eta=eta)
            chance = log_probability(made.states[image, place + 1][None], mean, step_deviation(process, t, p, eta=eta))
            reinforce = reinforce - visits.advantage[4 * image] * chance[0] / 6
    (wanted,) = torch.autograd.grad(reinforce, theta)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    assert wanted.abs().min() > 1e-3


@pytest.mark.parametrize("kind", ["loop", "apa"])
def test_a_reward_rises_and_stays_near_the_reference(kind):
    """The small policy, 60 rollouts of 4 x 8 images, rewarded for dark clean latents: it earns far more, at a bounded divergence."""
    theta, predict, process, _, _, steps, eta = small_policy()
    loop, nothing = LoopSettings(eta=eta, kl=0.02, temperature=0.02, clip=0.2), Conditioning(torch.zeros(128, 1, 1))
    optimizer, earned = torch.optim.Adam([theta], lr=0.02), []
    for number in range(60):
        seeds = list(range(32 * number, 32 * number + 32))
        made = sample_trajectories(predict, process, seeds, timesteps=steps, eta=eta, shape=(2, 2, 2), device=torch.device("cpu"))
        rewards = -made.states[:, -1].mean(dim=(1, 2, 3)).double()
        earned.append(rewards.mean().item())
        advantage = leave_one_out(rewards.view(4, 8)).flatten()
        image, place = torch.arange(32).repeat_interleave(4), torch.arange(4).repeat(32)
        drawn, chance = made.states[image, place + 1], made.log_probability[image, place]
        visits = Visits(made.states[image, place], drawn, steps[place], steps[place + 1], advantage[image], chance, nothing)
        for _ in range(2):
            optimizer.zero_grad()
            policy_loss(predict, process, visits, kind=kind, loop=loop, steps=4).loss.mean().backward()
            optimizer.step()
    before, after = np.array(earned[:10]), np.array(earned[-10:])
    assert after.mean() - before.mean() > 6 * np.sqrt((before.var(ddof=1) + after.var(ddof=1)) / 10)


def test_the_log_probability_of_a_trajectory_is_that_of_its_draws():
    _, predict, process, visits, made, steps, eta = small_policy()
    deviations = step_deviation(process, steps[:-1], steps[1:], eta=eta)
    mean = ddim_mean(process, visits.noisy, predict(visits.noisy, visits.timesteps), visits.timesteps, visits.following, eta=eta)
    s = deviations[:-1].repeat(6).view(-1, 1, 1, 1)
    by_hand = (-((visits.drawn - mean) ** 2) / (2 * s**2) - torch.log(s) - 0.5 * np.log(2 * np.pi)).flatten(1).sum(dim=1)
    torch.testing.assert_close(made.log_probability[:, :-1].flatten(), by_hand.detach(), atol=1e-6, rtol=1e-6)
    assert (made.log_probability[:, -1] == 0).all()


# ---- runs


def test_a_run_begins_at_ratio_1_and_at_the_reference_and_can_be_exported(tiny_model, prompts, tmp_path):
    run = tmp_path / "run"
    assert train.main(arguments(tiny_model, prompts, run, loop__kl=0.01)) == 0
    lines = metrics(run)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert lines[0]["ratio_away"] < 1e-4 and lines[0]["kl"] == 0 and lines[0]["clipped"] == 0
    assert lines[1]["ratio_away"] > 1e-3 and lines[1]["kl"] > 0
    assert lines[2]["ratio_away"] < 1e-4 and lines[2]["kl"] > 0  # of a new rollout by the policy as it is by now
    assert lines[0]["reward"] == lines[1]["reward"] != lines[2]["reward"] and lines[0]["scores"] == {"brightness": lines[0]["reward"]}
    assert export.main([str(run), "--out", str(tmp_path / "made.safetensors")]) == 0


@pytest.mark.parametrize("kind", ["loop", pytest.param("apa", marks=pytest.mark.slow)])
def test_a_stopped_run_resumes_to_the_same_bits(tiny_model, prompts, tmp_path, monkeypatch, kind):
    """In the middle of a rollout, at its end, and with the moving average."""
    changes = {"objective__kind": kind, "optim__average": 0.9, "loop__kl": 0.01 if kind == "loop" else 0.0}
    whole, stopped = (arguments(tiny_model, prompts, tmp_path / name, **changes) for name in ("whole", "stopped"))
    assert train.main(whole) == 0
    for step in (1, 2, 3):
        stop_after(monkeypatch, step)
        with pytest.raises(KeyboardInterrupt):
            train.train(_settings(stopped))
        newest = checkpoints(tmp_path / "stopped")[-1]
        assert newest[0] == step and (newest[1] / "rollout.safetensors").is_file() == (step % 2 == 1)
    assert train.main(stopped) == 0
    assert last(tmp_path / "stopped") == last(tmp_path / "whole")
    assert metrics(tmp_path / "stopped") == metrics(tmp_path / "whole")


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_bits(tiny_model, prompts, tmp_path):
    """SIGKILL in the midst of a rollout's steps, two steps after a checkpoint that lies in the midst of one."""
    changes = {"loop__reward": "oracle_reward", "loop__updates": 3, "optim__steps": 9, "optim__batch": 6, "checkpoint_every": 4}
    whole, killed = (arguments(tiny_model, prompts, tmp_path / name, **changes) for name in ("whole", "killed"))
    assert train.main(whole) == 0
    lines = tmp_path / "killed" / "metrics.jsonl"
    process = multiprocessing.get_context("spawn").Process(target=train_into, args=(killed, tmp_path / "log"))
    process.start()
    while process.is_alive() and (not lines.is_file() or lines.read_text().count("\n") < 6):
        time.sleep(0.01)
    process.kill()
    process.join()
    assert [step for step, _ in checkpoints(tmp_path / "killed")] == [4]
    assert (checkpoints(tmp_path / "killed")[0][1] / "rollout.safetensors").is_file()
    assert train.main(killed) == 0
    assert last(tmp_path / "killed") == last(tmp_path / "whole")
    assert metrics(tmp_path / "killed") == metrics(tmp_path / "whole")


def _settings(argv: list[str]):
    from dedpo_diffusion.core.parser import Parser
    from dedpo_diffusion.settings import TrainSettings

    return Parser(TrainSettings).parse(argv)


@pytest.mark.slow
def test_two_processes_take_the_steps_of_one(folders, prompts, tmp_path):
    """One by twelve draws against two by six, on an SDXL; the images are the same to the bit."""
    changes = {"loop__reward": "oracle_background", "optim__steps": 3, "loop__kl": 0.01, "loop__images": 4, "optim__learning_rate": 3e-4}
    changes |= {"loop__reward": "oracle_reward"}
    one, two = tmp_path / "one", tmp_path / "two"
    assert train.main(arguments(folders["sdxl"], prompts, one, **changes, optim__batch=12)) == 0
    done = together(2, tmp_path, [{"arguments": arguments(folders["sdxl"], prompts, two, **changes, optim__batch=6)}])
    assert done.returncode == 0, done.stderr[-3000:]
    for alone, both in zip(metrics(one), metrics(two), strict=True):
        assert both["reward"] == pytest.approx(alone["reward"], abs=1e-3 if alone["step"] > 2 else 1e-12)
        for key, close in {"loss": 1e-3, "gradient_norm": 1e-2, "kl": 1e-3}.items():
            assert both[key] == pytest.approx(alone[key], rel=1e-2, abs=close), key
    largest, mean = deviation(final(one), final(two))
    assert largest < 2.5 * 3e-4 and mean < 1e-2 * 3e-4


@pytest.mark.slow
def test_a_reward_rises_on_shapes(tmp_path):
    """Six rollouts of the embedded model, rewarded for bright images of two prompts: all later ones earn far more than the first."""
    file, run = tmp_path / "prompts.txt", tmp_path / "run"
    file.write_text("\n".join(PROMPTS[:2]))
    changes = {"loop__images": 8, "loop__guidance": 1, "loop__batch": 16, "optim__steps": 12, "optim__batch": 24, "lora__rank": 1}
    changes |= {"lora__alpha": 1, "optim__learning_rate": 0.01, "checkpoint_every": 12}
    assert train.main(arguments(Path("shapes"), file, run, **changes)) == 0
    rewards, spread = (np.array([line[name] for line in metrics(run)])[::2] for name in ("reward", "reward_spread"))
    assert rewards[1:].min() - rewards[0] > 6 * spread.max() / np.sqrt(16)  # standard errors of a rollout's mean


# ---- what cannot be learned from


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"loop__eta": 0}, "loop.eta is 0; without noise a sampler step draws nothing"),
        ({"loop__images": 1}, "loop.images is 1; an image's reward is compared with that of the prompt's other images"),
        ({"loop__steps": 1}, "loop.steps is 1; the last step draws nothing"),
        ({"loop__clip": 0}, "loop.clip is 0"),
        ({"loop__updates": 0}, "loop.updates is 0; it must be at least 1"),
        ({"loop__reward": "[]"}, "loop.reward is empty"),
        ({"loop__weights": "[1, 2]"}, "loop.weights has 2 numbers for 1 rewards"),
        ({"loop__reward": '["brightness", "brightness"]'}, "one of them is named twice"),
        ({"loop__uncertainty": 1}, "loop.uncertainty needs a judge that embeds images, and brightness does not"),
        ({"loop__reward": "adapted"}, "adapted=PAIRS/labels/adapt.json"),
        ({"lora__dropout": 0.1}, "lora.dropout is 0.1"),
        ({"objective__beta": 100}, "objective.beta is about pairs"),
        ({"data__targets": "soft"}, "data.targets is about pairs"),
        ({"smoke": "sd15"}, "--smoke tries training on pairs"),
        ({"objective__kind": "ipo"}, "loop.reward is given, but objective.kind=ipo learns from pairs"),
    ],
    ids=lambda value: "" if isinstance(value, str) else "-".join(value),
)
def test_what_does_not_go_together_is_refused_in_words(tiny_model, prompts, tmp_path, capsys, changes, words):
    assert train.main(arguments(tiny_model, prompts, tmp_path / "run", **changes)) != 0
    assert words in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "run").exists()


def test_a_reward_that_is_not_finite_is_named(tiny_model, prompts, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(scorers.SCORERS, "brightness", lambda location, **options: Odd())
    assert train.main(arguments(tiny_model, prompts, tmp_path / "run")) != 0
    told = " ".join(capsys.readouterr().err.split())
    assert "scorer brightness gave nan for the image of seed" in told and any(repr(prompt) in told for prompt in PROMPTS)


def test_a_constant_reward_is_warned_of_and_ends_the_run(tiny_model, prompts, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(scorers.SCORERS, "brightness", lambda location, **options: Odd())
    monkeypatch.setattr(Odd, "value", 0.5)
    assert train.main(arguments(tiny_model, prompts, tmp_path / "run", optim__steps=8, loop__steps=2, optim__batch=3)) != 0
    held = capsys.readouterr()
    told = " ".join((held.out + held.err).split())
    assert "Warning: rollout 0: the reward of all 6 images is 0.5 (brightness): nothing is learned from this rollout" in told
    assert "rollout 2: the reward of all 6 images is 0.5 (brightness), for the 3rd time in a row" in told


def test_uncertainty_is_the_norm_in_the_inverse_of_what_is_known():
    rng = np.random.default_rng(0)
    known, e = rng.normal(size=(40, 3)) * [3, 1, 0.1], np.eye(3)
    inverse = np.linalg.inv(known.T @ known + np.eye(3))
    np.testing.assert_allclose(uncertainty(e, inverse), [np.sqrt(v @ inverse @ v) for v in e])
    assert (np.diff(uncertainty(e, inverse)) > 0).all()  # the less was seen of a direction, the less is known
