"""`dedpo align`: the journal, the rehearsal, bad input; and small whole journeys on Shapes, stopped, changed, and answered by people."""

from __future__ import annotations

import os
import shlex
import subprocess
from importlib import import_module
from pathlib import Path

import pytest

from dedpo_diffusion.core.console import UserError
from dedpo_diffusion.core.defaults import DEFAULT_METHOD
from dedpo_diffusion.journey.journal import Journal, Step, fingerprint, without
from dedpo_diffusion.journey.plan import Route
from dedpo_diffusion.journey.steps import steps
from dedpo_diffusion.labels.files import label_names, read_labels
from dedpo_diffusion.pipelines import STAGES, align
from dedpo_diffusion.settings import AlignSettings, MergeSettings
from support.aligning import SMALL, align_command, results_of, without_places
from support.browser import browser, press, ready  # noqa: F401
from support.pictures import write_pairs
from support.voting import client_of, post

CONFIGS = Path(__file__).parents[2] / "configs"


# ---- the journal


def touch(path: Path, text: str = "1") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def merged(out: Path, *argv: str, **changes) -> Step:
    """A step that reads one file and writes another."""
    given = {"inputs": (out / "labels",), "outputs": (out / "targets",), "made": (out / "targets",)} | changes
    return Step("merge", "merge", ("pairs", *argv), **given)


def done(journal: Journal, step: Step) -> None:
    with journal.doing(step, journal.look(step)):
        for path in step.outputs:
            touch(path)


@pytest.fixture
def begun(tmp_path):
    journal = Journal(tmp_path / "out", {"model": "m"})
    journal.open()
    touch(tmp_path / "out" / "labels")
    return journal, tmp_path / "out"


def test_a_done_step_is_skipped_also_by_another_process(begun):
    journal, out = begun
    assert journal.look(merged(out)).due
    done(journal, merged(out))
    assert not journal.look(merged(out)).due
    assert not Journal(out, {"model": "m"}).look(merged(out)).due


def test_a_changed_input_or_command_does_it_again_and_removes_only_what_it_made(begun, capsys):
    journal, out = begun
    done(journal, merged(out))
    mine = touch(out / "mine")
    touch(out / "labels", "2")
    found = journal.look(merged(out))
    assert (found.due, found.why, found.remove) == (True, f"{out / 'labels'} has changed", (out / "targets",))
    with journal.doing(merged(out), found):
        assert not (out / "targets").exists() and mine.exists()
        touch(out / "targets")
    assert f"{out / 'targets'}, which this journey made, is removed" in capsys.readouterr().out
    assert not journal.look(merged(out)).due
    assert journal.look(merged(out, "--method", "naive")).why == "its command has changed"


def test_what_the_journey_did_not_make_is_never_removed(begun):
    journal, out = begun
    touch(out / "targets", "somebody's")
    with pytest.raises(UserError, match="this journey did not make it; move it away"):
        journal.look(merged(out))
    assert (out / "targets").read_text() == "somebody's"


def test_a_stopped_step_goes_on_or_begins_anew(begun):
    journal, out = begun
    for resumes, removed in ((True, ()), (False, (out / "targets",))):
        with pytest.raises(KeyboardInterrupt), journal.doing(merged(out), journal.look(merged(out, resumes=True))):
            touch(out / "targets")
            raise KeyboardInterrupt
        found = Journal(out, {"model": "m"}).look(merged(out, resumes=resumes))
        assert (found.due, found.why, found.remove) == (True, "it was stopped", removed)


def test_a_free_option_spoils_nothing_and_what_is_no_longer_wanted_goes(begun):
    journal, out = begun

    def sampled(*strengths: str) -> Step:
        made = tuple(out / strength for strength in strengths)
        return merged(out, "--strength", *strengths, outputs=made, made=made, resumes=True, free=("--strength",))

    done(journal, sampled("1", "2"))
    assert journal.look(sampled("1", "2", "3")).remove == ()
    assert journal.look(sampled("1")).remove == (out / "2",)
    assert without(["a", "--strength", "1", "2", "--x", "3"], ["--strength"]) == ["a", "--x", "3"]


def test_what_people_may_have_answered_is_not_replaced(begun):
    journal, out = begun
    done(journal, merged(out, redo="refuse"))
    touch(out / "labels", "2")
    with pytest.raises(UserError, match="people's answers may hang on it; choose another --out"):
        journal.look(merged(out, redo="refuse"))


def test_another_journey_a_strange_folder_or_journal_is_refused(begun, tmp_path):
    journal, out = begun
    with pytest.raises(UserError, match="holds another journey \\(model is 'm' there, 'n' now\\)"):
        Journal(out, {"model": "n"})
    touch(tmp_path / "other" / "file")
    with pytest.raises(UserError, match="holds no journey"):
        Journal(tmp_path / "other", {})
    touch(out / "journal.json", "{")
    with pytest.raises(UserError, match="cannot be read as a journal"):
        Journal(out, {"model": "m"})


