"""The pages of docs/: their examples run, their command lines parse, the options they name exist, the site builds and needs no network.

A ```bash or ```python block is run, page by page, in a folder of its own. What stands in HTML comments above it changes that:

    <!-- not run: REASON -->     it is not; its command lines must parse all the same
    <!-- slow -->                it is run with `-m slow` alone
    <!-- pending -->             nothing is done with it: its commands do not exist yet
    <!-- setup ... -->           Python that runs before it

and anywhere on a page: <!-- begins with: NAMES -->, what its folder holds (see WORLD); <!-- people answer -->, who label half of PAIRS.
"""

from __future__ import annotations

import importlib.util
import itertools
import os
import re
import shlex
import subprocess
import sys
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.resources import files
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from dedpo_diffusion import pipelines as cli
from dedpo_diffusion.core import console
from dedpo_diffusion.core.records import Labels
from dedpo_diffusion.labels.files import write_labels
from dedpo_diffusion.pairs.dataset import PairReader
from support.browser import WIDE, browser  # noqa: F401
from support.pictures import picture, write_pairs
from support.training import fresh_accelerate_state  # noqa: F401

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))
READ = [*PAGES, "../README.md"]  # whose command lines and options must exist
PART = re.compile(r"^<!-- *(?P<comment>.*?) *-->$|^```(?P<kind>\w+)\n(?P<code>.*?)^```$", re.M | re.S)
SMALL = {  # appended to command lines: the same, in little time
    "propose": "--steps 2",
    "sample": "--steps 2 --device cpu",
    "train": "--optim.steps 2 --optim.batch 2 --device cpu",
    "label": "--device cpu",
    "merge": "--picture false",
    "score": "--device cpu",
    "compare": "--resamples 200",
}
FOREIGN = {"multi_gpu", "num_processes", "config_file", "nproc_per_node", "cpu", "strict"}  # options of other programs
PENDING: set[str] = set()  # options that pages name and no stage has yet


@dataclass(frozen=True)
class Block:
    """One fenced block of a page, and the comments directly above it."""

    page: str
    line: int
    kind: str
    code: str
    notes: tuple[str, ...]

    def note(self, name: str) -> str | None:
        """What a comment says behind its name; None where there is no such comment."""
        return next((note[len(name) :].lstrip(": \n") for note in self.notes if note.startswith(name)), None)

    @property
    def commands(self) -> list[list[str]]:
        """The arguments of each command line that is ours, without the program."""
        found = []
        for line in self.code.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] == ["dedpo"]:
                found.append(words[1:])
            elif words[:2] == ["accelerate", "launch"]:
                script = next(k for k, word in enumerate(words) if word.startswith("pipelines/"))
                found.append([Path(words[script]).stem, *words[script + 1 :]])
        return found


def parts(page: str) -> list[Block]:
    """Blocks and free comments of a page, in order; a comment has kind "comment"."""
    text = (DOCS / page).read_text(encoding="utf-8")
    found: list[Block] = []
    waiting: list[tuple[int, str]] = []  # comments, with their ends

    for match in PART.finditer(text):
        line = text.count("\n", 0, match.start()) + 1
        if match["kind"] is None:
            waiting.append((match.end(), match["comment"]))
            found.append(Block(page, line, "comment", match["comment"], ()))
            continue
        start, notes = match.start(), []
        while waiting and waiting[-1][0] == start - 1:
            end, note = waiting.pop()
            notes.append(note)
            start = end - len(f"<!-- {note} -->") if "\n" not in note else text.rindex("<!--", 0, end)
        found.append(Block(page, line, match["kind"], match["code"], tuple(notes)))
    return found


def blocks(kind: str) -> list[Block]:
    return [block for page in READ for block in parts(page) if block.kind == kind]


