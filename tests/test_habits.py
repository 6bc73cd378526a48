"""The files around the code are valid, and what they name is there."""

from __future__ import annotations

import re
import stat
import subprocess
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def test_the_citation_has_what_the_format_requires():
    cited = yaml.safe_load(read("CITATION.cff"))
    assert cited["cff-version"] == "1.2.0" and cited["message"] and cited["title"]
    assert cited["authors"] == [{"name": "The dedpo_diffusion authors"}]
    assert str(cited["version"]) == re.search(r'^version = "(.*)"$', read("pyproject.toml"), re.M)[1]
    assert {one["url"].rpartition("/")[2] for one in cited["references"]} == {"2602.06195", "2502.20847", "2311.12908"}
    for one in cited["references"]:
        assert one["type"] and one["title"] and all({"family-names", "given-names"} <= set(author) for author in one["authors"])


def test_hooks_run_the_environments_own_tools():
    (repo,) = yaml.safe_load(read(".pre-commit-config.yaml"))["repos"]
    assert repo["repo"] == "local"
    assert {hook["id"]: hook["entry"].split()[0] for hook in repo["hooks"]} == {"ruff": "ruff", "ruff-format": "ruff", "mypy": "mypy"}
    assert all(hook["language"] == "system" and hook["name"] for hook in repo["hooks"])


def test_the_workflow_runs_ci_run():
    (job,) = yaml.safe_load(read(".github/workflows/ci.yml"))["jobs"].values()
    assert job["strategy"]["matrix"]["python"] == ["3.11", "3.12"] and job["runs-on"].startswith("ubuntu")
    assert [step["run"] for step in job["steps"] if "run" in step] == [".ci/run"]
    assert "pip" in [step.get("with", {}).get("cache") for step in job["steps"]]


def test_ci_scripts_can_be_run():
    for script in sorted((ROOT / ".ci").iterdir()):
        assert script.stat().st_mode & stat.S_IXUSR, script
        if script.suffix == ".py":
            compile(script.read_text(), str(script), "exec")
        else:
            subprocess.run(["bash", "-n", str(script)], check=True)
    lines = read(".ci/run").splitlines()
    assert any(line.startswith(".venv/bin/pytest ||") for line in lines) and any(
        line.startswith(".venv/bin/pytest -m slow ||") for line in lines
    )


def test_every_path_that_contributing_names_is_there():
    """Links, paths in backticks, and the tree; what the worked examples add is not there yet."""
    text = read("CONTRIBUTING.md")
    added = set(re.findall(r"In the house it is `([^`]+)`", text))
    named = set(re.findall(r"`((?:dedpo_diffusion|tests|docs|eval|pipelines|configs|\.ci)/[\w/.-]+)`", text)) - added
    named |= set(re.findall(r"^--- (\S+)$", text, re.M)) | set(re.findall(r"\]\(([^)#:]+)\)", text))
    assert len(named) > 5
    for path in named:
        assert (ROOT / path).exists(), path


def tree() -> list[str]:
    """The paths of the tree, from their indents."""
    (block,) = re.findall(r"```text\n(dedpo_diffusion/.*?)```", read("CONTRIBUTING.md"), re.S)
    found, room = [], ""
    for line in block.splitlines():
        indent, words = len(line) - len(line.lstrip()), re.match(r"\s*((?:[\w.]+/ ?)+)", line)
        if words and indent < 5:
            names = words[1].split()
            room = names[0] if indent == 0 else room
            found += names if indent == 0 else [room + name for name in names]
    return found


def test_the_tree_has_every_room_and_no_other():
    paths = tree()
    assert all((ROOT / path).is_dir() for path in paths), paths
    rooms = {f"dedpo_diffusion/{file.parent.name}/" for file in (ROOT / "dedpo_diffusion").glob("*/__init__.py")}
    assert rooms == {path for path in paths if path.count("/") == 2 and path.startswith("dedpo_diffusion/")}
    assert {"dedpo_diffusion/", "pipelines/", "eval/", "configs/", "docs/", "tests/"} <= set(paths)


def test_contributing_is_short_and_the_changelog_has_its_layout():
    assert read("CONTRIBUTING.md").count("\n") <= 200
    heads = re.findall(r"^## (.*)$", read("CHANGELOG.md"), re.M)
    assert heads[0] == "[Unreleased]"
    assert set(re.findall(r"^### (.*)$", read("CHANGELOG.md"), re.M)) <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
