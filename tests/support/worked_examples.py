"""The worked examples of CONTRIBUTING.md, as files to install and as changes to the house."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def modules() -> dict[str, str]:
    """The Python files of the page, by the name in the line above each block."""
    found = re.findall(r"`(\w+)\.py`:\n\n```python\n(.*?)^```$", TEXT, re.M | re.S)
    assert found
    return dict(found)


def wheel(folder: Path, project: str, files: dict[str, str]) -> Path:
    """A pure wheel of a pyproject.toml's text and files, written by hand, as building one needs the network or a build tool."""
    settings = tomllib.loads(project)["project"]
    stem = f"{settings['name'].replace('-', '_')}-{settings['version']}"
    points = "".join(
        f"[{group}]\n" + "".join(f"{name} = {value}\n" for name, value in entries.items())
        for group, entries in settings["entry-points"].items()
    )
    info = {
        "METADATA": f"Metadata-Version: 2.1\nName: {settings['name']}\nVersion: {settings['version']}\n",
        "WHEEL": "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        "entry_points.txt": points,
    }
    content = files | {f"{stem}.dist-info/{name}": text for name, text in info.items()}
    record = "".join(f"{name},,\n" for name in [*content, f"{stem}.dist-info/RECORD"])
    path = folder / f"{stem}-py3-none-any.whl"
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in (content | {f"{stem}.dist-info/RECORD": record}).items():
            archive.writestr(name, text)
    return path


def install(wheel: Path, target: Path) -> None:
    """Install a wheel with pip, without network, into a folder of its own."""
    options = ["--no-deps", "--no-index", "--no-compile", "--quiet", "--disable-pip-version-check"]
    subprocess.run([sys.executable, "-m", "pip", "install", *options, str(wheel), "--target", str(target)], check=True)


def extras(folder: Path) -> Path:
    """The package of the page, installed; the folder for PYTHONPATH."""
    (project,) = re.findall(r"```toml\n(.*?)^```$", TEXT, re.M | re.S)
    files = {f"dedpo_extras/{name}.py": code for name, code in modules().items()} | {"dedpo_extras/__init__.py": ""}
    install(wheel(folder / "wheels", project, files), folder / "site")
    return folder / "site"


def changed_house(folder: Path) -> Path:
    """A copy of the packages with the changes that the page makes to them; the folder for PYTHONPATH."""
    house, keep_out = folder / "dedpo_diffusion", shutil.ignore_patterns("__pycache__", "results", "benchmarks")
    for name, place in (("dedpo_diffusion", ""), ("pipelines", "pipelines"), ("eval", "evaluation"), ("configs", "configs")):
        shutil.copytree(ROOT / name, house / place, ignore=keep_out, dirs_exist_ok=True)
    code = modules()
    for path in re.findall(r"In the house it is `(dedpo_diffusion/[\w/]+\.py)`", TEXT):
        (folder / path).write_text(code[Path(path).stem], encoding="utf-8")
    (function,) = re.findall(r"^def slic.*?(?=^\S)(?!def)", code["slic"], re.M | re.S)
    objectives, table = house / "dpo" / "objectives.py", "OBJECTIVES: dict[str, Objective] = {"
    objectives.write_text(objectives.read_text(encoding="utf-8").replace(table, f"{function}\n\n{table}"), encoding="utf-8")
    for path, change in re.findall(r"```diff\n--- (\S+)\n(.*?)^```$", TEXT, re.M | re.S):
        file = folder / path
        file.write_text(changed(file.read_text(encoding="utf-8"), change), encoding="utf-8")
    return folder


def changed(text: str, change: str) -> str:
    """A text with one change of a diff, whose lines may be the beginnings of the text's."""
    lines = change.splitlines()
    old = "\n".join(line[1:] for line in lines if line[0] in " -")
    new = "\n".join(line[1:] for line in lines if line[0] in " +")
    assert text.count(f"\n{old}") == 1, old
    return text.replace(f"\n{old}", f"\n{new}")


def dedpo(*words: object, path: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    """One `dedpo` command in a process of its own, with what is installed in `path`."""
    before = os.environ.get("PYTHONPATH")
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(path), *([before] if before else [])])}
    command = [sys.executable, "-c", "from dedpo_diffusion.pipelines import main; raise SystemExit(main())", *map(str, words)]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)
