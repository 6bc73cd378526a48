"""What fits a device: precision, batch, and halves of it once memory runs out."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from dedpo_diffusion.core.console import UserError
from dedpo_diffusion.models import memory
from dedpo_diffusion.models.memory import SHARE, BatchLimit, dtype_for, largest_batch, meter_of, resolved
from dedpo_diffusion.settings import LabelSettings, ProposeSettings, SampleSettings, ScoreSettings

GIB = 2**30


@pytest.mark.parametrize(
    ("kind", "bfloat16", "dtype"),
    [("cuda", True, "bfloat16"), ("cuda", False, "float16"), ("cpu", False, "float32"), ("cpu", True, "float32"), ("mps", True, "float32")],
)
def test_the_precision_that_auto_is(kind, bfloat16, dtype):
    assert dtype_for(kind, bfloat16=bfloat16) == dtype


@pytest.mark.parametrize("has", [True, False])
def test_a_gpu_is_asked_for_bfloat16_without_emulation(monkeypatch, has):
    """Cards before Ampere emulate it, slowly, and say yes to the plain question."""
    monkeypatch.setattr(memory, "_has_bfloat16", lambda device: has)
    monkeypatch.setattr("dedpo_diffusion.models.pretrained.usable", lambda device: torch.device("cuda"))
    assert resolved(ScoreSettings([], []), most=64).dtype == ("bfloat16" if has else "float16")


@pytest.mark.parametrize(
    ("settings", "most"),
    [
        (SampleSettings("m", "p", "o"), 8),
        (ProposeSettings("m", "p", "o"), 8),
        (ScoreSettings([], []), 64),
        (LabelSettings("p", []), 64),
    ],
)
def test_the_defaults_on_a_cpu_are_those_of_old(settings, most):
    settings = replace(settings, device="cpu")
    found = resolved(settings, most=most)
    assert (found.dtype, found.batch) == ("float32", most)
    assert replace(found, dtype="auto", batch="auto") == settings
    assert resolved(found, most=most + 1) is found  # nothing is left to resolve
    own = replace(settings, dtype="bfloat16", batch=3)
    assert resolved(own, most=most) == own


@pytest.mark.parametrize("most", [1, 6, 8, 64])
@pytest.mark.parametrize("further", [0, 1, 100, GIB])
def test_the_largest_batch_fits_and_the_next_does_not(most, further):
    one = 10 * further + 7

    def needs(count):
        return one + (count - 1) * further

    for room in (0, one, needs(2), needs(5), needs(64)):
        found = largest_batch(one, one + further, room=room, most=most)
        halves = [most >> k for k in range(10) if most >> k]
        assert found in halves and (found == 1 or needs(found) <= room)
        larger = [half for half in halves if half > found]
        assert all(needs(half) > room for half in larger)
    assert largest_batch(GIB, GIB // 2, room=2 * GIB, most=most) == most  # noise in the measurement: no growth


def test_a_card_of_12_gb_by_hand():
    """8.5 GiB for one image and 2 for each further one. Of 12 GiB 10.2 may be filled, which is too little for two (10.5): one. Of 14 it is
    11.9: two, as four take 14.5.
    """
    needs = (int(8.5 * GIB), int(10.5 * GIB))
    assert largest_batch(*needs, room=SHARE * 12 * GIB, most=8) == 1
    assert largest_batch(*needs, room=SHARE * 14 * GIB, most=8) == 2


class Card:
    """A device of `size` bytes on which every item takes `each`, of which it holds `held`."""

    def __init__(self, size: int, each: int) -> None:
        self.size, self.each, self.asked = size, each, []

    def room(self) -> int:
        return self.size

    def peak(self, call) -> int:
        call()
        return self.each * self.asked[-1]

    def work(self, count: int) -> None:
        if count * self.each > self.size:
            raise torch.OutOfMemoryError("CUDA out of memory")
        self.asked.append(count)


def limit_of(most: int) -> BatchLimit:
    return BatchLimit(most, name="sampling", what="images", remedy="give a smaller --size")


@pytest.mark.parametrize(("size", "now"), [(100, 8), (90, 4), (45, 2), (12, 1), (5, 1)])
def test_fit_measures_one_and_two(size, now, capsys):
    """10 bytes an image, 85 % of the card: 8 need 80 of 85, and of 76 only 4 get theirs; a card that cannot take two takes one."""
    card, limit = Card(size, 10), limit_of(8)
    limit.fit(card.work, card)
    assert limit.now == now
    assert set(card.asked) <= {1, 2}
    assert capsys.readouterr().out == ("" if now == 8 else f"sampling: the GPU's memory has room for {now} of 8 images at once\n")


def test_nothing_is_measured_without_a_gpu():
    limit = limit_of(8)
    limit.fit(lambda count: pytest.fail("measured"), meter_of(torch.device("cpu")))
    assert limit.now == 8


def small_on(limit: int):
    """A real model that has no room for more than `limit` rows."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.GELU(), nn.Linear(5, 3))

    def refuse(module, given):
        if len(given[0]) > limit:
            raise torch.OutOfMemoryError("CUDA out of memory")

    model.register_forward_pre_hook(refuse)
    return model


