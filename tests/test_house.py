"""The house keeps its shape: every file imports, imports point down, the command answers."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from dedpo_diffusion.pipelines import STAGES, main

ROOT = Path(__file__).parents[1]
# floor of each module of the library: a file imports from lower floors alone; scorers may serve annotators
FLOORS = {
    0: [
        "records",
        "settings",
        "console",
        "files",
        "debias",
        "noising",
        "balance",
        "losses",
        "objectives",
        "visits",
        "following",
        "images",
        "text",
        "image_statistics",
        "metrics",
        "shapes",
        "tables",
        "decoding",
        "ahead",
        "claims",
        "bases",
        "single_file",
        "stopping",
        "health",
        "optimizers",
        "sharding",
    ],
    1: [
        "pairs",
        "labels",
        "label_plan",
        "doubts",
        "agreement",
        "calibration",
        "models",
        "cache",
        "checkpoints",
        "runs",
        "weights",
        "scorers",
        "png",
    ],
    2: ["tiny", "annotators", "diagnosis", "formats", "inspection", "ballot", "sampling", "step", "feed", "validation"],
    3: ["cli", "prompts"],
}
FLOOR = {name: floor for floor, names in FLOORS.items() for name in names}
GROUND_HELPERS = {"records", "console", "files", "tables", "stopping", "sharding"}  # plain words that every ground-floor file may use
SOURCES = {"dedpo_diffusion": "dedpo_diffusion", "pipelines": "dedpo_diffusion.pipelines", "eval": "dedpo_diffusion.evaluation"}


def modules() -> list[tuple[Path, str]]:
    found = []
    for folder, package in SOURCES.items():
        for file in sorted((ROOT / folder).rglob("*.py")):
            parts = file.relative_to(ROOT / folder).with_suffix("").parts
            if "benchmarks" not in parts:
                found.append((file, ".".join([package, *(part for part in parts if part != "__init__")])))
    return found


def imported(file: Path, module: str) -> set[str]:
    """Names of this project's modules that a file imports anywhere, as "pairs" or "pipelines.train"."""
    is_package = file.name == "__init__.py"
    names = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".") if is_package else module.split(".")[:-1]
                base = ".".join([*parents[: len(parents) - node.level + 1], *([node.module] if node.module else [])])
            names |= {f"{base}.{alias.name}" for alias in node.names} | {base}
    return {name.removeprefix("dedpo_diffusion.") for name in names if name.startswith("dedpo_diffusion.")}


@pytest.mark.parametrize("module", [module for _, module in modules()])
def test_every_file_imports(module):
    importlib.import_module(module)


def test_imports_point_down():
    for file, module in modules():
        parts = module.split(".")[1:]
        if not parts or parts[0] in ("pipelines", "evaluation"):
            continue
        own = parts[0]
        assert own in FLOOR, f"{file}: give it a floor"
        for name in imported(file, module):
            other = name.split(".")[0]
            if other == own or other not in FLOOR:
                continue
            allowed = FLOOR[other] < FLOOR[own] or (FLOOR[own] == FLOOR[other] == 0 and other in GROUND_HELPERS)
            allowed |= (own, other) in {("runs", "checkpoints"), ("objectives", "losses"), ("bases", "single_file"), ("weights", "runs")}
            assert allowed, f"{file} imports {name}"


def test_what_judges_never_imports_what_trains():
    for file, module in modules():
        if module.startswith("dedpo_diffusion.evaluation"):
            heads = {name.split(".")[0] for name in imported(file, module)}
            assert not heads & {"step", "feed", "cache", "losses", "balance", "debias"}, file
            assert "pipelines" not in heads, file


def test_accelerate_is_used_by_stages_alone():
    for file, module in modules():
        if not module.startswith("dedpo_diffusion.pipelines"):
            assert not re.search(r"^\s*(from|import) accelerate", file.read_text(encoding="utf-8"), re.M), file


def test_no_stage_bears_a_dependencys_name():
    installed = set(metadata.packages_distributions())
    for folder in ("pipelines", "eval"):
        names = {file.stem for file in (ROOT / folder).glob("*.py")} - {"__init__"}
        assert not {name for name in names if name in installed}, folder


def test_no_file_and_no_function_is_too_long():
    for folder in ("dedpo_diffusion", "pipelines", "eval", "tests"):
        for file in (ROOT / folder).rglob("*.py"):
            text = file.read_text(encoding="utf-8")
            assert text.count("\n") <= 500, file
            for node in ast.walk(ast.parse(text)):
                if isinstance(node, ast.FunctionDef):
                    assert node.end_lineno - node.lineno < 80, f"{file}: {node.name}"


def test_public_functions_are_documented():
    for file, _ in modules():
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                assert ast.get_docstring(node), f"{file}: {node.name}"


def test_public_names():
    import dedpo_diffusion

    for name in dedpo_diffusion.__all__:
        assert callable(getattr(dedpo_diffusion, name)), name
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        dedpo_diffusion.nonsense  # noqa: B018


@pytest.mark.parametrize("stage", list(STAGES))
def test_help_of_every_stage_imports_nothing_heavy(stage):
    code = (
        "import sys\nfrom dedpo_diffusion.pipelines import main\n"
        f"try:\n    main([{stage!r}, '--help'])\nexcept SystemExit as stop:\n    assert not stop.code\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'matplotlib', 'accelerate'} & set(sys.modules)\nassert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"dedpo {stage}" in done.stdout


def test_the_command_itself(capsys):
    assert main(["--help"]) == 0
    assert "quickstart" in capsys.readouterr().out
    assert main([]) == 2
    assert main(["trian"]) == 2
    assert "no stage 'trian'" in capsys.readouterr().err
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == metadata.version("dedpo_diffusion")
