"""Configuration files: one of the current folder, or a recipe of this package by its bare name."""

from __future__ import annotations

import difflib
from importlib.resources import files
from pathlib import Path

from dedpo_diffusion.core.errors import UserError


def recipe_files() -> dict[str, Path]:
    """The recipes that come with this package, by name without .yaml."""
    folder = Path(str(files("dedpo_diffusion.configs")))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def find_config(name: str) -> Path:
    """The file that `--config NAME` stands for: a path, else a file of the current folder, else a recipe; .yaml may be left out.

    Raises:
        UserError: there is none.
    """
    here = [Path(name), Path(f"{name}.yaml")]
    for path in here:
        if path.is_file():
            return path
    if Path(name).is_dir():
        raise UserError(f"--config {name} is a folder; give a YAML file")
    recipes = recipe_files()
    if Path(name).name == name and name.removesuffix(".yaml") in recipes:
        return recipes[name.removesuffix(".yaml")]
    close = difflib.get_close_matches(Path(name).name.removesuffix(".yaml"), recipes, n=1)
    meant = f"; did you mean {close[0]}.yaml?" if close else "; `dedpo recipes` lists the ones that come with dedpo"
    raise UserError(f"there is no file {name}{meant}")


def about(path: Path) -> tuple[str, str]:
    """(the stage of a recipe, what it is for) of its comment: "# dedpo STAGE ..." first, then a sentence."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.lstrip("# ").strip())
    words = lines[0].split() if lines else []
    stage = (
        words[1] if words[:1] == ["dedpo"] and len(words) > 1 else next((w.split("/")[1][:-3] for w in words if w[:10] == "pipelines/"), "")
    )
    told = " ".join(filter(None, lines[1:] if stage else lines))
    return stage, told.split(". ")[0].rstrip(".")


def list_recipes() -> str:
    """The text of `dedpo recipes`."""
    rows = [(path.name, *about(path)) for path in recipe_files().values()]
    width, stages = (max(len(row[column]) for row in rows) for column in (0, 1))
    lines = [f"  {name:<{width}}  {stage:<{stages}}  {told}" for name, stage, told in rows]
    tail = "`dedpo STAGE --config NAME` takes one by its name from any folder; later options override it.\nThey lie in "
    return "\n".join(["recipes, each with its stage:", "", *lines, "", f"{tail}{Path(str(files('dedpo_diffusion.configs')))}"])