def site() -> ModuleType:
    """docs/hooks.py, which is no part of a package."""
    spec = importlib.util.spec_from_file_location("site_hooks", DOCS / "hooks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["site_hooks"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


# ---- the folder that a page begins with


def prompts(folder: Path, model: Path) -> None:
    from dedpo_diffusion.shapes.world import VOCABULARY

    for name, chosen in (("prompts.txt", VOCABULARY[:12]), ("test.txt", VOCABULARY[12:16])):
        (folder / name).write_text("".join(f"{attributes.prompt}\n" for attributes in chosen))


def images(folder: Path, model: Path) -> None:
    prompts(folder, model)
    (folder / "my-images").mkdir()
    for seed, name in enumerate(("fox-a", "fox-b", "owl-a", "owl-b")):
        (folder / "my-images" / f"{name}.png").write_bytes(picture(seed))


def pairs(folder: Path, model: Path) -> None:
    write_pairs(folder / "PAIRS", 40)
    people_answer(folder)


def people_answer(folder: Path) -> None:
    """Half of the pairs, of all prompts, now one side, now the other."""
    ids = [pair_id for row, pair_id in enumerate(PairReader(folder / "PAIRS").ids()) if row % 4 < 2]
    write_labels(folder / "PAIRS", "human", Labels(ids, np.arange(len(ids)) // 2 % 2.0))


def run(folder: Path, model: Path) -> None:
    prompts(folder, model)
    write_pairs(folder / "PAIRS")
    people_answer(folder)
    dedpo(["train", "--model", "MODEL", "--data.pairs", "PAIRS", "--data.targets", "soft", "--out", "runs/mine"])


def lora(folder: Path, model: Path) -> None:
    run(folder, model)
    for name in ("mine", "style"):
        dedpo(["export", "runs/mine", "--out", f"{name}.safetensors"])


WORLD: dict[str, Callable[[Path, Path], None]] = {
    "prompts": prompts, "images": images, "pairs": pairs, "run": run, "lora": lora,
}  # fmt: skip


# ---- running


def dedpo(words: list[str]) -> None:
    """One command line, in this process, made small."""
    assert cli.main([*words, *shlex.split(SMALL.get(words[0], ""))]) == 0, f"dedpo {shlex.join(words)}"


def run_bash(block: Block) -> None:
    """Our own commands in this process, which has imported everything already; all others in a shell."""
    for line in block.code.replace("\\\n", " ").splitlines():
        ours = Block(block.page, block.line, "bash", line, ()).commands
        if ours:
            dedpo(ours[0])
        else:
            subprocess.run(["bash", "-euc", line], check=True)


def run_page(page: str, folder: Path, model: Path, *, slow: bool) -> int:
    """Run a page's blocks in order; returns how many there were."""
    names: dict[str, Any] = {}
    for name, there in (("MODEL", model), ("JUDGE", files("dedpo_diffusion.shapes") / "model" / "judge"), ("configs", ROOT / "configs")):
        os.symlink(str(there), folder / name)
    count = 0
    for block in parts(page):
        if block.kind == "comment" and block.code.startswith("begins with:"):
            for name in block.code.partition(":")[2].split():
                WORLD[name](folder, model)
        elif block.kind == "comment" and block.code == "people answer":
            people_answer(folder)
        elif block.kind not in ("bash", "python") or block.note("not run") is not None or block.note("pending") is not None:
            continue
        elif slow or block.note("slow") is None:
            count += 1
            if block.kind == "bash":
                run_bash(block)
            else:
                where = str(DOCS / page)
                exec(compile(block.note("setup") or "", where, "exec"), names)
                exec(compile("\n" * block.line + block.code, where, "exec"), names)
    return count


def has(page: str, *, slow: bool) -> bool:
    able = [block for block in parts(page) if block.kind in ("bash", "python") and block.note("not run") is block.note("pending") is None]
    return any((block.note("slow") is not None) == slow for block in able)


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if has(page, slow=False)])
def test_examples_run(page, tmp_path, tiny_model, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run_page(page, tmp_path, tiny_model, slow=False)


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if has(page, slow=True)])
def test_longer_examples_run(page, tmp_path, tiny_model, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run_page(page, tmp_path, tiny_model, slow=True)


def test_what_is_not_run_says_why():
    for page in PAGES:
        text = (DOCS / page).read_text(encoding="utf-8")
        assert not re.search(r"^[ \t]+```(bash|python)", text, re.M), f"{page}: an indented block is not found"
        for block in parts(page):
            if block.kind in ("bash", "python"):
                assert block.note("not run") != "", f"{page}, line {block.line}: give the reason"
                for note in block.notes:
                    assert re.match(r"not run: |slow$|pending$|setup\n|begins with: |people answer$", note), (
                        f"{page}, line {block.line}: {note}"
                    )


# ---- command lines and options


@pytest.mark.parametrize("block", [b for b in blocks("bash") if b.note("pending") is None], ids=lambda b: f"{b.page}-{b.line}")
def test_command_lines_parse(block, monkeypatch):
    """By the stages' own parsers; the stages do nothing."""
    monkeypatch.chdir(ROOT)
    for words in block.commands:
        assert words[0] in cli.STAGES, f"{block.page}, line {block.line}: no stage {words[0]!r}"
        module = import_module(f"dedpo_diffusion.{cli.STAGES[words[0]][0]}")
        monkeypatch.setattr(module, "stage", lambda settings, body, argv, **how: console.stage(settings, lambda _: None, argv, **how))
        assert module.main(words[1:]) == 0, f"{block.page}, line {block.line}: {shlex.join(words)}"


def test_options_in_the_text_exist():
    hooks = site()
    options = {name for stage in cli.STAGES for name, *_ in hooks.options_of(hooks.read_stage(stage).settings)}
    options |= {flag for stage in cli.STAGES for flag in hooks.read_stage(stage).flags} | {"config", "help", "help_all"}
    groups = {name.partition(".")[0] for name in options if "." in name}
    for page in READ:
        text = re.sub(r"^```.*?^```", "", (DOCS / page).read_text(encoding="utf-8"), flags=re.M | re.S)
        for span in re.findall(r"`([^`\n]+)`", text):
            if span.startswith("python eval/"):  # a benchmark, with options of its own
                continue
            named = set(re.findall(r"--([a-z][a-z_.]*[a-z_])", span)) - FOREIGN - PENDING
            dotted = {name for name in re.findall(r"\b([a-z_]+\.[a-z_]+)\b", span) if name.partition(".")[0] in groups}
            named |= {name for name in dotted if name.rpartition(".")[2] not in ("py", "json", "jsonl")}
            short = {name.rpartition(".")[2] for name in options}
            assert not {name for name in named if name not in (options if "." in name else short | options)}, f"{page}: {span}"


def choices(stage: str, option: str) -> tuple[object, ...]:
    """The values that an option of a fixed choice takes; () of any other."""
    read = site().read_stage(stage)
    if option in read.flags:  # a list, of whatever
        return ()
    settings: Any = read.settings
    *rooms, name = option.split(".")
    for room in rooms:
        settings = typing.get_type_hints(settings)[room]
    kind = typing.get_type_hints(settings)[name]
    parts = typing.get_args(kind) if typing.get_origin(kind) in (typing.Union, types.UnionType) else (kind,)
    return tuple(value for part in parts if typing.get_origin(part) is typing.Literal for value in typing.get_args(part))


def test_what_related_systems_are_here_exists():
    """Stages, and the values of options, that docs/systems.md names."""
    spans = re.findall(r"`([^`\n]+)`", (DOCS / "systems.md").read_text(encoding="utf-8"))
    checked = 0
    for words in map(str.split, spans):
        assert words[0] != "dedpo" or words[1] in cli.STAGES, words
        stage = words[1] if words[0] == "dedpo" else "train"
        for option, value in itertools.pairwise(words):
            if option.startswith("--") or "." in option:
                taken = choices(stage, option.removeprefix("--"))
                assert not taken or value in taken, (stage, option, value)
                checked += bool(taken)
    assert checked >= 15
    assert {"loop", "apa", "adadpo"} & {word for words in map(str.split, spans) for word in words} == {"loop", "apa", "adadpo"}


def test_every_curve_is_explained():
    import torch

    from dedpo_diffusion.training.metrics import summarise

    pair = {name: torch.ones(2) for name in ("loss", "margin", "cosine", "pull", "target", "weight")} | {"bucket": torch.zeros(2).long()}
    line = summarise(pair | {name: torch.ones(2, 2) for name in ("policy", "reference", "coefficients")}, schedule=1000)
    text = (DOCS / "curves.md").read_text(encoding="utf-8")
    for name in (*line, "gradient_norm", "learning_rate", "power"):
        assert f"`{name}`" in text, name


def test_every_warning_is_explained():
    from dedpo_diffusion.training import health

    said = re.findall(r'found\["([^"]+)"\]', Path(health.__file__).read_text(encoding="utf-8"))
    text = (DOCS / "curves.md").read_text(encoding="utf-8")
    assert len(said) >= 4
    for name in said:
        assert f"| {name} |" in text, name


# ---- the site


def test_the_reference_has_every_option():
    hooks = site()
    text = "\n".join(hooks.stages())
    for name in cli.STAGES:
        assert f"## dedpo {name}\n" in text
    for option in ("`--with`", "`PAIRS`", "`--objective.kind`", "`--data.cache`", "`FOLDERS`"):
        assert option in text, option
    for line in text.splitlines():
        if line.startswith("| `"):
            assert len(re.findall(r"(?<!\\)\|", line)) == 5, line


def test_public_names_are_where_the_reference_looks_for_them():
    for name in site().public_names():
        module, _, own = name.rpartition(".")
        assert getattr(import_module(module), own).__doc__, name


@pytest.mark.parametrize(
    "text",
    [
        '<link rel="stylesheet" href="https://fonts.example/css">',
        '<link href="//fonts.example" rel="preconnect">',
        '<script defer src="https://cdn.example/x.js"></script>',
        '<img alt="a" src="http://pictures.example/a.png">',
    ],
)
def test_what_a_page_would_fetch_is_found(text):
    assert site().fetched(f"<p>{text}</p>") == [re.search(r'(?:src|href)="([^"]+)"', text)[1]]
    followed = '<a href="https://arxiv.org/abs/2602.06195">a paper</a><img src="files/a.png"><link rel="stylesheet" href="style.css">'
    assert site().fetched(followed) == []


def test_the_ceiling_of_a_judge_is_that_of_the_method():
    """Table of docs/choosing.md: 1000 labels over the variance ratio of docs/method.md, section 3, at its least; a quarter is labelled."""
    rows = re.findall(r"^\| (\d+) % \| ([\d,]+) \|$", (DOCS / "choosing.md").read_text(encoding="utf-8"), re.M)
    assert len(rows) == 8
    for right, worth in rows:
        power = 2 * int(right) / 100 - 1
        assert int(worth.replace(",", "")) == round(1000 / (1 - (1 - 0.25) * (2 * power * power - power**2)))


@pytest.mark.slow
def test_the_site_builds_strictly(tmp_path):
    """As `.ci/run` builds it. Not --quiet, which also keeps warnings from failing."""
    for name in ("mkdocs", "material", "mkdocstrings_handlers.python"):
        pytest.importorskip(name, reason=f"no {name}: the site is built where the extra `docs` is installed")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {page.replace(".md", ".html") for page in PAGES} <= {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.html")}
    assert "--objective.kind" in (tmp_path / "reference" / "commands.html").read_text(encoding="utf-8")
    assert "preference_step" in (tmp_path / "reference" / "python.html").read_text(encoding="utf-8")


@pytest.mark.slow
def test_search_and_the_dark_scheme_work_from_the_disk(tmp_path, browser):
    """What people look for is found, on a page that no server gave."""
    for name in ("mkdocs", "material", "mkdocstrings_handlers.python"):
        pytest.importorskip(name, reason=f"no {name}: the site is built where the extra `docs` is installed")
    command = [sys.executable, "-m", "mkdocs", "build", "--site-dir", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, capture_output=True, check=True)
    page = browser.new_page(**WIDE)
    failed = []
    page.on("pageerror", lambda error: failed.append(str(error)))
    page.on("requestfailed", lambda request: failed.append(request.url))
    page.goto((tmp_path / "index.html").as_uri())
    page.locator(".md-search__input").click()
    for words, title in (("vram", "SDXL on one GPU"), ("windows", "SDXL on one GPU"), ("how many labels", "How many labels")):
        page.locator(".md-search__input").fill("")
        page.locator(".md-search__input").press_sequentially(words)
        page.locator(".md-search-result__item h1", has_text=title).first.wait_for()
    page.keyboard.press("Escape")
    page.locator("form[data-md-component=palette] label:visible").first.click()
    page.locator("body[data-md-color-scheme=slate]").wait_for()
    assert not failed
