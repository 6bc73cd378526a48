"""Every objective passes one catalogue of properties; then hand-worked values, limits to DPO, and the table in the docs."""

from __future__ import annotations

import math
import re
import typing
from pathlib import Path

import numpy as np
import pytest
import torch

from dedpo_diffusion import balance_errors, implicit_rewards, margin, preference_loss, preference_step
from dedpo_diffusion.core.records import PairBatch
from dedpo_diffusion.dpo.objectives import OBJECTIVES, objective_loss
from dedpo_diffusion.models.backbone import Backbone
from dedpo_diffusion.settings.training import Kind, ObjectiveSettings
from dedpo_diffusion.shapes.world import parse_prompt, render, sample_scene

KINDS = list(OBJECTIVES)
AFFINE = [kind for kind in KINDS if OBJECTIVES[kind].affine]
BETA = 20.0
BATCH = {"dr_dpo", "kto"}
DOCS = Path(__file__).parents[2] / "docs" / "objectives.md"


def rows(heading: str) -> list[list[str]]:
    """The table's rows in that section of docs/objectives.md."""
    section = DOCS.read_text(encoding="utf-8").split(f"\n## {heading}\n")[1].split("\n## ")[0]
    return [re.split(r" +\| +", line.strip("| \n")) for line in section.splitlines() if line.startswith("| `")]


ROWS = rows("The table")
BOUNDED, CAPPED = ({row[0].strip("`") for row in ROWS if row[column] == "yes"} for column in (5, 6))  # as the docs say


