"""The noise ratio: against all pairs of explicit gradients, where it is known, and its standard error."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dedpo_diffusion.dpo.gradient_noise import draw_moments, loss_gradient, noise_ratio
from dedpo_diffusion.dpo.step import preference_step
from support.steps import backbone, batch

NUMBERS = st.floats(-1e3, 1e3).filter(lambda x: x == 0 or abs(x) > 1e-100)  # squares below 1e-308 lose digits in every sum


def one_pair(pairs, k):
    """Pair k of a batch, by itself, with label 1."""
    given = dataclasses.replace(pairs, latents=pairs.latents[[k]], conditioning=pairs.conditioning.at([k]))
    return dataclasses.replace(given, target=torch.ones(1), weight=torch.ones(1))


def test_the_ratio_is_that_of_all_pairs_of_explicit_gradients(tiny_model):
    """Three pairs, four draws each: T and P by whole gradients, one beside the other, and by two draws at a time."""
    model, (pairs, _, _), draws = backbone(tiny_model), batch(3), 4
    parameters, generator = list(model.trainable().values()), torch.Generator().manual_seed(0)
    moments, explicit = [], []
    for k in range(3):
        pair, rows, found = one_pair(pairs, k), [], []
        for _ in range(draws):
            t, noise = torch.randint(1000, (1,), generator=generator), torch.randn(1, 4, 8, 8, generator=generator)
            found.append(loss_gradient(model, pair, parameters, timesteps=t, noise=noise, beta=200.0))
            preference_step(model, pair, timesteps=t, noise=noise, beta=200.0).loss.sum().backward()
            rows.append(torch.cat([p.grad.flatten().double() for p in parameters]))
            for parameter in parameters:
                parameter.grad = None
        explicit.append(torch.stack(rows).numpy())
        moments.append(draw_moments(found))
        pairwise = [draw_moments(two) for two in itertools.combinations(found, 2)]
        assert moments[-1] == pytest.approx(np.mean(pairwise, axis=0), rel=1e-4)
    gram = np.einsum("kdp,kep->kde", np.array(explicit), np.array(explicit))
    visit, everything = np.trace(gram, axis1=1, axis2=2).mean() / draws, gram.sum(axis=(1, 2)).mean()
    pair = (everything - visit * draws) / (draws * (draws - 1))
    measured = np.array(moments)
    np.testing.assert_allclose(measured.mean(axis=0), [pair, visit], rtol=1e-5)
    assert pair > 0 and visit / pair > 1.5  # or there was nothing to tell apart
    assert noise_ratio(measured).value == pytest.approx(visit / pair, rel=1e-5)


def test_a_scale_of_the_loss_is_taken_out_again_and_unreached_parameters_get_zeros(tiny_model):
    model, (pairs, t, noise) = backbone(tiny_model), batch(2)
    idle = torch.zeros(3, requires_grad=True)
    parameters = [*model.trainable().values(), idle]
    plain, scaled = (loss_gradient(model, pairs, parameters, timesteps=t, noise=noise, beta=200.0, scale=scale) for scale in (1.0, 65536.0))
    assert all(torch.equal(one, other) for one, other in zip(plain, scaled, strict=True))  # powers of two round nothing
    assert torch.equal(plain[-1], torch.zeros(3)) and max(value.abs().max() for value in plain) > 0


@given(st.lists(st.tuples(NUMBERS, NUMBERS), min_size=1, max_size=20))
def test_two_draws_have_no_more_in_common_than_their_squares(values):
    one, other = (torch.tensor(column, dtype=torch.float64) for column in zip(*values, strict=True))
    inner, square = draw_moments([[one], [other]])
    assert inner <= square * (1 + 1e-12)
    assert (inner, square) == pytest.approx((float(one @ other), float(one @ one + other @ other) / 2), rel=1e-9, abs=1e-9 * square)
    alike = float(one @ one)
    assert draw_moments([[one]] * 3) == (pytest.approx(alike), pytest.approx(alike))
    assert draw_moments([list(one[:, None]), list(other[:, None])]) == pytest.approx((inner, square), abs=1e-9 * square)


@pytest.mark.slow
def test_gradients_are_summed_as_they_come_and_stay_as_they_are():
    """Never more than one beside their sum, as the next is asked for once the last is let go."""
    import gc
    import weakref

    seen: list[weakref.ref] = []

    def gradients():
        for k in range(5):
            gc.collect()
            assert sum(old() is not None for old in seen) <= 1
            value = torch.full((3,), float(k))
            seen.append(weakref.ref(value))
            yield [value]

    assert draw_moments(gradients()) == ((100 - 30) * 3 / 20, 30 * 3 / 5)
    kept = [[torch.ones(2)], [torch.ones(2)]]
    draw_moments(kept)
    assert all(torch.equal(value, torch.ones(2)) for [value] in kept)
    with pytest.raises(ValueError, match="need two"):
        draw_moments(kept[:1])


def test_visits_without_noise_have_ratio_one_and_no_error():
    moments = np.array([[2.0, 2.0], [5.0, 5.0], [1.0, 1.0]])
    found = noise_ratio(moments)
    assert (found.value, found.standard_error, found.pairs) == (1.0, 0.0, 3) and found.interval == (1.0, 1.0)
    assert noise_ratio(1e-12 * moments).value == pytest.approx(1)


def drawn(rng, pairs, kappa, dimensions=50):
    """Moments of pairs with mean gradients of squared norm about 1, and visits of about kappa."""
    mean = rng.normal(size=(pairs, 1, dimensions)) / np.sqrt(dimensions)
    visits = mean + rng.normal(size=(pairs, 2, dimensions)) * np.sqrt((kappa - 1) / dimensions)
    return np.column_stack([(visits[:, 0] * visits[:, 1]).sum(axis=1), np.square(visits).sum(axis=2).mean(axis=1)])


@pytest.mark.parametrize("kappa", [2.0, 6.0])
def test_the_ratio_and_its_error_are_right_over_many_measurements(kappa):
    rng = np.random.default_rng(0)
    found = [noise_ratio(drawn(rng, 200, kappa)) for _ in range(300)]
    values, errors = (np.array([getattr(one, name) for one in found]) for name in ("value", "standard_error"))
    assert np.median(values) == pytest.approx(kappa, rel=0.03)
    assert np.mean(errors) == pytest.approx(values.std(), rel=0.15)
    inside = np.mean([one.interval[0] <= kappa <= one.interval[1] for one in found])
    assert 0.90 < inside < 0.99


def test_noise_that_hides_the_pairs_is_told():
    rng = np.random.default_rng(1)
    assert noise_ratio(drawn(rng, 64, 4.0)).sure
    assert not noise_ratio(np.array([[1.0, 9.0], [-0.8, 9.0], [0.3, 8.0]])).sure


@pytest.mark.parametrize(
    ("moments", "words"),
    [
        ([[1.0, 2.0]], "2 pairs or more"),
        ([[1.0, 2.0], [float("nan"), 2.0]], "finite"),
        ([[1.0, 2.0], [-1.5, 2.0]], "nothing in common, on average over 2 pairs"),
    ],
)
def test_what_has_no_ratio_is_refused(moments, words):
    with pytest.raises(ValueError, match=words):
        noise_ratio(np.array(moments))
