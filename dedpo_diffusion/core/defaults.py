"""Defaults that several stages share, each in this one place."""

from __future__ import annotations

from typing import Final

DEFAULT_METHOD: Final = "adapted"  # how align and the quickstart merge labels, and `dedpo merge` where people's can teach a judge
POWERED = ("dedpo", "tuned")  # the methods of `dedpo merge` in which a judge counts as far as its power
