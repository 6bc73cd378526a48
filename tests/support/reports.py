"""What the tests of the report share."""

from __future__ import annotations

from html.parser import HTMLParser

import numpy as np

NAMES = ("base", "human_only", "tuned")


CHANGE = np.array([0, 0.4, 0.3, 0.2, 0.1, 0.05, 0, -0.05, -0.1, -0.2, -0.3, 0])


def shown_verdict(results):
    """The verdict as the page shows it: its first clause as a heading, then the numbers."""
    lead, _, rest = results["verdict"].partition(": ")
    return f"{lead}. {rest[0].upper()}{rest[1:]}"


def told_by_schema_2(results):
    """The results as they are with everything that the schema may hold, and with prompts enough for large numbers."""
    results = {"schema": 2, **results, "n_prompts": 60}
    for facts in results["scorers"].values():
        facts |= {"kind": "scorer", "role": "held_out" if facts["held_out"] else "made_labels"}
    results["scorers"]["people"] = {"version": "votes", "kind": "people", "role": "held_out", "held_out": True}
    for arm in results["arms"].values():
        for entry in arm["by_scorer"].values():
            entry |= {"gain_over_base": entry["gain_over_base"] | {"p": 0.0002, "p_holm": 0.0421}, "n": 12}
        arm |= {"categories": {}, "spread": {}, "people": None, "warnings": []}
    asked = {"gain_over_base": {"mean": 0.31, "ci": [0.14, 0.47], "p": 0.0001, "p_holm": 0.0003}}
    asked |= {"win_rate_vs_base": {"mean": 0.655, "ci": [0.57, 0.735]}, "n": 9}
    raw = {"value": 0.79, "ci": [0.6, 0.9], "n": 24}
    between = {"pairs": 24, "raw": raw, "alpha": raw | {"ci": None}}
    tuned = results["arms"]["tuned"]
    tuned["by_scorer"]["people"] = asked
    shares = {"truth": {"mean": 0.75, "ci": [0.55, 0.9], "n": 8}, "proxy": {"mean": None, "ci": None, "n": 0}}
    tuned["people"] = {"answers": 13, "pairs": 9, "raters": ["Ada", "Mina"], "agreement": between, "with_scorers": shares}
    tuned["warnings"] = ["Warning: proxy rises, truth <falls>."]
    whole = {name: {"n_prompts": 5, "n_images": 10, **entry} for name, entry in tuned["by_scorer"].items() if name != "people"}
    alone = {"n_prompts": 1, "n_images": 2, "gain_over_base": {"mean": -0.777, "ci": None}, "win_rate_vs_base": {"mean": 0.5, "ci": None}}
    tuned["categories"] = {"<large>": whole, "alone": {"truth": alone}}
    drift = {"version": "clip-1", "diversity": None, "diversity_minus_base": None, "drift": {"mean": 0.1234, "ci": [0.12, 0.13]}}
    tuned["spread"] = {"clip": drift}
    return results


class Page(HTMLParser):
    """Checks that tags are closed in order, and collects attributes and text; what stands in <noscript> is not shown."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.images: list[str] = []
        self.blocks: dict[str, str] = {}
        self.block = None
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.links += [values[key] for key in ("src", "href", "action") if values.get(key)]
        self.images += [values["src"]] if tag == "img" and "src" in values else []
        self.block = values.get("id", "") if tag == "script" else None
        if tag not in ("img", "meta", "br", "input"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        self.block = None

    def handle_data(self, data):
        if self.block is None:
            self.text += data if self.open and self.open[-1] in ("h1", "span") else " " + data
        else:
            self.blocks[self.block] = data