@pytest.mark.slow
@pytest.mark.parametrize(("most", "count", "limit"), [(8, 20, 3), (8, 8, 1), (6, 13, 6), (5, 1, 1), (64, 7, 2), (4, 0, 1)])
def test_halves_give_every_item_once_and_in_order(most, count, limit, capsys):
    """Rows are computed each by itself, to rounding: tolerance of float32 sums of six products."""
    items, model, batch = list(torch.randn(count, 6)), small_on(limit), limit_of(most)
    with torch.no_grad():
        found = [row for part in batch.over(items, lambda part: model(torch.stack(list(part)))) for row in part]
        whole = small_on(10**6)(torch.stack(items)) if items else []
    assert len(found) == count
    for one, other in zip(found, whole, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    assert batch.now == most or batch.now <= limit
    said = capsys.readouterr().out.splitlines()
    assert all(line.startswith("sampling: the GPU's memory is too small for ") for line in said)
    assert len(said) <= 6  # it does not try the larger number again


def test_it_stays_halved_and_aligned():
    """8 -> 4 at the third part: the items go together as they would have with 4 from there on."""
    parts, batch, seen = [], limit_of(8), 0

    def work(part):
        nonlocal seen
        if seen >= 16 and len(part) > 4:
            raise torch.OutOfMemoryError
        seen += len(part)
        parts.append(list(part))
        return part

    assert [item for part in batch.over(range(30), work) for item in part] == list(range(30))
    assert [len(part) for part in parts] == [8, 8, 4, 4, 4, 2]
    assert all(part[0] % 4 == 0 for part in parts)
    assert [len(part) for part in batch.over(range(9), work)] == [4, 4, 1]


def test_too_little_for_one_is_the_users_error(capsys):
    with pytest.raises(UserError) as caught:
        list(limit_of(4).over(range(4), lambda part: small_on(0)(torch.zeros(len(part), 6))))
    assert str(caught.value) == "sampling: the GPU's memory is too small, even for one of the images at a time; give a smaller --size"
    assert "too small for 4 images at once; going on with 2" in capsys.readouterr().out


def test_other_errors_are_not_taken_for_it():
    def fail(part):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="mat1"):
        list(limit_of(4).over(range(4), fail))
    assert memory.is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"))


@pytest.mark.slow
def test_what_failed_is_freed_before_the_half_is_tried():
    """The frames of the failed attempt hold its tensors; a retry inside of `except` would find them still there."""
    alive = []

    class Held:
        def __init__(self):
            alive.append(1)

        def __del__(self):
            alive.pop()

    def work(part):
        assert not alive
        held = Held()
        if len(part) > 1:
            raise torch.OutOfMemoryError
        return held and part[0]

    assert list(limit_of(4).over(range(4), work)) == [0, 1, 2, 3]


def test_large_models_on_a_cpu_are_slow(monkeypatch):
    model = nn.Linear(10, 10)
    assert not any(memory.slow_on_cpu(one) for one in (model, SimpleNamespace(model=model), object()))
    monkeypatch.setattr(memory, "LARGE", 110)
    scorer = SimpleNamespace(model=model)
    assert all(memory.slow_on_cpu(one) for one in (model, scorer, SimpleNamespace(scorer=scorer)))
    assert not memory.slow_on_cpu(nn.Linear(10, 10, device="meta")) and not memory.slow_on_cpu(nn.Linear(10, 9))
