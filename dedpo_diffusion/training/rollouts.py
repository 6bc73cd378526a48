"""Learning from a reward: images by the policy as it is, their rewards and advantages, and the visits of their denoising steps.

    prompts -> trajectories -> images -> rewards -> advantages -> visits -> losses

Rollout r and its visits are a function of (seed, r) and of the policy at its start, whoever computes them: processes sample their part of
the batches, and see the whole rollout afterwards. A checkpoint in the middle of a rollout keeps the policy of its start.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dedpo_diffusion.core.console import UserError, say
from dedpo_diffusion.core.records import Conditioning, Tensors
from dedpo_diffusion.dpo.noising import step_generator
from dedpo_diffusion.dpo.policy_gradient import (
    clipped_loss,
    ddim_mean,
    ddim_timesteps,
    leave_one_out,
    log_probability,
    squared_advantage_loss,
    step_deviation,
    step_kl,
)
from dedpo_diffusion.models.backbone import Backbone
from dedpo_diffusion.sampling.sampler import decode_latents, sampler_around
from dedpo_diffusion.sampling.trajectories import Trajectories, sample_trajectories
from dedpo_diffusion.settings import LoopSettings, TrainSettings
from dedpo_diffusion.training.rewards import Reward

if TYPE_CHECKING:
    from accelerate import Accelerator

PROMPTS, SEEDS, ORDER = 2001, 2002, 2003  # streams of `step_generator`
PATIENCE = 3  # rollouts in a row in which all images have one reward


@dataclass(frozen=True)
class Rollout:
    """N = P K images, those of a prompt together: their trajectories on the CPU, `advantage` (N,), `found` (N, 1 + 2 R) as `Reward.score`
    gives it, and the `order` in which their denoising steps are visited, as image * steps + step."""

    trajectories: Trajectories
    advantage: Tensor
    found: Tensor
    conditioning: Conditioning
    order: Tensor


@dataclass(frozen=True)
class Visits(Tensors):
    """B denoising steps: from `noisy` (B, C, h, w) at `timesteps` (B,) the draw `drawn` at `following`, its `advantage` and
    `log_probability` (B,) when it was drawn, and the prompts."""

    noisy: Tensor
    drawn: Tensor
    timesteps: Tensor
    following: Tensor
    advantage: Tensor
    log_probability: Tensor
    conditioning: Conditioning


@dataclass(frozen=True)
class PolicyResult(Tensors):
    """What B visits leave behind, (B,) each: the loss, the log probability ratio to the policy that drew, the KL divergence from the
    reference (NaN where nobody asked it), and whether the clip took the gradient."""

    loss: Tensor
    log_ratio: Tensor
    kl: Tensor
    clipped: Tensor


def policy_loss(predict: Callable[..., Tensor], process: Any, visits: Visits, *, kind: str, loop: LoopSettings, steps: int) -> PolicyResult:
    """The loss of each visit, times `steps`: its mean over all visits is that of the sums over the images' denoising steps.

    Args:
        predict: of states (B, C, h, w) at timesteps (B,); with `reference=True` the reference's.
        process: the forward process of the model.
        visits: B of them, on the model's device.
        kind: "loop" or "apa".
        loop: its clip, kl and temperature.
        steps: how many denoising steps of an image are draws.
    """
    t, p = visits.timesteps, visits.following
    deviation = step_deviation(process, t, p, eta=loop.eta)
    mean = ddim_mean(process, visits.noisy, predict(visits.noisy, t), t, p, eta=loop.eta)
    own = log_probability(visits.drawn, mean, deviation)
    log_ratio, advantage = own - visits.log_probability, visits.advantage
    kl = torch.full_like(own, torch.nan, requires_grad=False)
    clipped = torch.zeros_like(kl)
    if kind == "apa" or loop.kl:
        anchor = ddim_mean(process, visits.noisy, predict(visits.noisy, t, reference=True), t, p, eta=loop.eta)
        kl = step_kl(mean, anchor, deviation)
    if kind == "apa":
        loss = squared_advantage_loss(own - log_probability(visits.drawn, anchor, deviation), advantage, temperature=loop.temperature)
    else:
        loss = clipped_loss(log_ratio, advantage, clip=loop.clip)
        if loop.kl:
            loss = loss + loop.kl * kl
        moved = log_ratio.detach().exp() - 1
        clipped = ((moved.abs() > loop.clip) & (moved * advantage > 0)).double()
    return PolicyResult(steps * loss, log_ratio.detach(), kl.detach(), clipped)


class Rollouts:
    """Where the visits of a run that learns from a reward come from.

    Args:
        settings: of the run.
        model: with its adapter.
        reward: of images.
        prompts: that are sampled.
        size: pixels of a side.
        accelerator: of the run.

    Attributes:
        together: visits of an optimizer step, over all its micro-batches and processes.
        draws: denoising steps of an image that draw something; the last one leads to the clean latent and draws nothing.
        start: the policy's parameters when the present rollout began.
    """

    def __init__(
        self, settings: TrainSettings, model: Backbone, reward: Reward, prompts: Sequence[str], *, size: int, accelerator: Accelerator
    ) -> None:
        self.settings, self.loop, self.model, self.reward, self.prompts = settings, settings.loop, model, reward, list(prompts)
        self.accelerator, self.size, self.shape = accelerator, size, model.latent_shape(size)
        self.timesteps = ddim_timesteps(len(model.process), self.loop.steps)
        self.draws, optim = self.loop.steps - 1, settings.optim
        self.together = optim.batch * optim.accumulation * accelerator.num_processes
        self.absent = self.encode([None])
        self.pipe = sampler_around(model, model.vae.to(model.device))
        self.start: Mapping[str, Tensor] | None = None
        self.rollout: Rollout | None = None
        self.alike = 0

    @property
    def images(self) -> int:
        """Images of a rollout."""
        return self.loop.prompts * self.loop.images

    # ---- a rollout

    def encode(self, prompts: Sequence[str | None]) -> Conditioning:
        """What the model is conditioned on for these prompts, one image each."""
        found = self.model.encode_prompts(prompts)
        if self.model.text.adapted:
            found = replace(found, tokens=self.model.text.tokens(prompts).to(self.model.device))
        if self.model.told_sizes:
            sizes = torch.tensor([self.size, self.size, 0.0, 0.0, self.size, self.size], device=self.model.device)
            found = replace(found, sizes=sizes.expand(len(prompts), 1, 6))
        return found

    def predictor(self, conditioning: Conditioning) -> Callable[..., Tensor]:
        """The model's prediction of N states at timesteps (N,), guided, for these N prompts."""
        guidance, model = self.loop.guidance, self.model

        def predict(states: Tensor, timesteps: Tensor, *, reference: bool = False) -> Tensor:
            if guidance == 1:
                return model.predict(states[:, None], timesteps, conditioning, reference=reference)[:, 0].float()
            both = Conditioning.cat([self.absent.at([0] * len(states)), conditioning])
            twice, t = torch.cat([states, states])[:, None], torch.cat([timesteps, timesteps])
            without, with_it = model.predict(twice, t, both, reference=reference)[:, 0].float().chunk(2)
            return without + guidance * (with_it - without)

        return predict

    def chosen(self, number: int) -> list[str]:
        """The prompts of rollout `number`: all are taken once, in random order, before one is taken again."""
        count, found = len(self.prompts), []
        for place in range(number * self.loop.prompts, (number + 1) * self.loop.prompts):
            epoch, within = divmod(place, count)
            order = torch.randperm(count, generator=step_generator(self.settings.seed, epoch, PROMPTS))
            found.append(self.prompts[int(order[within])])
        return found

    def seeds(self, number: int) -> list[int]:
        """The seeds of the images of rollout `number`."""
        return torch.randint(0, 2**62, (self.images,), generator=step_generator(self.settings.seed, number, SEEDS)).tolist()

    def order(self, number: int) -> Tensor:
        """In which order a rollout's denoising steps are visited: all of them in random order, before one is visited again."""
        there, wanted = self.images * self.draws, self.loop.updates * self.together
        generator = step_generator(self.settings.seed, number, ORDER)
        return torch.cat([torch.randperm(there, generator=generator) for _ in range(-(-wanted // there))])[:wanted]

    def sample(self, number: int) -> Rollout:
        """Sample, decode and score; each process its part of the batches, which are the same however many processes there are.

        Raises:
            UserError: a reward that cannot be used.
        """
        loop, device, accelerator = self.loop, self.model.device, self.accelerator
        prompts = [prompt for prompt in self.chosen(number) for _ in range(loop.images)]
        seeds, conditioning = self.seeds(number), self.encode(prompts)
        states = torch.zeros(self.images, loop.steps + 1, *self.shape, device=device)
        logs = torch.zeros(self.images, loop.steps, dtype=torch.float64, device=device)
        found = torch.zeros(self.images, 1 + 2 * len(self.reward.names), dtype=torch.float64, device=device)
        starts = range(0, self.images, loop.batch)
        for first in list(starts)[accelerator.process_index :: accelerator.num_processes]:
            part = slice(first, first + loop.batch)
            made = sample_trajectories(
                self.predictor(conditioning.at(part)), self.model.process, seeds[part], timesteps=self.timesteps, eta=loop.eta,
                shape=self.shape, device=device,
            )  # fmt: skip
            states[part], logs[part] = made.states, made.log_probability
            names = [f"{seed} of {prompt!r}" for seed, prompt in zip(seeds[part], prompts[part], strict=True)]
            images = decode_latents(self.pipe, made.states[:, -1], names)
            found[part] = torch.from_numpy(self.reward.score(prompts[part], images, seeds[part])).to(device)
        states, logs, found = (accelerator.reduce(values, reduction="sum").cpu() for values in (states, logs, found))
        advantage = leave_one_out(found[:, 0].view(-1, loop.images)).flatten()
        self._look(found[:, 0], number)
        return Rollout(Trajectories(states, logs), advantage, found, conditioning, self.order(number))

    def _look(self, rewards: Tensor, number: int) -> None:
        """Tell that no image of a rollout is better than another, and end the run where that goes on."""
        self.alike = self.alike + 1 if bool((rewards == rewards[0]).all()) else 0
        if not self.alike:
            return
        words = f"rollout {number}: the reward of all {len(rewards)} images is {float(rewards[0]):g} ({', '.join(self.reward.names)})"
        if self.alike >= PATIENCE:
            raise UserError(
                f"{words}, for the {PATIENCE}rd time in a row, so that nothing can be learned from it; take another loop.reward, or more "
                "loop.images"
            )
        if self.accelerator.is_main_process:
            say(f"Warning: {words}: nothing is learned from this rollout")

    # ---- its visits

    def visits(self, step: int, micro: int) -> Visits:
        """This process's visits of a micro-batch, on the device."""
        batch, made = self.settings.optim.batch, self.rollout
        assert made is not None
        first = step % self.loop.updates * self.together
        first += (micro * self.accelerator.num_processes + self.accelerator.process_index) * batch
        chosen = made.order[first : first + batch]
        image, place = chosen // self.draws, chosen % self.draws
        states, logs = made.trajectories.states, made.trajectories.log_probability
        visits = Visits(
            states[image, place], states[image, place + 1], self.timesteps[place], self.timesteps[place + 1], made.advantage[image],
            logs[image, place], made.conditioning.at(image.to(self.model.device)),
        )  # fmt: skip
        return visits.to(self.model.device)

    def micro_batches(self, done: int) -> Iterator[Visits]:
        """The visits from step `done` on. The images of a rollout are sampled when its first visit is asked for, and not before."""
        optim, updates = self.settings.optim, self.loop.updates
        for step in range(done, optim.steps):
            if step % updates == 0 or self.rollout is None:
                self.begin(step // updates, again=step % updates > 0)
            for micro in range(optim.accumulation):
                yield self.visits(step, micro)

    def begin(self, number: int, *, again: bool) -> None:
        """Sample a rollout by the policy as it is; `again`, by the one that a checkpoint kept."""
        if not again:
            self.start = {name: value.detach().clone() for name, value in self.model.trainable().items()}
        assert self.start is not None
        with torch.no_grad(), holding(self.model, self.start):
            self.rollout = self.sample(number)

    def kept(self, step: int) -> Mapping[str, Tensor] | None:
        """What a checkpoint after this many steps must keep of the rollout: nothing where one ends."""
        return self.start if step % self.loop.updates else None

    def restore(self, start: Mapping[str, Tensor] | None) -> None:
        """Put back what a checkpoint kept."""
        device = self.model.device
        self.start = None if start is None else {name: start[name].to(device) for name in start}

    def learn(self, visits: Visits) -> PolicyResult:
        """Losses of one micro-batch."""
        return policy_loss(
            self.predictor(visits.conditioning), self.model.process, visits, kind=self.settings.objective.kind, loop=self.loop,
            steps=self.draws,
        )  # fmt: skip

    # ---- what is told

    def describe(self) -> list[str]:
        """What is about to be trained, in sentences."""
        loop, optim, objective = self.loop, self.settings.optim, self.settings.objective
        there, visited, rollouts = self.images * self.draws, loop.updates * self.together, -(-optim.steps // loop.updates)
        rewards = " + ".join(
            name if weight == 1 else f"{weight:g} x {name}" for name, weight in zip(self.reward.names, self.reward.weights, strict=True)
        )
        less = f", less {loop.uncertainty:g} times its uncertainty" if loop.uncertainty else ""
        anchor = f", lambda {loop.temperature:g}" if objective.kind == "apa" else f", clip {loop.clip:g}, KL weight {loop.kl:g}"
        return [
            f"{len(self.prompts)} prompts; {loop.prompts} of them a rollout, {loop.images} images each; {rollouts} rollouts or "
            f"{rollouts * self.images} images in all",
            f"of the {there} draws of a rollout ({self.draws} an image) {min(visited, there)} are visited in {loop.updates} steps of "
            f"{self.together}" + (f", {visited / there:.1f} times each" if visited > there else ""),
            f"objective {objective.kind}{anchor}; reward {rewards}{less}",
        ]

    def summary(self, results: PolicyResult) -> dict[str, Any]:
        """One line of metrics: the present rollout's rewards, and what a step's visits say, over all processes."""
        assert self.rollout is not None
        told, names = self.rollout.found, self.reward.names
        spread = told[:, 0].view(-1, self.loop.images).var(dim=1).mean().sqrt()
        scores = {name: float(told[:, 1 + k].mean()) for k, name in enumerate(names)}
        doubts = {name: float(told[:, 1 + len(names) + k].mean()) for k, name in enumerate(names)} if self.loop.uncertainty else {}
        kl = float(self.draws * results.kl.mean())
        return {
            "loss": float(results.loss.mean()), "reward": float(told[:, 0].mean()), "reward_spread": float(spread), "scores": scores,
            **({"uncertainty": doubts} if doubts else {}), "kl": None if kl != kl else kl,
            "ratio_away": float((results.log_ratio.exp() - 1).abs().mean()), "clipped": float(results.clipped.mean()),
        }  # fmt: skip


@contextmanager
def holding(model: Backbone, values: Mapping[str, Tensor]) -> Iterator[None]:
    """Within the block the trained parameters have other values, and no process waits for the others to predict."""
    live, policy = {name: parameter.data for name, parameter in model.trainable().items()}, model.policy
    model.policy = model.network
    for name, parameter in model.trainable().items():
        parameter.data = values[name]
    try:
        yield
    finally:
        for name, parameter in model.trainable().items():
            parameter.data = live[name]
        model.policy = policy
