"""LoRAs in memory: what is exact is exact, what is approximate says by how much."""

from __future__ import annotations

import math

import pytest
import torch

from dedpo_diffusion.core.console import UserError
from dedpo_diffusion.weights.algebra import combined, extracted, resized, scaled
from dedpo_diffusion.weights.lora import Lora, LoraLayer, factors

SHAPES = {"unet.to_q": (6, 10), "unet.conv": (4, 3, 3, 3), "text_encoder.text_model.q_proj": (8, 8)}


def random_lora(seed: int, rank: int = 3, alpha: float = 2.0, names=tuple(SHAPES), **changes) -> Lora:
    generator = torch.Generator().manual_seed(seed)
    layers = {}
    for name in names:
        out, *inner = SHAPES[name]
        ends = [1] * (len(inner) - 1)
        down, up = torch.randn(rank, *inner, generator=generator), torch.randn(out, rank, *ends, generator=generator)
        layers[name] = LoraLayer(down, up, alpha, **changes)
    return Lora(layers, {"seed": str(seed)})


def deltas(lora: Lora) -> dict[str, torch.Tensor]:
    return {name: layer.delta() for name, layer in lora.layers.items()}


def assert_equal(mine, other, atol=1e-5):
    assert list(mine) == list(other)
    for name in mine:
        torch.testing.assert_close(mine[name], other[name], atol=atol, rtol=1e-5)


def test_known_change():
    """B A = [[1], [2]] [[3, 4]] = [[3, 4], [6, 8]], at alpha 4 and rank 1 times 4; at rank 1 rslora divides by the same 1."""
    layer = LoraLayer(torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0], [2.0]]), 4.0)
    assert layer.delta().tolist() == [[12.0, 16.0], [24.0, 32.0]]
    assert LoraLayer(layer.down, layer.up, 4.0, rslora=True).delta().tolist() == layer.delta().tolist()
    four = LoraLayer(torch.ones(4, 2), torch.ones(2, 4), 4.0, rslora=True)
    assert four.scale == 2.0 and four.delta().tolist() == [[8.0, 8.0], [8.0, 8.0]]


def test_magnitudes_are_the_norms_of_the_merged_rows():
    layer = random_lora(0, magnitude=torch.tensor([1.0, 2.0, 3.0, 4.0])).layers["unet.conv"]
    merged = layer.merged(torch.randn(4, 3, 3, 3, generator=torch.Generator().manual_seed(1)))
    torch.testing.assert_close(merged.flatten(1).norm(dim=1), layer.magnitude)


def test_strength_multiplies_every_change():
    lora = random_lora(0)
    assert_equal(deltas(scaled(lora, -0.7)), {name: -0.7 * value for name, value in deltas(lora).items()})
    assert scaled(lora, 0.5).metadata == lora.metadata


def test_a_sum_is_the_sum_of_the_changes():
    a, b = random_lora(0, rank=3), random_lora(1, rank=5, alpha=7.0, rslora=True, names=("unet.to_q", "unet.conv"))
    together = deltas(combined([scaled(a, 0.3), scaled(b, -2.0)]))
    parts = deltas(a), deltas(b)
    expected = {name: 0.3 * parts[0][name] - 2.0 * parts[1].get(name, torch.zeros(())) for name in SHAPES}
    assert_equal(together, expected)
    assert combined([a, b]).ranks() == [3, 8]


def test_more_rank_loses_nothing_and_less_loses_what_the_svd_says():
    lora = random_lora(0, rank=3)
    wider, nothing = resized(lora, 5)
    assert wider.ranks() == [5] and nothing.relative < 1e-6
    assert_equal(deltas(wider), deltas(lora))
    narrow, loss = resized(lora, 1)
    values = {name: torch.linalg.svdvals(delta.flatten(1).double()) for name, delta in deltas(lora).items()}
    left = {name: math.sqrt(float(s[1:].square().sum() / s.square().sum())) for name, s in values.items()}
    whole = math.sqrt(sum(float(s[1:].square().sum()) for s in values.values()) / sum(float(s.square().sum()) for s in values.values()))
    assert narrow.ranks() == [1]
    assert loss.relative == pytest.approx(whole, rel=1e-5)
    assert loss.worst == (max(left, key=left.get), pytest.approx(max(left.values()), rel=1e-5))


def test_factors_balance_their_norms():
    matrix = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    down, up = factors(matrix, 5)
    torch.testing.assert_close(up @ down, matrix, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(up.norm(dim=0), down.norm(dim=1))


def test_a_low_rank_fine_tune_is_extracted_exactly():
    generator = torch.Generator().manual_seed(3)
    before = {f"{name.removeprefix('unet.')}.weight": torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    before |= {"norm.weight": torch.ones(4), "to_q.bias": torch.zeros(6), "same.weight": torch.ones(2, 2)}
    lora = random_lora(0, rank=2)
    after = dict(before)
    for name, layer in lora.layers.items():
        key = f"{name.removeprefix('unet.')}.weight"
        after[key] = layer.merged(before[key])
    found, loss = extracted(before, after, 2)
    assert loss.relative < 1e-5 and loss.left_out == 0
    expected = {(name if name.startswith("unet.") else f"unet.{name}"): value for name, value in deltas(lora).items()}
    assert_equal({name: found.layers[name].delta() for name in expected}, expected)
    assert "unet.same" not in found.layers


def test_what_no_lora_holds_is_told():
    """A matrix changed by 3 in one entry and a bias by 4: of the squared norm 25, 16 are left out."""
    before = {"a.weight": torch.zeros(2, 2), "a.bias": torch.zeros(2)}
    after = {"a.weight": torch.tensor([[3.0, 0.0], [0.0, 0.0]]), "a.bias": torch.tensor([0.0, 4.0])}
    found, loss = extracted(before, after, 1)
    assert list(found.layers) == ["unet.a"]
    assert (loss.left_out, loss.left_out_share, loss.relative) == (1, pytest.approx(0.64), pytest.approx(0.8))


def test_refusals():
    dora = random_lora(0, magnitude=torch.ones(6), names=("unet.to_q",))
    for call in (lambda: scaled(dora, 0.5), lambda: combined([dora, dora]), lambda: resized(dora, 2)):
        with pytest.raises(UserError, match=r"unet\.to_q: a DoRA"):
            call()
    assert scaled(dora, 1.0).layers["unet.to_q"].magnitude is not None and combined([dora]).layers == dora.layers
    with pytest.raises(UserError, match="--rank is 0"):
        resized(random_lora(0), 0)
    other = Lora({"unet.to_q": LoraLayer(torch.ones(1, 4), torch.ones(6, 1), 1.0)})
    with pytest.raises(UserError, match=r"shapes \(6, 10\) and \(6, 4\)"):
        combined([random_lora(0), other])
    with pytest.raises(UserError, match="the same weights"):
        extracted({"a.weight": torch.ones(2, 2)}, {"b.weight": torch.ones(2, 2)}, 1)
    with pytest.raises(UserError, match="the two models are the same"):
        extracted({"a.weight": torch.ones(2, 2)}, {"a.weight": torch.ones(2, 2)}, 1)
