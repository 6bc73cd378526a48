"""Agreement and bias of a judge where pairs were labelled at unequal rates: those of all pairs, with intervals that cover."""

from __future__ import annotations

import numpy as np
import pytest

from dedpo_diffusion.debias import agreement, estimate, judge_bias, merge_labels
from dedpo_diffusion.debias.report import _agreement, _bias

NAN = np.nan


def test_bias_and_agreement_are_those_of_all_pairs_under_propensities_and_their_intervals_cover():
    """Pairs with another bias and agreement are labelled ten times as often; 95 % nominal, 300 samples: within 4 binomial errors.

    Where pairs are seldom labelled, the judge leans by 0.5 and agrees on half; elsewhere by 0.05 and agrees on nine tenths.
    """
    rng, n = np.random.default_rng(15), 4000
    often = np.arange(n) % 2 == 0
    p, hits = np.where(often, 0.5, 0.05), {"judge_bias": 0, "agreement": 0}
    for _ in range(300):
        z = (rng.random(n) < 0.5).astype(float)
        g = np.where(rng.random(n) < np.where(often, 0.1, 1.0), 1.0, z)
        human = np.where(rng.random(n) < p, z, NAN)
        case = estimate(human, g, power=0.5, propensity=p)
        found = {"judge_bias": _bias(case, g), "agreement": _agreement(case, g)}
        for key, truth in (("judge_bias", 0.275), ("agreement", 0.725)):
            low, high = found[key]["ci"]
            hits[key] += low <= truth <= high
    assert all(0.90 <= count / 300 <= 0.99 for count in hits.values()), hits
    plain = judge_bias(z[~np.isnan(human)], g[~np.isnan(human)])
    assert plain["ci"][1] < 0.2  # without propensities it is that of the pairs which were labelled often


def test_agreement_is_weighted_by_propensities():
    """9 of 10 agree in 3/4 of the pairs, 5 of 10 in the others, three times as often asked about: 0.8.

    Equal weights leave it as it was."""
    z, g = np.ones(20), np.array([1.0] * 9 + [0.0] + [1.0] * 5 + [0.0] * 5)
    found = agreement(z, g, np.repeat([3.0, 1.0], 10))
    assert found["value"] == pytest.approx(0.8) and found["n"] == 20 and found["ci"][0] < 0.8 < found["ci"][1]
    assert agreement(z, g, np.full(20, 7.0)) == agreement(z, g)
    human, judge = np.concatenate([z, np.full(60, NAN)]), np.concatenate([g, np.ones(60)])
    propensity = np.concatenate([np.repeat([1 / 6, 1 / 2], 10), np.repeat([1 / 6, 1 / 2], [50, 10])])
    report = merge_labels(human, judge, propensity=propensity).report
    assert report["agreement"]["value"] == pytest.approx(0.75 * 0.9 + 0.25 * 0.5)
    assert "of all pairs, estimated from 20 answers" in " ".join(report["sentences"])
