"""How long work is going to take."""

from __future__ import annotations

import pytest

from dedpo_diffusion.core import pace
from dedpo_diffusion.core.pace import Forecast, in_words


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0, "1 second"), (1, "1 second"), (89, "89 seconds"), (90, "2 minutes"), (5399, "90 minutes"), (5400, "2 hours"), (90_000, "25 hours"),
     (172_800, "2 days"), (864_000, "10 days")],
)  # fmt: skip
def test_lengths_in_words(seconds, words):
    assert in_words(seconds) == words


def test_the_whole_by_the_pace_of_its_beginning(monkeypatch, capsys):
    """Two of 100 units in 72 s: 3600 s in all. It is said once."""
    now = iter([1000.0, 1072.0])
    monkeypatch.setattr(pace.time, "monotonic", lambda: next(now))
    forecast = Forecast(100, after=2)
    forecast.advance()
    assert capsys.readouterr().out == ""
    forecast.advance()
    assert capsys.readouterr().out == "on the CPU this would take about 60 minutes in all, by the pace of its beginning\n"
    forecast.advance(50)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(("total", "after", "said"), [(3, 64, True), (100, 0, False), (0, 2, False)])
def test_short_work_and_none(total, after, said, capsys):
    forecast = Forecast(total, after=after)
    for _ in range(total):
        forecast.advance()
    assert bool(capsys.readouterr().out) == said