def test_one_folder_by_another_name_is_the_same(begun, monkeypatch):
    journal, out = begun
    done(journal, Step("x", "x", ("--out", str(out / "targets")), outputs=(out / "targets",), made=(out / "targets",)))
    monkeypatch.chdir(out.parent)
    near = Path("out")
    step = Step("x", "x", ("--out", "out/targets"), outputs=(near / "targets",), made=(near / "targets",))
    assert not Journal(near, {"model": "m"}).look(step).due


def test_fingerprints_tell_content_and_folders(tmp_path):
    folder, file = tmp_path / "folder", touch(tmp_path / "folder" / "a", "x")
    before = fingerprint(file), fingerprint(folder)
    os.utime(file, ns=(1, 1))
    assert fingerprint(file) == before[0] and fingerprint(folder) != before[1]
    assert fingerprint(tmp_path / "none") == "absent"


# ---- the rehearsal


def test_one_constant_is_every_default():
    assert {*AlignSettings(model="m").methods, MergeSettings(Path()).method} == {DEFAULT_METHOD}
    assert not [file.name for file in CONFIGS.glob("*.yaml") if "targets:" in file.read_text()]


def rehearsed(capsys, *arguments: str) -> list[list[str]]:
    """The command lines that a rehearsal prints."""
    assert align.main([*arguments, "--dry_run", "true"]) == 0
    return [shlex.split(line[2:]) for line in capsys.readouterr().out.splitlines() if line.startswith("$ ")]


