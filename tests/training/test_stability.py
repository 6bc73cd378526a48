"""A long run at too high a learning rate: a bound that docs/results.md states."""

from __future__ import annotations

import json

import pytest

from dedpo_diffusion.evaluation.benchmarks import stability
from support.training import fresh_accelerate_state  # noqa: F401 - a fixture

BOUND = 0.25  # true reward, 0 to 1, that all defaults may lose at most


@pytest.mark.slow
def test_2000_steps_at_three_times_the_rate_with_all_defaults_end_near_the_base(tmp_path):
    """Hard labels from everybody: such a run does not stop by itself. A model that has fallen apart is 0.5 and more below the base."""
    out = tmp_path / "stability.json"
    arguments = ["--work", tmp_path / "work", "--out", out, "--arms", '["defaults"]', "--pool", 800, "--looks", 2]
    assert stability.main([str(argument) for argument in arguments]) == 0
    found = json.loads(out.read_text(encoding="utf-8"))
    (arm,) = found["arms"]
    assert set(arm["gain"]) == {"1000", "2000"} and found["settings"]["rate"] == 3.0
    assert arm["gain"]["2000"]["mean"] > -BOUND
