"""How long work took, and how long it is going to take: people on a CPU should know that before they wait."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from dedpo_diffusion.core.console import say


def in_words(seconds: float) -> str:
    """A length of time as people say it: "3 hours", "2 days"."""
    for name, length, until in (("second", 1, 90), ("minute", 60, 5400), ("hour", 3600, 172800), ("day", 86400, float("inf"))):
        if seconds < until:
            number = max(1, round(seconds / length))
            return f"{number} {name}" + ("s" if number > 1 else "")
    raise ValueError(f"{seconds} is no length of time")


class Forecast:
    """Says how long the whole takes, once its first units are done.

    Args:
        total: units of the whole.
        after: units after which it is said; 0 never says it.
        where: the device in words.
    """

    def __init__(self, total: int, *, after: int = 1, where: str = "the CPU") -> None:
        self.total, self.after, self.where = total, min(after, total), where
        self.done, self.began = 0, time.monotonic()

    def advance(self, units: int = 1) -> None:
        """Count units as done."""
        before, self.done = self.done, self.done + units
        if before < self.after <= self.done:
            self._tell(time.monotonic() - self.began)

    def _tell(self, spent: float) -> None:
        whole = spent * self.total / self.done
        say(f"on {self.where} this would take about {in_words(whole)} in all, by the pace of its beginning")


class Clock:
    """How long the judges worked, and how long they waited for images to be read and decoded (scaling them is a judge's own work)."""

    def __init__(self) -> None:
        self.pairs, self.working, self.waiting = 0, 0.0, 0.0
        self.forecast: Forecast | None = None

    def awaited(self, stream: Iterator[Any]) -> Iterator[Any]:
        """The same items; the time until each is waiting, the time until the next is asked for is work."""
        while True:
            began = time.perf_counter()
            item = next(stream, None)
            arrived = time.perf_counter()
            self.waiting += arrived - began
            if item is None:
                return
            yield item
            self.pairs += 1
            self.working += time.perf_counter() - arrived
            if self.forecast is not None:
                self.forecast.advance()

    def add(self, other: Clock) -> None:
        """Count what another clock has counted."""
        self.pairs, self.working, self.waiting = self.pairs + other.pairs, self.working + other.working, self.waiting + other.waiting

    def stretch(self, spent: float) -> None:
        """Let work and waiting, of workers side by side, last so many seconds together."""
        each = spent / (self.working + self.waiting) if self.pairs else 1.0
        self.working, self.waiting = each * self.working, each * self.waiting

    def report(self, judges: list[str]) -> dict[str, Any]:
        """Pairs a second and the share of the time spent waiting, of this process and of all `judges` of the run together."""
        spent = self.waiting + self.working
        return {"pairs_per_second": self.pairs / spent, "waiting_share": self.waiting / spent, "judged_with": judges} if spent else {}

    def words(self) -> str:
        """The same for people."""
        spent = self.waiting + self.working
        return f"{self.pairs / spent:.1f} pairs a second; the judges waited for images {self.waiting / spent:.0%} of the time"
