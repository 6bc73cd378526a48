"""`dedpo pairs push` and `dedpo ingest auto OWNER/NAME` with a stand-in of the hub: what was announced arrives, and comes back the same."""

from __future__ import annotations

import io
import json
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image
from PIL.PngImagePlugin import PngInfo

import dedpo_diffusion
from dedpo_diffusion.core.records import Pair
from dedpo_diffusion.core.texts import size_words
from dedpo_diffusion.labels.files import Votes, aggregate, read_labels, read_votes, write_labels, write_votes
from dedpo_diffusion.pairs.dataset import PairReader, PairWriter
from dedpo_diffusion.pipelines import main
from support.hub import TOKEN, Hub, hub  # noqa: F401 - one is a fixture
from support.pictures import picture

NAME = "someone/pairs"
PEOPLE = ["Ann Other", "bob@example.org", "Ann Other"]


def noted(seed: int) -> bytes:
    """A picture with a path in its text."""
    told, buffer = PngInfo(), io.BytesIO()
    told.add_text("parameters", "/home/ann/models/base.safetensors")
    Image.open(io.BytesIO(picture(seed))).save(buffer, "PNG", pnginfo=told)
    return buffer.getvalue()


@pytest.fixture
def pairs(tmp_path) -> Path:
    """Nine pairs, three with votes of two people, one of them a tie; a judge's labels; columns of this machine and of a person."""
    import numpy as np

    out = tmp_path / "somewhere" / "PAIRS"
    with PairWriter(out, shard_pairs=4) as writer:
        for k in range(9):
            source = {"model": str(tmp_path / "models" / "base"), "category": "cats" if k % 2 else None, "annotator": "Ann Other"}
            writer.add(Pair(f"pair-{k}", f"prompt {k % 3}", noted(k) if k == 1 else picture(k), picture(k + 100, format="JPEG"), source))
    votes = Votes(["pair-0", "pair-0", "pair-4"], np.array([1.0, 0.0, 0.5]), np.array([1, 1, 1]), PEOPLE)
    write_votes(out, "human", votes)
    write_labels(out, "human", aggregate(votes))
    write_labels(out, "clip", aggregate(Votes(["pair-0"], np.array([0.7]), np.array([1]), [None])))
    return out


def push(pairs: Path, *more: object) -> int:
    return main(["pairs", "push", str(pairs), NAME, *map(str, more)])


def announced(text: str) -> dict[str, str]:
    return dict(re.findall(r"^  (\S+)  ([\d.]+ \w+)$", text, re.M))


def sent(hub: Hub) -> list[dict]:
    """The rows that arrived."""
    held = hub.datasets[NAME].files
    return [row for name in sorted(held) if name.endswith(".parquet") for row in pq.read_table(io.BytesIO(held[name])).to_pylist()]


def test_just_what_was_announced_arrives(hub, pairs, capfd):
    assert push(pairs, "--private", "true", "--license", "cc-by-4.0") == 0
    shown = capfd.readouterr()
    held = hub.datasets[NAME]
    assert set(held.files) == {"README.md", "data/train-00000-of-00001.parquet"} and held.lfs == {"data/train-00000-of-00001.parquet"}
    assert announced(shown.out) == {name: size_words(len(data)) for name, data in held.files.items()}
    assert shown.out.index("README.md  ") < shown.out.index("sent: all 2 files")
    assert held.private and held.commits == ["Add pairs"] and hub.repositories == {}
    for line in (
        "source columns: model, category; left out: annotator",
        "the people who answered: 2, as rater-1, rater-2",
        "images without their metadata: 1",
        "values with paths cut: 9",
        "other labels stay here: clip",
    ):
        assert line in shown.out, line
    assert hub.tokens == {f"Bearer {TOKEN}"} and TOKEN not in shown.out + shown.err
    assert sorted(path.name for path in pairs.iterdir()) == ["labels", "pairs", "votes"]  # nothing is left beside the pairs

    assert push(pairs, "--license", "cc-by-4.0") == 0  # the same again changes nothing
    assert "it is there, and private" in capfd.readouterr().out
    assert len(held.commits) == 1 and len(hub.puts) == 1


def test_nothing_of_this_machine_and_nobodys_name_is_sent(hub, pairs, tmp_path):
    assert push(pairs) == 0
    everything = b"".join(hub.datasets[NAME].files.values()) + json.dumps(sent(hub), default=str).encode()
    for word in (str(tmp_path), "somewhere", str(Path.home()), platform.node(), "/home/ann", "Ann Other", "bob", "example.org"):
        assert word.encode() not in everything, word
    assert {row["source_model"] for row in sent(hub)} == {"base"}
    card = hub.datasets[NAME].files["README.md"].decode()
    assert yaml.safe_load(card.split("---")[1])["license"] == "unknown"
    assert "| pairs | 9 |" in card and "| single answers | 3 by 2 people |" in card


def test_names_go_where_they_are_asked_for(hub, pairs):
    assert push(pairs, "--raters", "names", "--without", "model") == 0
    rows = sent(hub)
    assert "Ann Other" in rows[0]["answers"] and rows[0]["source_annotator"] == "Ann Other" and "source_model" not in rows[0]
    assert push(pairs, "--raters", "none") == 0
    assert all(row["rater"] is None for row in sent(hub)) and "rater-" not in sent(hub)[0]["answers"]