def pairs(seed: int = 0, count: int = 12, dtype=torch.float64) -> dict[str, torch.Tensor]:
    """Errors around 1, targets in [0, 1], weights around 1."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.rand(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    made = {"policy": 0.5 + draw(count, 2), "reference": 0.5 + draw(count, 2), "target": draw(count), "weight": 0.5 + draw(count)}
    return {name: value.to(dtype) for name, value in made.items()}


def loss(kind: str, p: dict[str, torch.Tensor], *, beta: float = BETA, cap: float | None = None, **options: float) -> torch.Tensor:
    return objective_loss(p["policy"], p["reference"], p["target"], p["weight"], kind=kind, beta=beta, options=options, margin_cap=cap)


def at(rewards: tuple[float, float], target: float, kind: str, **options: float) -> float:
    """Loss of one pair of weight 1 with these rewards: beta 2, r = 10 and e = 10 - R."""
    policy = 10 - torch.tensor([rewards], dtype=torch.float64)
    p = {"policy": policy, "reference": torch.full_like(policy, 10), "target": torch.tensor([target], dtype=torch.float64)}
    return loss(kind, {**p, "weight": torch.ones(1).double()}, beta=2.0, **options).item()


def gradient(kind: str, p: dict[str, torch.Tensor], **options: float) -> torch.Tensor:
    policy = p["policy"].detach().clone().requires_grad_()
    return torch.autograd.grad(loss(kind, {**p, "policy": policy}, **options).mean(), policy)[0]


@pytest.mark.parametrize("kind", KINDS)
def test_a_loss_for_each_pair(kind):
    assert loss(kind, pairs()).shape == (12,)
    assert loss(kind, pairs(count=1)).shape == (1,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_finite_at_extreme_margins(kind, dtype):
    """Errors from 0 to 100 at beta 5000 and references alike: margins up to 250000 either way, forward and gradient."""
    values = torch.tensor([0.0, 1e-6, 1.0, 100.0])
    policy = torch.cartesian_prod(values, values).to(dtype).requires_grad_()
    reference = torch.cartesian_prod(values, values).flip(0).to(dtype)
    target = torch.tensor([0.0, 1.0, 0.5, 1.0] * 4, dtype=dtype)
    made = {"policy": policy, "reference": reference, "target": target, "weight": torch.ones(16, dtype=dtype)}
    result = loss(kind, made, beta=5000.0)
    result.mean().backward()
    assert torch.isfinite(result).all()
    assert torch.isfinite(policy.grad).all()
    if OBJECTIVES[kind].affine:
        wide = loss(kind, {**made, "target": 4 * target - 1.5}, beta=5000.0, cap=10.0)
        assert torch.isfinite(wide).all()


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck_of_the_mean(kind):
    """KTO's reference point is held fixed in the gradient: checked where it is 0."""
    p = pairs(1, 5)
    p["reference"] = p["policy"] - 0.1 * torch.rand(5, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    assert implicit_rewards(p["policy"], p["reference"], beta=BETA).mean() < 0
    assert torch.autograd.gradcheck(lambda e: loss(kind, {**p, "policy": e}).mean(), p["policy"].requires_grad_())


@pytest.mark.parametrize("kind", KINDS)
def test_swapping_the_images_and_the_target_changes_nothing(kind):
    p = pairs(3)
    swapped = {**p, "policy": p["policy"].flip(1), "reference": p["reference"].flip(1), "target": 1 - p["target"]}
    torch.testing.assert_close(loss(kind, p), loss(kind, swapped), rtol=1e-12, atol=1e-12)


def chord_gap(kind: str) -> float:
    """How far the loss in the middle is from the mean of the losses at two targets, at most; 0 if affine."""
    p, low, high = pairs(4), pairs(5)["target"], pairs(6)["target"]
    if OBJECTIVES[kind].affine:
        low, high = 6 * low - 3, 6 * high - 2
    middle, ends = loss(kind, {**p, "target": (low + high) / 2}), [loss(kind, {**p, "target": t}) for t in (low, high)]
    return (middle - (ends[0] + ends[1]) / 2).abs().max().item()


@pytest.mark.parametrize("kind", KINDS)
def test_affine_in_the_target_exactly_where_claimed(kind):
    if OBJECTIVES[kind].affine:
        assert chord_gap(kind) < 1e-9
    else:
        assert chord_gap(kind) > 1e-3


@pytest.mark.parametrize("kind", [kind for kind in KINDS if not OBJECTIVES[kind].affine])
@pytest.mark.parametrize("value", [-0.01, 1.01])
def test_a_target_outside_is_refused_where_the_loss_is_not_affine(kind, value):
    p = pairs()
    p["target"][3] = value
    with pytest.raises(ValueError, match="human_only or naive"):
        loss(kind, p)


@pytest.mark.parametrize("kind", AFFINE)
def test_bounded_below_outside_exactly_where_claimed(kind):
    """Errors of the two images at 0, 1 and 10^6, targets 2 and -1, beta 2."""
    values = torch.tensor([0.0, 1.0, 1e6], dtype=torch.float64)
    policy = torch.cartesian_prod(values, values)
    one = torch.ones(len(policy), dtype=torch.float64)
    p = {"policy": policy, "reference": torch.ones_like(policy), "weight": one}
    lowest = min(loss(kind, {**p, "target": t * one}, beta=2.0).min() for t in (2.0, -1.0))
    assert (lowest > -20) if kind in BOUNDED else (lowest < -1e4)


@pytest.mark.parametrize("kind", [kind for kind in AFFINE if kind in CAPPED])
def test_the_cap_acts_outside_alone(kind):
    p = pairs(7)
    torch.testing.assert_close(loss(kind, p, cap=3.0), loss(kind, p), rtol=0, atol=0)
    outside = {**p, "target": p["target"] + 3}
    assert (loss(kind, outside, cap=3.0) - loss(kind, outside)).abs().max() > 1e-3


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in CAPPED])
def test_the_cap_is_not_used_where_it_is_not_claimed(kind):
    p = {**pairs(7), "target": pairs(7)["target"] + 3}
    assert torch.equal(loss(kind, p, cap=3.0), loss(kind, p))


@pytest.mark.parametrize("kind", KINDS)
def test_the_weight_multiplies(kind):
    """Batch-level losses are weighted means inside, so there a common factor alone multiplies."""
    p = pairs(8)
    torch.testing.assert_close(loss(kind, {**p, "weight": 3 * p["weight"]}), 3 * loss(kind, p))
    if "batch" not in OBJECTIVES[kind].needs:
        torch.testing.assert_close(loss(kind, p), p["weight"] * loss(kind, {**p, "weight": torch.ones_like(p["weight"])}))


