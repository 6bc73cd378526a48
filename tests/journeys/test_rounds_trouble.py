"""Rounds of `dedpo align` in trouble: a judge whose server stops, a disk that is full, a drift too far. The same command goes on."""

from __future__ import annotations

import errno
import itertools
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import pytest

from dedpo_diffusion import shapes
from dedpo_diffusion.core import files
from dedpo_diffusion.core.files import file_digest
from dedpo_diffusion.pipelines import align
from support.aligning import SMALL, results_of, without_places
from support.servers import Reply, Request, Server, decoded, serve

pytestmark = pytest.mark.slow


def said(capsys) -> tuple[str, str]:
    """What was printed, and the errors, each on one line."""
    held = capsys.readouterr()
    return " ".join(held.out.split()), " ".join(held.err.split())


def digests(out: Path, *, leave: tuple[str, ...] = ("journal.json",)) -> dict[str, str]:
    """Every file of a journey, but for those that are still written to."""
    found = (file for file in sorted(out.rglob("*")) if file.is_file() and not files.is_leftover(file))
    return {file.relative_to(out).as_posix(): file_digest(file) for file in found if file.name not in leave}


def changed(options: list[str], **values: object) -> list[str]:
    """A command line with other values of options that it has."""
    options = list(options)
    for name, value in values.items():
        options[options.index(f"--{name}") + 1] = str(value)
    return options


# ---- a judge whose server stops


def bright(request: Request) -> Reply:
    """A judge: the mean pixel."""
    if request.body is None:
        return Reply({"name": "bright", "version": "v1", "temperature": 10})
    return Reply({"version": "v1", "scores": [float(np.asarray(decoded(image)).mean()) for image in request.body["images"]]})


class Stopping:
    """A scorer that likes every image better than all before it, so that every round gains, and stops the judge's server once it sees
    images of the second round."""

    def __init__(self, out: Path) -> None:
        self.out, self.count = out, itertools.count()
        self.judge: ExitStack | None = None

    def answer(self, request: Request) -> Reply:
        if request.body is None:
            return Reply({"name": "rising", "version": "v1"})
        if self.judge is not None and (self.out / "samples" / "naive-round-2").is_dir():
            self.judge.close()
            self.judge = None
        return Reply({"version": "v1", "scores": [float(next(self.count)) for _ in request.body["images"]]})


@contextmanager
def closable(port: int = 0) -> Iterator[tuple[Server, ExitStack]]:
    with ExitStack() as stack:
        yield stack.enter_context(serve(bright, port)), stack


def test_a_judge_that_fails_in_round_3_loses_nothing_and_the_next_start_goes_on(tmp_path, capsys):
    out = tmp_path / "out"
    scorer = Stopping(out)
    with serve(scorer.answer) as verdict, closable() as (judge, stop):
        scorer.judge, port = stop, judge.http.server_port
        given = changed(SMALL, judges=f"http={judge.root}", scorers=f"http={verdict.root}", limit=8)
        command = [*given, "--rounds", "3", "--out", str(out)]
        assert align.main(command) == 2
        told, error = said(capsys)
        assert "$ dedpo propose" in told and "round 2 ended the rounds" not in told
        assert judge.root in error and "dedpo align: error: stage label ended with exit code 2" in error
        there = digests(out)
        assert "rounds/3/round-3/pairs/pairs-00000.parquet" in there and "rounds/3/round-3/labels/http.parquet" not in there
        assert {"naive.safetensors", "naive-round-2.safetensors", "rounds/2/results.json"} <= there.keys()

        assert align.main(command) == 2  # the server is still away: the same again, and nothing is made or lost
        assert "stage label ended" in said(capsys)[1] and digests(out) == there

        with closable(port):
            assert align.main(command) == 0
    told, _ = said(capsys)
    assert "train naive, round 2: done already" in told and "propose, round 3: done already" in told
    first = told.index("$ dedpo ")
    assert told[first:].startswith("$ dedpo label") and "rounds/3/round-3" in told[first : told.index("$ dedpo ", first + 1)]
    after = digests(out)
    assert {name: after[name] for name in there} == there
    assert [entry["round"] for entry in results_of(out)["rounds"]] == [1, 2, 3] and "round 3: gain" in told


# ---- a disk that is full


class Disk:
    """It is full as long as the file `since` is there: every file that is written whole fails when it is flushed."""

    def __init__(self, monkeypatch) -> None:
        self.since: Path | None = None
        self.failed, self.sync = 0, files._sync_file
        monkeypatch.setattr(files, "_sync_file", self.flush)

    def flush(self, path: Path) -> None:
        if self.since is not None and self.since.exists():
            self.failed += 1
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        self.sync(path)


def test_a_disk_that_is_full_between_and_within_rounds_loses_nothing(tmp_path, monkeypatch, capsys):
    rounds = [*SMALL, "--rounds", "2", "--round_votes", "6"]
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert align.main([*rounds, "--out", str(whole)]) == 0
    disk = Disk(monkeypatch)
    for since in ("naive.safetensors", "rounds/2/round-2/labels/human.parquet", "rounds/2/data/targets/naive.parquet"):
        capsys.readouterr()
        disk.since, before = out / since, disk.failed
        assert align.main([*rounds, "--out", str(out)]) == 2
        _, error = said(capsys)
        assert disk.failed > before
        assert "no space left on its disk; make some room there, then give the same command again" in error and ".tmp" not in error
        assert not [file for file in out.rglob("*") if files.is_leftover(file)]
        there = digests(out)
    disk.since = None
    assert align.main([*rounds, "--out", str(out)]) == 0
    assert without_places(results_of(whole), whole) == without_places(results_of(out), out)
    after = digests(out)
    assert {name: after[name] for name in there if name.endswith((".parquet", ".safetensors"))}.items() <= there.items()


# ---- images that lie too far from the base's


def test_rounds_end_where_images_lie_too_far_from_the_bases_and_go_on_once_they_may(tmp_path, capsys):
    """The verdict's scorer likes every round better than the one before, so that nothing but their drift ends the rounds."""
    out, embedder = tmp_path / "out", Path(shapes.__file__).parent / "model" / "judge"
    with serve(Stopping(out).answer) as verdict:
        given = changed(SMALL, limit=8, steps=3, eval_limit=8, eval_seeds=2)
        place = given.index("--scorers")
        given[place + 1 : place + 2] = [f"http={verdict.root}", f"pickscore={embedder}"]
        training = '{"optim.learning_rate": "0.02", "optim.batch": "8", "optim.warmup": "0"}'
        command = [*given, "--training", training, "--rounds", "3", "--out", str(out)]
        assert align.main([*command, "--round_drift", "0.001"]) == 0
        told, _ = said(capsys)
        line = re.search(
            r"round 2 ended the rounds: its images lie [\d.]+ times as far from the base's, by pickscore, as the base's images of one "
            r"prompt lie apart; round_drift allows 0.001; round 1 is taken",
            told,
        )
        assert line is not None and told.count(line[0]) == 2  # when it happens, and at the end
        found = results_of(out)
        assert [(entry["round"], bool(entry["ended"])) for entry in found["rounds"]] == [(1, False), (2, True)]
        assert found["default"] == "naive" and not (out / "rounds" / "3").exists()

        assert align.main([*command, "--round_drift", "1000"]) == 0
    told, _ = said(capsys)
    assert "train naive, round 2: done already" in told and "ended the rounds" not in told and "round 3: gain" in told
    assert results_of(out)["default"] == "naive-round-3"
