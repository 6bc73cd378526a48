"""Charts: what is cut off lies below the floor, and no two labels overlap."""

import itertools
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dedpo_diffusion.core.charts import Curve, apart, by_importance, chart, cut_below

side = st.floats(0, 100, allow_nan=False)
boxes = st.lists(
    st.tuples(side, side, side, side).map(lambda b: (min(b[0], b[2]), min(b[1], b[3]), max(b[0], b[2]), max(b[1], b[3]))), max_size=12
)


@given(boxes)
def test_boxes_that_are_kept_do_not_overlap_and_those_that_are_not_do(found):
    kept = apart(found)
    drawn = [box for box, keep in zip(found, kept, strict=True) if keep]

    def overlap(one, two):
        return one[0] < two[2] and two[0] < one[2] and one[1] < two[3] and two[1] < one[3]

    assert not any(overlap(one, two) for one, two in itertools.combinations(drawn, 2))
    assert all(any(overlap(box, other) for other in drawn) for box, keep in zip(found, kept, strict=True) if not keep)
    assert kept[:1] == [True][: len(found)]


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=8))
def test_a_cut_curve_never_lies_below_the_floor_and_ends_on_the_old_line(heights):
    points = [(0.0, 0.0), *((k + 1.0, y) for k, y in enumerate(heights))]
    curve = Curve("c", points, 1, None, [(x, y - 1, y + 1) for x, y in points], [str(x) for x, _ in points])
    cut = cut_below(curve, -1.0)
    if min(heights) >= -1:
        assert cut is curve
        return
    *kept, (x, y) = cut.points
    assert kept == points[: len(kept)] and y == -1.0 and kept[-1][0] <= x <= points[len(kept)][0]
    (x0, y0), (x1, y1) = points[len(kept) - 1 : len(kept) + 1]
    assert y0 + (x - x0) / (x1 - x0) * (y1 - y0) == pytest.approx(-1.0)
    assert min(low for _, low, _ in cut.band) >= -1 and [x for x, *_ in cut.band] == [x for x, _ in cut.points]
    assert cut.labels == [*curve.labels[: len(kept)], None]


def test_known_cut():
    curve = Curve("c", [(0, 0), (1, 2), (2, -2)], 1, None, [(0, 0, 0), (1, 1, 3), (2, -4, 0)], ["", "1", "2"])
    cut = cut_below(curve, -1)
    assert cut.points == [(0, 0), (1, 2), (1.75, -1)]
    assert cut.band == [(0, 0, 0), (1, 1, 3), (1.75, -1, 0.75)]


def test_the_label_of_the_marked_point_comes_first_and_a_crowd_keeps_it():
    near = Curve("a", [(0.0, 0.0), (1.0, 1.0), (1.001, 1.0), (5.0, 2.0)], 1, (1.001, 1.0), None, ["", "0.7", "1", "2"])
    assert [label for *_, label in by_importance([near])] == ["1", "2", "0.7"]
    drawn = chart([near], "a crowd")
    assert re.findall(r'class="soft value">([^<]+)<', drawn) == ["1", "2"]
    assert drawn.count('r="2.6"') == 4  # every point keeps its dot