def test_batch_level_objectives_say_so():
    assert {kind for kind in KINDS if "batch" in OBJECTIVES[kind].needs} == BATCH


@pytest.mark.parametrize("kind", sorted(BATCH))
def test_pairs_without_weight_leave_no_trace_in_batch_level_objectives(kind):
    p = pairs(9)
    p["weight"][6:] = 0
    result, short = loss(kind, p), loss(kind, {name: value[:6] for name, value in p.items()})
    torch.testing.assert_close(result, torch.cat([short, torch.zeros(6, dtype=torch.float64)]))
    assert torch.equal(loss(kind, {**p, "weight": torch.zeros(12).double()}), torch.zeros(12).double())


@pytest.mark.parametrize("kind", KINDS)
def test_the_two_errors_get_opposite_gradients_exactly_where_claimed(kind):
    slopes = gradient(kind, pairs(20))
    gap = (slopes.sum(dim=1).abs() / slopes.abs().amax(dim=1)).max()
    assert gap < 1e-9 if OBJECTIVES[kind].balanced else gap > 1e-3


def test_the_settings_know_the_objectives():
    assert typing.get_args(Kind) == tuple(OBJECTIVES)


@pytest.mark.parametrize("kind", KINDS)
def test_balanced_errors_have_the_same_loss_and_scaled_gradients(kind):
    p = pairs(10)
    policy = p["policy"].clone().requires_grad_()
    balanced = loss(kind, {**p, "policy": balance_errors(policy)})
    assert torch.equal(balanced, loss(kind, p))
    factors = torch.autograd.grad(balance_errors(policy).sum(), policy)[0]
    torch.testing.assert_close(torch.autograd.grad(balanced.mean(), policy)[0], factors * gradient(kind, p))


SIGNS = {"sft": (1, 0)}  # of dL/de of winner and loser; (1, -1) for all others


@pytest.mark.parametrize("kind", KINDS)
def test_at_the_reference_the_winner_improves(kind):
    """At policy = reference and a hard label, descent lowers the winner's error and raises the loser's, but for SFT."""
    p = pairs(11)
    p.update(reference=p["policy"].clone(), target=(p["target"] > 0.5).double())
    slopes = gradient(kind, p).sign()
    first = p["target"] == 1
    winner, loser = torch.where(first, slopes[:, 0], slopes[:, 1]), torch.where(first, slopes[:, 1], slopes[:, 0])
    signs = SIGNS.get(kind, (1, -1))
    assert (winner == signs[0]).all()
    assert (loser == signs[1]).all()


LIMITS = {"sigmoid": {"stop": 1e4}, "cdpo": {"flips": 0.0}, "dr_dpo": {"temperature": 1e7}}


@pytest.mark.parametrize("kind", list(LIMITS))
def test_limits_to_dpo_in_value_and_gradient(kind):
    """In value pair by pair, but for Dr-DPO, whose pairs share their aggregate."""
    p = pairs(12)
    ours, theirs = loss(kind, p, **LIMITS[kind]), loss("sigmoid", p)
    if kind == "dr_dpo":
        ours, theirs = ours.mean(), theirs.mean()
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(gradient(kind, p, **LIMITS[kind]), gradient("sigmoid", p), rtol=1e-6, atol=1e-7)


def test_sigmoid_is_the_weighted_preference_loss():
    p = pairs(13)
    m = margin(implicit_rewards(p["policy"], p["reference"], beta=BETA))
    assert torch.equal(loss("sigmoid", p, cap=5.0), p["weight"] * preference_loss(m, p["target"], margin_cap=5.0))


def slope(kind: str, m: float, target: float, **options: float) -> float:
    """dL/dm of a pair of weight 1: beta 2, the reference and image 1 at error 10, so that it is -dL/de of image 0."""
    policy = torch.tensor([[10 - m, 10.0]], dtype=torch.float64, requires_grad=True)
    one, reference = torch.ones(1, dtype=torch.float64), torch.full((1, 2), 10.0, dtype=torch.float64)
    value = objective_loss(policy, reference, target * one, one, kind=kind, beta=2.0, options=options)
    return -torch.autograd.grad(value.sum(), policy)[0][0, 0].item()