@pytest.mark.slow
def test_what_was_pushed_is_ingested_as_it_was(hub, pairs, tmp_path):
    """Pairs, sides, labels and votes; in processes of their own, as `datasets` asks where the hub is when it is imported."""
    assert push(pairs, "--private", "true") == 0
    again = tmp_path / "again"
    environment = os.environ | {"HF_HOME": str(tmp_path / "home")}
    command = [sys.executable, "-m", "dedpo_diffusion.pipelines.ingest", "auto", NAME, "--out", str(again)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "read as exported" in done.stdout, done.stdout + done.stderr
    assert TOKEN not in done.stdout + done.stderr
    for one, other in zip(PairReader(pairs).iter_pairs(), PairReader(again).iter_pairs(), strict=True):
        assert (one.pair_id, one.prompt, one.image_1) == (other.pair_id, other.prompt, other.image_1)
        same = Image.open(io.BytesIO(one.image_0)), Image.open(io.BytesIO(other.image_0))
        assert same[0].tobytes() == same[1].tobytes() and "parameters" not in same[1].info
        assert (one.image_0 == other.image_0) == (one.pair_id != "pair-1")
        assert other.source["model"] == "base" and other.source.get("category") == one.source.get("category")
    before, after = (read_labels(folder, "human") for folder in (pairs, again))
    assert (before.pair_id, before.label_0.tolist()) == (after.pair_id, after.label_0.tolist())
    before, after = (read_votes(folder, "human") for folder in (pairs, again))
    assert (before.pair_id, before.label_0.tolist()) == (after.pair_id, after.label_0.tolist())
    assert after.rater == ["rater-1", "rater-2", "rater-1"]

    code = f"import datasets; d = datasets.load_dataset({NAME!r}, split='train'); print(len(d), d[0]['image_0'].size, d.column_names)"
    shown = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True).stdout
    assert shown.startswith("9 (16, 16)") and "label_0" in shown


# ---- what stands in the way


@pytest.mark.parametrize(
    ("method", "path", "said", "arrived"),
    [
        ("PUT", r"/lfs/.*", (400, "no room"), "none of the 2 files arrived"),
        ("POST", r".*/preupload/main", (403, f"you may not, {TOKEN}"), "none of the 2 files arrived"),
        ("POST", r".*/commit/main", "hang up", "none of the 2 files arrived"),
        ("POST", r"/api/repos/create", (403, "you may not"), "could not be asked"),
    ],
)
def test_a_broken_upload_says_what_arrived_and_is_taken_up(method, path, said, arrived, hub, pairs, capfd):
    hub.refuse = lambda asked, where: said if asked == method and re.fullmatch(path, where) else None
    assert push(pairs) == 2
    shown = capfd.readouterr()
    assert "broke off" in shown.err and arrived in shown.err and "The same command sends it again" in shown.err
    assert TOKEN not in shown.out + shown.err and "Traceback" not in shown.err
    hub.refuse = lambda asked, where: None
    assert push(pairs) == 0
    assert len(hub.datasets[NAME].files) == 2
    assert len(hub.puts) == 1 and len(hub.datasets[NAME].commits) == 1  # what was stored before the break is not sent again


def test_an_answer_that_is_lost_is_no_failure(hub, pairs, capfd):
    hub.refuse = lambda asked, where: "after" if where.endswith("/commit/main") else None
    assert push(pairs) == 0
    assert "sent: all 2 files" in capfd.readouterr().out


def test_files_of_an_earlier_larger_upload_go(hub, pairs, capfd):
    """Else the two would be read as one data set."""
    assert push(pairs) == 0
    files = hub.datasets[NAME].files
    files["data/train-00001-of-00002.parquet"] = files["mine.txt"] = b"old"
    assert push(pairs) == 0
    assert "data/train-00001-of-00002.parquet  of an earlier upload" in capfd.readouterr().out
    assert set(files) == {"README.md", "data/train-00000-of-00001.parquet", "mine.txt"}


def test_a_dry_run_sends_nothing_and_needs_no_login(hub, pairs, tmp_path, capfd, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no token"))
    assert push(pairs, "--dry_run", "true", "--out", tmp_path / "sent") == 0
    shown = capfd.readouterr().out
    assert "nothing is sent" in shown and "sent: all" not in shown and hub.asked == []
    written = {path.relative_to(tmp_path / "sent").as_posix(): path for path in (tmp_path / "sent").rglob("*") if path.is_file()}
    assert announced(shown) == {name: size_words(path.stat().st_size) for name, path in written.items()}
    assert push(pairs) == 2
    assert "hf auth login" in capfd.readouterr().err and hub.asked == []


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["push", "PAIRS"], "OWNER/NAME is missing"),
        (["push", "PAIRS", "alone"], "give OWNER/NAME"),
        (["push", "PAIRS", NAME, "--to", "csv"], "--to is for `dedpo pairs export`"),
        (["push", "PAIRS", NAME, "--without", "nothing"], "no such source column"),
        (["export", "PAIRS", "--to", "csv"], "--out is missing"),
        (["export", "PAIRS", "--out", "x"], "--to is missing"),
        (["export", "PAIRS", NAME, "--to", "csv", "--out", "x"], "REPOSITORY is for `dedpo pairs push`"),
        (["export", "PAIRS", "--to", "csv", "--out", "x", "--private", "true"], "--private is for `dedpo pairs push`"),
    ],
)
def test_mistakes(argv, said, hub, pairs, capfd):
    assert main(["pairs", *(str(pairs) if word == "PAIRS" else word for word in argv)]) == 2
    assert said in capfd.readouterr().err and hub.asked == []


def test_from_python(hub, pairs):
    seen: list = []
    address = dedpo_diffusion.push_pairs(pairs=pairs, repository=NAME, progress=seen.append)
    assert address == f"{hub.url}/datasets/{NAME}" and len(sent(hub)) == 9
    assert [(update.what, update.done) for update in (seen[0], seen[-1])] == [("writing pairs", 0), ("writing pairs", 9)]
    with pytest.raises(dedpo_diffusion.UserError, match="OWNER/NAME is missing"):
        dedpo_diffusion.push_pairs(pairs=pairs)
