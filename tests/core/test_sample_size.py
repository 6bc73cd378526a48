"""Kish's effective sample size."""

from __future__ import annotations

import numpy as np
import pytest

from dedpo_diffusion.core.sample_size import effective_size


def test_equal_weights_count_as_many_and_one_that_outweighs_the_rest_as_one():
    assert effective_size(np.full(7, 0.25)) == 7
    assert effective_size(np.array([3.0, 1.0])) == pytest.approx(16 / 10)
    assert effective_size(np.array([1.0, 0.0, 0.0])) == 1