@pytest.mark.parametrize("eta", [0.0, 0.1])
@pytest.mark.parametrize("target", [0.0, 0.3, 1.0, 1.4])
def test_the_slope_of_linear_is_the_clipped_line(eta, target):
    for m in (-5.0, -1.2, -0.3, 0.0, 0.7, 1.3, 40.0):
        assert slope("linear", m, target, eta=eta) == pytest.approx(min(max(0.5 + 0.4 * m, eta), 1 - eta) - target, abs=1e-12)


@pytest.mark.parametrize("target", [0.0, 0.3, 1.0, 1.4])
def test_a_stop_changes_nothing_before_it_and_ends_the_pull_of_a_preferred_image_there(target):
    for m in (-1.9, -0.3, 0.0, 1.9):
        assert slope("sigmoid", m, target, stop=2.0) == pytest.approx(slope("sigmoid", m, target), abs=1e-12)
    for m in (2.1, 30.0):
        assert slope("sigmoid", m, target, stop=2.0) == pytest.approx((1 - target) / (1 + math.exp(-m)), abs=1e-12)
        assert slope("sigmoid", -m, 1 - target, stop=2.0) == pytest.approx((target - 1) / (1 + math.exp(-m)), abs=1e-12)


def test_dr_dpo_is_the_aggregate_in_value_and_gradient():
    p = pairs(17)
    policy = p["policy"].clone().requires_grad_()
    m = margin(implicit_rewards(policy, p["reference"], beta=BETA))
    share = p["weight"] / p["weight"].sum()
    aggregate = -0.7 * p["weight"].mean() * torch.logsumexp(share.log() - preference_loss(m, p["target"]) / 0.7, dim=0)
    torch.testing.assert_close(loss("dr_dpo", p, temperature=0.7).mean(), aggregate)
    torch.testing.assert_close(gradient("dr_dpo", p, temperature=0.7), torch.autograd.grad(aggregate, policy)[0])


def test_ipo_is_least_at_the_label_less_one_half():
    """m^2 - (2t - 1) m + 1/4 has its minimum at m = t - 1/2 for every target."""
    for t in (-1.0, 0.2, 1.0, 3.0):
        best = t - 0.5
        assert at((best, 0.0), t, "ipo") < min(at((best + 0.01, 0.0), t, "ipo"), at((best - 0.01, 0.0), t, "ipo"))


KNOWN = [
    (("sigmoid", (0.5, -0.5), 0.25, {}), 1.063262),
    (("sigmoid", (1.5, -1.5), 1.0, {"stop": 2.0}), 0.126928),
    (("linear", (0.5, -0.5), 0.25, {}), 0.45),
    (("linear", (1.5, -1.5), 1.0, {}), -0.3125),
    (("linear", (1.5, -1.5), 1.0, {"eta": 0.1}), -0.5),
    (("ipo", (0.5, -0.5), 0.25, {}), 1.75),
    (("cdpo", (0.5, -0.5), 1.0, {"flips": 0.25}), 0.563262),
    (("dr_dpo", (0.5, -0.5), 0.25, {"temperature": 2.0}), 1.063262),
    (("kto", (0.5, -1.0), 1.0, {"desirable": 1.0, "undesirable": 2.0}), 0.457712),
    (("sft", (0.5, -0.5), 0.25, {}), 10.25),
]


