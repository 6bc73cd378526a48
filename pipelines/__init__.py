"""The stages, one file each, and the `dedpo` command, which finds a stage, imports it late and passes the arguments on.

Public: main, STAGES.
May import: every room.
"""

from __future__ import annotations

import sys
from importlib import import_module

STAGES = {
    "quickstart": ("pipelines.quickstart", "the whole journey on the embedded world, on a CPU, in minutes"),
    "align": ("pipelines.align", "the whole journey on your own model, by one file of settings"),
    "ingest": ("pipelines.ingest", "a public preference format, or your own table -> a pair dataset"),
    "propose": ("pipelines.propose", "pairs from a model's own images"),
    "validate": ("pipelines.validate", "what a pair dataset holds, and what is wrong with it"),
    "pairs": ("pipelines.pairs", "a pair dataset for annotation tools, other programs, or a hub"),
    "vote": ("pipelines.vote", "people label pairs in a web page"),
    "label": ("pipelines.label", "machine labels for every pair, by one or several judges"),
    "calibrate": ("pipelines.calibrate", "judges' labels calibrated on the human ones, or stacked into one"),
    "merge": ("pipelines.merge", "human and machine labels -> training targets, and what they are worth"),
    "train": ("pipelines.train", "a LoRA, or the whole UNet, from pairs and targets"),
    "export": ("pipelines.export", "what a run trained, for other programs"),
    "cache": ("pipelines.cache", "caches of encoded pairs: a list, and what to remove"),
    "inspect": ("pipelines.inspect_weights", "what a weight file or a folder is, and which programs read it"),
    "sample": ("pipelines.sample", "images, seed-paired between models"),
    "score": ("evaluation.score", "scores of sampled images"),
    "compare": ("evaluation.compare", "paired differences with intervals, and report.html"),
}


JOURNEY = {
    "make pairs": ("ingest", "propose", "validate", "pairs"),
    "label": ("vote", "label", "calibrate", "merge"),
    "train": ("train", "export", "cache"),
    "look": ("sample", "score", "compare", "inspect"),
}  # what stands in no group comes first, as it is a whole journey


def usage() -> str:
    """The text of `dedpo --help`."""
    grouped = {name for names in JOURNEY.values() for name in names}
    groups = {"the whole journey": tuple(name for name in STAGES if name not in grouped)} | JOURNEY
    width = max(map(len, STAGES))
    lines = ["usage: dedpo STAGE [options]"]
    for title, names in groups.items():
        lines += ["", title, *(f"  {name:<{width}}  {STAGES[name][1]}" for name in names)]
    tail = "`dedpo STAGE --help` shows the options that people use first, `dedpo STAGE --help_all` all of them,"
    return "\n".join([*lines, "", tail, "`dedpo recipes` the configuration files that come with it."])


def main(argv: list[str] | None = None) -> int:
    """Entry point of the `dedpo` command; returns the exit code."""
    arguments = sys.argv[1:] if argv is None else argv
    if not arguments or arguments[0] in ("-h", "--help", "--help_all"):
        print(usage())
        return 0 if arguments else 2
    if arguments[0] == "--version":
        from importlib.metadata import version

        print(version("dedpo_diffusion"))
        return 0
    if arguments[0] == "recipes":
        from dedpo_diffusion.core.recipes import list_recipes

        print(list_recipes())
        return 0
    if arguments[0] not in STAGES:
        print(f"dedpo: error: no stage {arguments[0]!r}{_meant(arguments[0])}\n`dedpo --help` shows the stages", file=sys.stderr)
        return 2
    module = import_module(f"dedpo_diffusion.{STAGES[arguments[0]][0]}")
    return module.main(arguments[1:])


def _meant(name: str) -> str:
    import difflib

    found = difflib.get_close_matches(name, [*STAGES, "recipes"], n=1)
    return f"; did you mean {found[0]}?" if found else ""
