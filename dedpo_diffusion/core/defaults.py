"""Defaults that several stages share, each in this one place."""

from __future__ import annotations

from typing import Final

DEFAULT_METHOD: Final = "tuned"  # how labels are merged where nobody says: `dedpo merge`, merge_labels, align, quickstart
POWERED = ("dedpo", "tuned")  # the methods of `dedpo merge` in which a judge counts as far as its power
