"""The house keeps its shape: every file imports, imports point down, rooms say what they are for, the command answers.

Each rule is a function of a folder that yields what breaks it; `test_every_rule_can_fail` breaks each in a small house made for it.
"""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from importlib import metadata
from pathlib import Path

import pytest

from dedpo_diffusion.pipelines import STAGES, main

ROOT = Path(__file__).parents[1]
SOURCES = {"dedpo_diffusion": "dedpo_diffusion", "pipelines": "dedpo_diffusion.pipelines", "eval": "dedpo_diffusion.evaluation"}
FLOORS = (  # from the ground up; a room imports from lower floors alone
    ("core",),
    ("debias", "settings"),
    ("dpo", "labels"),
    ("pairs",),
    ("models", "voting"),
    ("weights",),
    ("sampling", "shapes"),
    ("judges",),
    ("training",),
    ("journey",),
    ("evaluation",),
    ("pipelines",),
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
MOST_ENTRIES, MOST_LINES, MOST_LINES_OF_A_FUNCTION = 16, 500, 80
OF_THE_WHOLE = {"test_house.py", "test_habits.py"}  # tests of the whole repository
JUDGES_NEVER_IMPORT = {"training", "dpo", "debias"}


def tree_of(file: Path) -> ast.Module:
    """A file's syntax tree, which several rules look at."""
    return parsed(file.read_text(encoding="utf-8"))


@cache
def parsed(text: str) -> ast.Module:
    return ast.parse(text)


def modules(root: Path) -> dict[str, Path]:
    """Every module of the project by its whole name."""
    found = {}
    for folder, package in SOURCES.items():
        for file in sorted((root / folder).rglob("*.py")):
            parts = file.relative_to(root / folder).with_suffix("").parts
            found[".".join([package, *(part for part in parts if part != "__init__")])] = file
    return found


def room(module: str) -> str | None:
    """The room of a module; None for the package itself."""
    return module.split(".")[1] if "." in module else None


def imported(file: Path, known: dict[str, Path], *, types: bool = True) -> set[str]:
    """The project's modules that a file imports anywhere; `types` counts what is imported for type checkers alone."""
    tree = tree_of(file)
    for_types = [node for node in ast.walk(tree) if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    left_out = set() if types else {id(part) for node in for_types for part in ast.walk(node)}
    names: set[str] = set()
    for node in ast.walk(tree):
        if id(node) in left_out:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in names if name in known and known[name] != file}


# ---- the rules


def relative_imports(root: Path) -> Iterator[str]:
    """Imports by half a name, which the other rules would not see."""
    for module, file in modules(root).items():
        if any(isinstance(node, ast.ImportFrom) and node.level for node in ast.walk(tree_of(file))):
            yield f"{module} imports by a relative name"


def upward_imports(root: Path) -> Iterator[str]:
    """Imports from a room of the same floor or a higher one. Benchmarks measure everything, so they may import it."""
    known = modules(root)
    for module, file in known.items():
        own = room(module)
        if own is None or ".benchmarks" in module:
            continue
        if own not in FLOOR:
            yield f"{file}: room {own} has no floor"
            continue
        for name in sorted(imported(file, known)):
            other = room(name)
            if other is not None and other != own and FLOOR.get(other, 99) >= FLOOR[own]:
                yield f"{module} imports {name}, which is not below it"


def circles(root: Path) -> Iterator[str]:
    """Modules that import each other round and round; what type checkers alone see does not count."""
    known = modules(root)
    arrows = {module: imported(file, known, types=False) for module, file in known.items()}
    while True:
        free = [module for module, others in arrows.items() if not others & arrows.keys()]
        if not free:
            break
        for module in free:
            del arrows[module]
    while arrows:  # also drop what only leads to a circle
        used = set().union(*arrows.values())
        ends = [module for module in arrows if module not in used]
        if not ends:
            yield f"a circle among {', '.join(sorted(arrows))}"
            return
        for module in ends:
            del arrows[module]


def long_files(root: Path) -> Iterator[str]:
    """Files and functions that no longer fit into a head."""
    for folder in (*SOURCES, "tests"):
        for file in sorted((root / folder).rglob("*.py")):
            text = file.read_text(encoding="utf-8")
            if text.count("\n") > MOST_LINES:
                yield f"{file} has {text.count(chr(10))} lines"
            for node in ast.walk(tree_of(file)):
                if isinstance(node, ast.FunctionDef) and node.end_lineno and node.end_lineno - node.lineno >= MOST_LINES_OF_A_FUNCTION:
                    yield f"{file}: {node.name} has {node.end_lineno - node.lineno + 1} lines"


def silent_rooms(root: Path) -> Iterator[str]:
    """Rooms whose `__init__.py` does not say what they are for, what is public, and what they may import, or says it wrongly."""
    known = modules(root)
    for name in FLOOR:
        module = f"dedpo_diffusion.{name}"
        if module not in known:
            continue
        words = " ".join((ast.get_docstring(tree_of(known[module])) or "").split())
        said = re.match(r"\S.+? Public: (.+?)\. May import: (.+?)\.(?: |$)", words)
        if said is None:
            yield f"{module}: its docstring lacks what it is for, 'Public: ...' or 'May import: ...'"
            continue
        allowed = set(FLOOR) if said[2] == "every room" else {part.strip() for part in said[2].split(",")}
        inside = {m: f for m, f in known.items() if room(m) == name and ".benchmarks" not in m}
        used = {room(other) for file in inside.values() for other in imported(file, known)} - {name, None}
        for other in sorted(used - allowed, key=str):
            yield f"{module} imports {other}, which it does not say"
        for other in sorted(allowed - set(FLOOR) - {"nothing of this project"}):
            yield f"{module} says that it may import {other}, which is no room"


def stray_stages(root: Path) -> Iterator[str]:
    """Files in pipelines/ that are no stage: what serves stages lives in the library."""
    files = {file.stem for file in (root / "pipelines").glob("*.py")} - {"__init__"}
    wanted = {module.removeprefix("pipelines.") for module, _ in STAGES.values() if module.startswith("pipelines.")}
    yield from (f"pipelines/{name}.py is no stage" for name in sorted(files - wanted))
    yield from (f"the stage pipelines/{name}.py is missing" for name in sorted(wanted - files))


def crowded_floor(root: Path) -> Iterator[str]:
    """More entries in the package than a person takes in at a look."""
    entries = [path.name for path in (root / "dedpo_diffusion").iterdir() if not path.name.startswith((".", "__pycache__"))]
    if len(entries) > MOST_ENTRIES:
        yield f"dedpo_diffusion has {len(entries)} entries: {', '.join(sorted(entries))}"


def judging_by_training(root: Path) -> Iterator[str]:
    """What judges a model imports nothing that trains one; benchmarks may."""
    known = modules(root)
    for module, file in known.items():
        if room(module) == "evaluation" and ".benchmarks" not in module:
            yield from (f"{module} imports {name}" for name in sorted(imported(file, known)) if room(name) in JUDGES_NEVER_IMPORT)


def accelerate_elsewhere(root: Path) -> Iterator[str]:
    """accelerate is known to training and to the stages alone."""
    for module, file in modules(root).items():
        allowed = room(module) in ("training", "pipelines") or ".benchmarks" in module
        if not allowed and re.search(r"^\s*(from|import) accelerate", file.read_text(encoding="utf-8"), re.M):
            yield f"{module} imports accelerate"


def undocumented(root: Path) -> Iterator[str]:
    """Public functions and classes without a docstring."""
    for module, file in modules(root).items():
        for node in tree_of(file).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_") and not ast.get_docstring(node):
                yield f"{module}.{node.name}"


def stray_tests(root: Path) -> Iterator[str]:
    """Tests that stand in no room of the house."""
    rooms = {*FLOOR, "journeys"}
    for file in sorted((root / "tests").rglob("test_*.py")):
        if file.parent.name not in rooms and file.relative_to(root / "tests").as_posix() not in OF_THE_WHOLE:
            yield f"{file} stands in no room"


RULES: tuple[Callable[[Path], Iterator[str]], ...] = (
    relative_imports, upward_imports, circles, long_files, silent_rooms, stray_stages, crowded_floor, judging_by_training,
    accelerate_elsewhere, undocumented, stray_tests,
)  # fmt: skip


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_house(rule):
    assert list(rule(ROOT)) == []


SAID = '"""What it is for.\n\nPublic: nothing.\nMay import: {}.\n"""\n'
BROKEN = {  # a file that breaks each rule, and a word of what must be found
    relative_imports: ("dedpo_diffusion/core/x.py", "from . import y\n", "core.x"),
    upward_imports: ("dedpo_diffusion/core/x.py", "def f():\n    from dedpo_diffusion.labels import y\n", "labels.y"),
    circles: ("dedpo_diffusion/labels/y.py", "def f():\n    import dedpo_diffusion.labels.z\n", "labels.y, dedpo_diffusion.labels.z"),
    long_files: ("tests/core/test_x.py", "\n" * 501, "501"),
    silent_rooms: ("dedpo_diffusion/core/__init__.py", '"""Says nothing."""\n', "dedpo_diffusion.core"),
    stray_stages: ("pipelines/helper.py", "", "helper.py is no stage"),
    crowded_floor: ("dedpo_diffusion/one_more", "", "17 entries"),
    judging_by_training: ("eval/x.py", "import dedpo_diffusion.training.x\n", "training.x"),
    accelerate_elsewhere: ("dedpo_diffusion/core/x.py", "def f():\n    from accelerate import Accelerator\n", "core.x"),
    undocumented: ("dedpo_diffusion/core/x.py", "def shown():\n    pass\n", "core.x.shown"),
    stray_tests: ("tests/somewhere/test_x.py", "", "somewhere"),
}


@pytest.fixture
def small_house(tmp_path):
    """A house that keeps every rule but the stages', with one module more in two rooms and as many entries as may be."""
    for folder in ("pipelines", "eval", "dedpo_diffusion/labels", "dedpo_diffusion/training", "dedpo_diffusion/core", "tests/core"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "__init__.py").write_text("" if folder == "tests/core" else SAID.format("nothing of this project"))
    (tmp_path / "dedpo_diffusion" / "__init__.py").touch()
    for name, text in {"labels/y": "", "labels/z": "import dedpo_diffusion.labels.y\n", "training/x": ""}.items():
        (tmp_path / "dedpo_diffusion" / f"{name}.py").write_text(text)
    for number in range(MOST_ENTRIES - 4):
        (tmp_path / "dedpo_diffusion" / f"data-{number}").touch()
    for module, _ in STAGES.values():
        if module.startswith("pipelines."):
            (tmp_path / (module.replace(".", "/") + ".py")).touch()
    return tmp_path


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_every_rule_can_fail(rule, small_house):
    assert list(rule(small_house)) == []
    name, text, found = BROKEN[rule]
    (small_house / name).parent.mkdir(exist_ok=True)
    (small_house / name).write_text(text)
    assert found in " ".join(rule(small_house))


def test_a_room_names_every_room_it_imports_and_no_other(small_house):
    (small_house / "dedpo_diffusion/training/x.py").write_text("import dedpo_diffusion.labels.y\n")
    assert list(silent_rooms(small_house)) == ["dedpo_diffusion.training imports labels, which it does not say"]
    (small_house / "dedpo_diffusion/training/__init__.py").write_text(SAID.format("labels, lables"))
    assert list(silent_rooms(small_house)) == ["dedpo_diffusion.training says that it may import lables, which is no room"]


def test_a_long_function_is_found(small_house):
    (small_house / "dedpo_diffusion/core/x.py").write_text("def _f():\n" + "    x = 1\n" * 80)
    assert "_f has 81 lines" in " ".join(long_files(small_house))


# ---- that it all works


@pytest.mark.parametrize("module", modules(ROOT))
def test_every_file_imports(module):
    importlib.import_module(module)


def test_what_rooms_call_public_is_there():
    for name in FLOOR:
        found = importlib.import_module(f"dedpo_diffusion.{name}")
        words = " ".join((found.__doc__ or "").split())
        for public in re.search(r"Public: (.+?)\. May import", words)[1].split(" and ")[0].split(", "):
            module, _, attribute = public.partition(".")
            held = getattr(found, module, None) or importlib.import_module(f"{found.__name__}.{module}")
            assert not attribute or hasattr(held, attribute), f"{found.__name__}: {public}"


def test_every_package_is_installed():
    import tomllib

    told = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    packages = {module if file.name == "__init__.py" else module.rpartition(".")[0] for module, file in modules(ROOT).items()}
    packages.add("dedpo_diffusion.configs")
    assert set(told["packages"]) == packages
    for package, folder in told["package-dir"].items():
        assert package == "dedpo_diffusion" or (ROOT / folder / "__init__.py").is_file()


def test_no_stage_bears_a_dependencys_name():
    installed = set(metadata.packages_distributions())
    for folder in ("pipelines", "eval"):
        names = {file.stem for file in (ROOT / folder).glob("*.py")} - {"__init__"}
        assert not {name for name in names if name in installed}, folder


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