@pytest.mark.parametrize(("case", "value"), KNOWN, ids=[case[0] for case, _ in KNOWN])
def test_known_value(case, value):
    """beta 2 and r = 10, so R = 10 - e. softplus(1) = 1.313262, softplus(-1) = 0.313262, sigmoid(-1) = 0.268941.

    sigmoid: m = 1: 1.313262 - 0.25; m = 3 with stop 2: softplus(-2) = 0.126928.
    linear: m = 1: 0.5 + 0.2 - 0.25. m = 3, eta 0: 0.625 + 0.3125 up to the edge 1.25, + 1.75, - 3.
    eta 0.1: 0.5 + 0.2 up to the edge 1, + 2 * 0.9, - 3 = -0.5.
    ipo: 0.25 * 0.5^2 + 0.75 * 1.5^2 = 1.75.
    cdpo: t' = 0.75: 1.313262 - 0.75. dr_dpo of one pair: that pair.
    kto: Q = max(0, -0.25) = 0: 0.5 (sigmoid(-0.5) + 2 sigmoid(-1)) = 0.5 (0.377541 + 0.537883) = 0.457712.
    sft: 0.25 * 9.5 + 0.75 * 10.5.
    """
    kind, rewards, target, options = case
    assert at(rewards, target, kind, **options) == pytest.approx(value, abs=2e-6)


def test_known_value_of_mapo():
    """e = (0.2, 0.6), snr 0.5: f = 0.1 / (e^0.1 - 1) = 0.950833 and 0.3 / (e^0.3 - 1) = 0.857489; 10 times the gap: 0.933445.

    softplus(-0.933445) = 0.331601; loss of label 1: 0.2 + 0.1 * 0.331601.
    """
    policy = torch.tensor([[0.2, 0.6]], dtype=torch.float64)
    one = torch.ones(1, dtype=torch.float64)
    value = objective_loss(policy, None, one, one, kind="mapo", beta=1.0, options={"steps": 10.0})
    assert value.item() == pytest.approx(0.2331601, abs=2e-6)


def test_mapo_has_no_seam_where_its_series_ends():
    policy = torch.tensor([[2e-3 - 1e-9, 2e-3 + 1e-9]], dtype=torch.float64, requires_grad=True)
    one = torch.ones(1, dtype=torch.float64)
    value = objective_loss(policy, None, one, one, kind="mapo", beta=1.0, options={"weight": 1e9, "steps": 1.0})
    slopes = torch.autograd.grad(value.sum(), policy)[0]
    torch.testing.assert_close(slopes[0, 0], -slopes[0, 1], rtol=1e-6, atol=0)


def test_kto_moves_its_reference_point_with_the_weighted_mean_reward():
    """Rewards 1 and 3 (weight 3), -2 and 0 (weight 1): Q = (3 * 2 - 1 * 1) / 4 = 1.25; label 1, so 0.5 (s(0.25) + s(1.75))."""
    policy = 10 - torch.tensor([[1.0, 3.0], [-2.0, 0.0]], dtype=torch.float64)
    target, weight = torch.ones(2, dtype=torch.float64), torch.tensor([3.0, 1.0], dtype=torch.float64)
    value = objective_loss(policy, torch.full_like(policy, 10), target, weight, kind="kto", beta=2.0)
    sigmoid = lambda x: 1 / (1 + math.exp(-x))  # noqa: E731
    assert value[0].item() == pytest.approx(3 * 0.5 * (sigmoid(0.25) + sigmoid(1.75)))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "reference" not in OBJECTIVES[kind].needs])
def test_what_needs_no_reference_works_without_one(kind):
    p = pairs(19)
    without = objective_loss(p["policy"], None, p["target"], p["weight"], kind=kind, beta=BETA)
    assert torch.equal(without, loss(kind, p))