@pytest.mark.parametrize("methods", [[], ["--methods", "adapted", "human_only", "naive"]])
@pytest.mark.parametrize("config", ["align_sdxl", "align_sd15", "align_shapes"])
def test_every_line_is_taken_by_its_stages_own_parser(config, methods, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = rehearsed(capsys, "--config", str(CONFIGS / f"{config}.yaml"), *methods)
    assert not list(tmp_path.iterdir())  # nothing is touched
    stages = [line[1] for line in lines]
    assert stages[0] == ("ingest" if config == "align_sd15" else "propose") and stages[1:3] == ["validate", "label"]
    assert ("vote" in stages) == (config == "align_sdxl") and ("calibrate" in stages) == bool(methods)
    assert stages.count("train") == stages.count("merge") == len(methods[1:]) or not methods
    for command, stage, *arguments in lines:
        module, taken = import_module(f"dedpo_diffusion.{STAGES[stage][0]}"), []
        monkeypatch.setattr(module, "run", taken.append)
        assert command == "dedpo" and module.main(arguments) == 0, capsys.readouterr().err
        assert len(taken) == 1


def test_too_few_labels_to_teach_a_judge_are_merged_by_method_tuned(capsys, tmp_path):
    taught = ["adapted" if part == "naive" else part for part in SMALL]
    lines = rehearsed(capsys, *taught, "--out", str(tmp_path / "out"))
    [merge] = [line for line in lines if line[1] in ("calibrate", "merge")]
    assert [merge[merge.index(option) + 1] for option in ("--method", "--judge", "--name")] == ["tuned", "oracle_clean", "adapted"]
    lines = rehearsed(capsys, *taught, "--human_share", "1.0", "--out", str(tmp_path / "out"))
    [calibrate, merge] = [line for line in lines if line[1] in ("calibrate", "merge")]
    assert "adapt" in calibrate and [merge[merge.index(option) + 1] for option in ("--method", "--judge")] == ["adapted", "adapt"]


def test_in_a_users_own_dataset_the_journeys_files_bear_its_name(tmp_path):
    data = write_pairs(tmp_path / "data")
    settings = AlignSettings(
        model="m", out=tmp_path / "mine", pairs=str(data), judges=["pickscore"], methods=["adapted"], recipe="sdxl_lora_12gb.yaml",
        eval_prompts="parti", scorers=["hps"], votes=30,
    )  # fmt: skip
    from dedpo_diffusion.journey.costs import known_of

    made = [path.name for step in steps(Route(settings), known_of(settings, data)) for path in step.made if data in path.parents]
    assert {"mine-adapt.parquet", "mine-adapted.parquet"} <= set(made) and "adapted.parquet" not in made


# ---- bad input

GIVEN = {
    "model": "m", "prompts": "parti", "judges": ["pickscore"], "votes": 30, "recipe": "sdxl_lora_12gb.yaml", "eval_prompts": "geneval",
    "scorers": ["hps"],
}  # fmt: skip


def test_a_served_scorer_is_held_out_by_the_name_that_its_server_says(tmp_path):
    given = {**GIVEN, "scorers": ["hps", "http=http://localhost:1"], "held_out": ["imagereward"], "out": tmp_path / "out"}
    align.check_settings(AlignSettings(**given))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": None}, "give prompts, for which"),
        ({"pairs": "p.csv"}, "prompts and pairs are both given"),
        ({"methods": ["naif"]}, "there is no method 'naif'; known: human_only, naive"),
        ({"methods": []}, "name each way to merge once"),
        ({"judges": []}, "judges is missing, and method"),
        ({"votes": 0}, "nobody labels these pairs"),
        ({"people": "simulated"}, "is for the embedded model"),
        ({"model": "shapes", "people": "simulated", "human_share": 0.5}, "need no page; leave out votes"),
        ({"model": "shapes", "people": "simulated", "votes": 0}, "human_share is None"),
        ({"human_share": 0.1}, "human_share is for people: simulated"),
        ({"recipe": None}, "recipe is missing"),
        ({"recipe": "none.yaml"}, "no such file"),
        ({"recipe": "sd15_full.yaml"}, "trains the whole UNet"),
        ({"eval_prompts": None}, "eval_prompts is missing"),
        ({"prompts": "shapes", "limit": 5}, "for the embedded model"),
        ({"model": "shapes", "prompts": "shapes"}, "give limit"),
        ({"scorers": []}, "scorers is missing"),
        ({"held_out": ["clip"]}, "not among the scorers"),
        ({"scorers": ["http=http://localhost:1"], "held_out": ["http"]}, "give the name that its server says"),
        ({"strengths": [1, 1]}, "different numbers above 0"),
        ({"images_per_prompt": 3}, "an even number"),
        ({"images_per_prompt": 1}, "images_per_prompt is 1; give 2 or more"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(changes, message, tmp_path):
    with pytest.raises(UserError, match=message):
        align.run(AlignSettings(**{"out": tmp_path / "out", **GIVEN, **changes}))
    assert not (tmp_path / "out").exists()


# ---- journeys


@pytest.mark.slow
def test_a_journey_that_is_killed_between_stages_ends_as_one_that_is_not(tmp_path, capsys):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert align.main([*SMALL, "--out", str(whole)]) == 0
    for marker in ("labels/oracle_clean.parquet", "runs/naive/settings.yaml", "samples/naive/strength-1/settings.yaml"):
        process = subprocess.Popen(align_command(stopped), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        place = stopped / "data" / marker if marker.startswith("labels") else stopped / marker
        while not place.exists():
            assert process.poll() is None
        process.kill()
        process.wait()
    capsys.readouterr()
    assert align.main([*SMALL, "--out", str(stopped)]) == 0
    told = capsys.readouterr().out
    assert "propose: done already" in told and "merge naive: done already" in told
    assert without_places(results_of(stopped), stopped) == without_places(results_of(whole), whole)
    found = results_of(whole)
    assert found["default"] == "naive" and found["arms"]["naive"]["best_strength"] in (1, 2)
    assert (whole / "aligned.safetensors").is_file()

    # the same again does nothing, and a changed setting only what hangs on it
    before = (whole / "results.json").read_bytes()
    assert align.main([*SMALL, "--out", str(whole)]) == 0
    assert "\n$ dedpo" not in capsys.readouterr().out and (whole / "results.json").read_bytes() == before
    assert align.main([*SMALL, "--out", str(whole), "--steps", "3"]) == 0
    again = [line.split()[2] for line in capsys.readouterr().out.splitlines() if line.startswith("$ dedpo")]
    assert again == ["train", "export", "sample", "score", "compare", "export"]
    assert align.main([*SMALL, "--out", str(whole), "--limit", "25"]) == 2
    assert "limit is 24 there, 25 now" in capsys.readouterr().err


def answer_by_program(url: str, answers: int) -> None:
    client = client_of(url)
    state = client.get("/api/next", params={"rater": "ann"}).json()
    for _ in range(answers):
        state = post(client, "/api/vote", rater="ann", ticket=state["item"]["ticket"], answer="left", seconds=1.0)


@pytest.fixture
def answer_in_the_page(browser):
    def answer(url: str, answers: int) -> None:
        page = browser.new_context().new_page()
        page.goto(url)
        page.get_by_label("Your name").fill("ann")
        page.keyboard.press("Enter")
        press(page, *["ArrowLeft"] * (answers - 1))
        ready(page)
        page.keyboard.press("ArrowLeft")  # nothing need come after the last one: the page is closed by then
        page.locator("#saved").filter(has_text="saved").wait_for()
        page.context.close()

    return answer


@pytest.mark.slow
@pytest.mark.parametrize("way", ["program", "page"])
def test_people_answer_and_the_journey_goes_on_by_itself(way, tmp_path, request):
    answer = answer_by_program if way == "program" else request.getfixturevalue("answer_in_the_page")
    out = tmp_path / "out"
    own = [part for part in align_command(out) if part not in ("--people", "simulated", "--human_share", "0.5")]
    log = open(tmp_path / "log", "w+")  # noqa: SIM115
    env = {name: value for name, value in os.environ.items() if name not in ("DISPLAY", "WAYLAND_DISPLAY")} | {"PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen([*own, "--votes", "6"], stdout=log, stderr=subprocess.STDOUT, env=env)
    try:
        url = None
        while url is None:
            assert process.poll() is None, (tmp_path / "log").read_text()
            url = next((line.split()[1] for line in (tmp_path / "log").read_text().splitlines() if line.startswith("open http")), None)
        answer(url, 6)
        assert process.wait(300) == 0, (tmp_path / "log").read_text()
    finally:
        process.kill()
        process.wait()
        log.close()
    assert "human" in label_names(out / "data") and 1 <= len(read_labels(out / "data", "human").pair_id) <= 6
    assert (out / "report.html").is_file() and (out / "naive.safetensors").is_file()