@pytest.fixture(scope="module")
def shapes() -> tuple[Backbone, PairBatch]:
    """The embedded Stable Diffusion and four pairs of clean images of its world; image 0 shows what the prompt asks for."""
    prompt, other = "a large red circle on a white background", "a small blue square on a black background"
    rng = np.random.default_rng(0)
    images = [render(sample_scene(rng, parse_prompt(text), clutter=0.0)) for text in (prompt, other) * 4]
    pixels = torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in images]) / 127.5 - 1
    model = Backbone("shapes", device=torch.device("cpu"))
    mean, std = model.encode_images(pixels)
    latents = model.latents(mean, std, torch.zeros_like(mean)).unflatten(0, (4, 2))
    model.add_lora(rank=4, alpha=4)
    text = model.encode_prompts([prompt] * 4)
    return model, PairBatch(latents, text, torch.tensor([1.0, 1.0, 0.9, 0.5]), torch.ones(4))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_every_objective_trains_on_shapes(shapes, kind):
    """Six steps of AdamW from the same adapter, on the same noise: the loss falls, and the preferred images gain on the others."""
    model, batch = shapes
    start = {name: value.detach().clone() for name, value in model.trainable().items()}
    noise = torch.randn(batch.latents[:, 0].shape, generator=torch.Generator().manual_seed(0))
    timesteps = torch.tensor([150, 300, 500, 700])
    optimiser = torch.optim.AdamW(model.trainable().values(), lr=2e-4)
    results = []
    for _ in range(6):
        results.append(preference_step(model, batch, timesteps=timesteps, noise=noise, beta=500.0, kind=kind, margin_cap=10.0))
        optimiser.zero_grad()
        results[-1].loss.mean().backward()
        optimiser.step()
    with torch.no_grad():
        for name, value in model.trainable().items():
            value.copy_(start[name])
    assert results[-1].loss.mean() < results[0].loss.mean()
    if kind != "sft":
        gained = results[0].policy_errors - results[-1].policy_errors
        assert (gained[:3, 0] - gained[:3, 1]).mean() > 0


E2 = torch.ones(3, 2)
V = torch.ones(3)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: objective_loss(E2, E2, V, V, kind="dpo", beta=1.0), "unknown objective 'dpo'; known: sigmoid, linear"),
        (lambda: objective_loss(E2, E2, V, V, kind="cdpo", beta=1.0, options={"eps": 0.1}), "no option 'eps'; its options: flips"),
        (lambda: objective_loss(E2, E2, V, V, kind="ipo", beta=1.0, options={"eps": 0.1}), "its options: none"),
        (lambda: objective_loss(E2, None, V, V, kind="ipo", beta=1.0), "needs the reference errors"),
        (lambda: objective_loss(E2[:, 0], E2, V, V, beta=1.0), r"errors must be \(B, 2\)"),
        (lambda: objective_loss(E2, E2[:2], V, V, beta=1.0), r"errors must be \(B, 2\)"),
        (lambda: objective_loss(E2, E2, V[:2], V, beta=1.0), r"target must be \(3,\); got \(2,\)"),
        (lambda: objective_loss(E2, E2, V, V[:2], beta=1.0), "weight must be"),
        (lambda: objective_loss(E2, E2, V, -V, kind="dr_dpo", beta=1.0), "not negative"),
        (lambda: objective_loss(E2, E2, V, V, beta=-1.0), "beta must be positive"),
    ],
)
def test_bad_arguments(call, words):
    with pytest.raises(ValueError, match=words):
        call()


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("sigmoid", {"stop": 0.0}), ("linear", {"eta": 0.5}),
        ("cdpo", {"flips": 0.6}), ("dr_dpo", {"temperature": 0.0}), ("kto", {"undesirable": -1.0}), ("mapo", {"snr": 0.0}),
    ],
)  # fmt: skip
def test_an_option_out_of_its_range_is_refused(kind, options):
    with pytest.raises(ValueError, match=next(iter(options))):
        loss(kind, pairs(), **options)


def test_the_docs_table_is_the_registry():
    """Every row of docs/objectives.md says what the code says, in the same order."""
    told = [[row[0], row[4], *row[7:10]] for row in ROWS]
    assert told == [
        [
            f"`{name}`",
            "yes" if o.affine else "no",
            "yes" if o.balanced else "no",
            ", ".join(o.needs) or "nothing",
            ", ".join(f"{option} {value:g}" for option, value in o.options.items()) or "none",
        ]
        for name, o in OBJECTIVES.items()
    ]
    assert all((row[5] == "refused") == (row[4] == "no") for row in ROWS)


def test_the_docs_table_of_balances_is_what_the_settings_take():
    told = {row[0].strip("`"): row[3] for row in rows("Balance")}
    assert list(told) == list(typing.get_args(typing.get_type_hints(ObjectiveSettings)["balance"]))
    assert [name for name, looks in told.items() if looks == "yes"] == ["adadpo"]
