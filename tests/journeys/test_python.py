"""Every stage as a function: a journey on Shapes gives what the commands give, a callback sees it all, mistakes are UserErrors."""

from __future__ import annotations

import ast
import inspect
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import settings as trials
from hypothesis import strategies as st

import dedpo_diffusion as dedpo
from dedpo_diffusion.core import console
from dedpo_diffusion.core.parser import Parser
from dedpo_diffusion.pipelines import STAGES, main
from dedpo_diffusion.settings import DataSettings, MergeSettings, OptimSettings, TrainSettings
from dedpo_diffusion.shapes.people import answer_share, drawn_prompts
from dedpo_diffusion.weights.run_folder import checkpoints

JUDGE = f"pickscore={files('dedpo_diffusion.shapes') / 'model' / 'judge'}"
PAIRS = {"export_pairs", "join_pairs", "push_pairs"}  # the one stage with several actions
FACES = [name for name in dedpo.__all__ if name in STAGES or name in PAIRS]
DRAWN = {"steps": 2, "guidance": 1.5, "batch": 32, "device": "cpu"}
TRAINED = {"optim.steps": 3, "optim.batch": 4, "checkpoint_every": 3}


def journey(root: Path, do) -> None:
    """The short journey in a folder; `do(stage, **options)` does a stage."""
    (root / "prompts.txt").parent.mkdir(parents=True)
    (root / "prompts.txt").write_text("\n".join(drawn_prompts(16, 0)) + "\n")
    pairs, run, out = root / "pairs", root / "run", root / "samples"
    do("propose", model="shapes", prompts=str(root / "prompts.txt"), out=pairs, **DRAWN)
    do("validate", pairs=pairs, workers=1)
    answer_share(pairs, 0.75, 0)
    do("label", pairs=pairs, judges=[JUDGE], device="cpu")
    do("calibrate", pairs=pairs, judges=["pickscore"], method="temperature", name="calibrated")
    do("merge", pairs=pairs, judge="calibrated", method="tuned", picture=False)
    do("train", config="shapes_lora.yaml", out=run, **{"data.pairs": pairs, "data.targets": "tuned", **TRAINED})
    do("export", source=run, out=root / "tuned.safetensors")
    for name, lora in (("base", []), ("tuned", [root / "tuned.safetensors"])):
        do("sample", model="shapes", prompts=str(root / "prompts.txt"), limit=4, lora=lora, out=out / name, **DRAWN)
    do("score", folders=[out / "base", out / "tuned"], scorers=["oracle_reward"], device="cpu")
    do("compare", folders=[out / "base", out / "tuned"], out=root / "report" / "report.html", resamples=200)
    do("pairs", pairs=pairs, to="csv", out=root / "csv")
    do("ingest", format="auto", source=str(root / "csv"), out=root / "again", duplicates="keep", identical="keep")


def by_command(stage: str, **options: object) -> None:
    flags = {"score": {"scorers": "with"}, "label": {"judges": "with"}, "pairs": {}}.get(stage, {})
    places = {
        "ingest": ("format", "source"), "validate": ("pairs",), "label": ("pairs",), "calibrate": ("pairs",), "merge": ("pairs",),
        "export": ("source",), "score": ("folders",), "compare": ("folders",), "pairs": ("pairs",),
    }.get(stage, ())  # fmt: skip

    def words(value: object) -> list[str]:
        return [str(v).lower() if isinstance(v, bool) else str(v) for v in (value if isinstance(value, list) else [value])]

    argv = ["export"] if stage == "pairs" else []
    argv += [word for name in places for word in words(options[name])]
    for name, value in options.items():
        if name not in places and value != []:
            argv += [f"--{flags.get(name, name)}", *words(value)]
    assert main([stage, *argv]) == 0


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """The journey by functions and by commands, in one place after the other, as files name where they lie."""
    root, kept = tmp_path_factory.mktemp("python") / "journey", tmp_path_factory.mktemp("kept")
    seen: list[dedpo.Update] = []
    returned: dict[str, object] = {}

    def by_function(stage: str, **options: object) -> None:
        face = dedpo.export_pairs if stage == "pairs" else getattr(dedpo, stage)
        returned[stage] = face(progress=seen.append, **options)

    journey(root, by_function)
    shutil.move(root, kept / "python")
    journey(root, by_command)
    return kept / "python", root, returned, seen


@pytest.mark.slow
def test_functions_and_commands_give_the_same(both):
    python, command, _, _ = both
    for name in ("pairs/targets/tuned.parquet", "pairs/labels/calibrated.parquet", "pairs/labels/pickscore.parquet"):
        one, other = (pq.read_table(root / name).to_pydict() for root in (python, command))
        assert repr(one) == repr(other), name  # an unlabelled pair is NaN, which equals nothing
    for name in ("pairs/targets/tuned.json", "report/results.json", "pairs/validate.json", "csv/pairs.csv", "tuned.safetensors"):
        assert (python / name).read_bytes() == (command / name).read_bytes(), name
    trained = [(checkpoints(root / "run")[-1][1] / "parameters.safetensors").read_bytes() for root in (python, command)]
    assert trained[0] == trained[1]
    images = sorted(path.relative_to(python) for path in python.rglob("samples/**/*.png"))
    assert len(images) == 8 and all((python / name).read_bytes() == (command / name).read_bytes() for name in images)


@pytest.mark.slow
def test_each_stage_returns_what_it_made(both):
    python, command, returned, _ = both
    assert returned["ingest"] == command / "again" and returned["pairs"] == command / "csv"
    assert returned["propose"] == command / "pairs" and returned["train"] == command / "run"
    assert returned["label"] == [command / "pairs/labels/pickscore.parquet"]
    assert returned["calibrate"] == [command / "pairs/labels/calibrated.parquet"]
    assert returned["export"] == command / "tuned.safetensors" and returned["sample"] == command / "samples/tuned"
    assert returned["score"] == [command / f"samples/{name}/scores.parquet" for name in ("base", "tuned")]
    path, report = returned["merge"]
    assert path == command / "pairs/targets/tuned.parquet" and report == json.loads((python / "pairs/targets/tuned.json").read_text())
    assert returned["compare"]["verdict"] == json.loads((python / "report/results.json").read_text())["verdict"]
    assert returned["validate"] == json.loads((python / "pairs/validate.json").read_text())


@pytest.mark.slow
def test_a_callback_sees_all_work_from_its_start_to_its_end(both):
    seen = both[3]
    works = dict.fromkeys(update.what for update in seen)
    assert {"sampling", "looking at pairs", "labelling with pickscore", "training", "intervals", "reading rows"} <= set(works)
    for what in works:
        updates = [update for update in seen if update.what == what]
        assert updates[0].done == 0 and not updates[0].finished, what
        assert updates[-1].finished, what
        assert updates[-1].total in (None, updates[-1].done), what
    training = [update for update in seen if update.what == "training"]
    assert [update.done for update in training] == [0, 1, 2, 3, 3] and "loss" in training[-1].note


@pytest.mark.slow
def test_the_console_is_free_of_progress_where_a_callback_has_it(both, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(console.Progress.__init__, "__kwdefaults__", {"start": 0, "every": 0.0})  # each step is worth a line
    call = {"folders": [both[1] / "samples" / name for name in ("base", "tuned")], "resamples": 100}
    dedpo.compare(**call, out=tmp_path / "a.html")
    loud = capsys.readouterr().out
    dedpo.compare(**call, out=tmp_path / "b.html", progress=lambda update: None)
    quiet = capsys.readouterr().out
    assert "intervals: " in loud and "intervals: " not in quiet
    assert "next: dedpo" not in loud + quiet and "wrote" in quiet


@pytest.mark.slow
def test_a_callback_that_raises_stops_the_stage(both, tmp_path):
    class Stop(Exception):
        pass

    def stop(update: dedpo.Update) -> None:
        raise Stop

    with pytest.raises(Stop):
        dedpo.validate(pairs=both[1] / "pairs", out=tmp_path / "v.json", progress=stop)
    assert console._listeners == [] and console._running == []


@pytest.mark.slow
def test_one_process_trains_in_two_precisions(both, tmp_path):
    """accelerate alone would refuse the second."""
    call = {"config": "shapes_lora.yaml", "data": {"pairs": both[1] / "pairs", "targets": "tuned"}, "optim": {"steps": 1, "batch": 2}}
    for precision in ("no", "bf16"):
        assert dedpo.train(**call, mixed_precision=precision, out=tmp_path / precision) == tmp_path / precision


# ---- settings and keyword arguments


def test_settings_or_keywords():
    wanted = TrainSettings("m", Path("o"), DataSettings(Path("p"), views=2), optim=OptimSettings(learning_rate=3e-7, betas=(0.5, 0.9)))
    parser = Parser(TrainSettings)
    nested = {"data": {"pairs": Path("p"), "views": np.int64(2)}, "optim": {"learning_rate": 3e-7, "betas": [0.5, 0.9]}}
    assert parser.keywords({"model": "m", "out": "o", **nested}) == wanted
    assert parser.keywords({"model": "m", "out": "o", "data": wanted.data, "optim": wanted.optim}) == wanted
    flat = {"data.pairs": "p", "data.views": 2, "optim.learning_rate": 3e-7, "optim.betas": (0.5, 0.9)}
    assert parser.keywords({"model": "m", "out": "o", **flat}) == wanted


@trials(max_examples=50, deadline=None)
@given(
    st.fixed_dictionaries(
        {},
        optional={
            "judge": st.none() | st.text("abc-1 :#'\"", min_size=1), "judges": st.lists(st.sampled_from(["a", "null", "1", "yes"])),
            "power": st.none() | st.floats(allow_nan=False) | st.lists(st.floats(0, 1), min_size=1), "folds": st.integers(),
            "picture": st.booleans(), "seed": st.integers(0, 2**62 - 1), "plan": st.none() | st.floats(1, 1e9),
        },
    )
)  # fmt: skip
def test_keywords_make_the_settings_that_the_class_makes(changes):
    assert Parser(MergeSettings).keywords({"pairs": "p", **changes}) == replace(MergeSettings(Path("p")), **changes)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"pairs": "p", "methd": "tuned"}, "did you mean method"),
        ({"method": "tuned"}, "pairs is missing"),
        ({"pairs": "p", "method": "tund"}, "method: 'tund' does not fit"),
        ({"pairs": "p", "seed": -1}, "seed: -1 does not fit"),
        ({"pairs": "p", "name": object()}, "object is no value of a setting"),
        ({"pairs": "no such folder"}, "no such folder"),
        ({"config": "no_such.yaml", "pairs": "p"}, "there is no file no_such.yaml"),
    ],
)
def test_mistakes_are_user_errors(options, said):
    with pytest.raises(dedpo.UserError, match=said):
        dedpo.merge(**options)


def test_settings_of_another_stage_or_both_ways_are_refused():
    with pytest.raises(dedpo.UserError, match=r"a MergeSettings is given, and it takes LabelSettings"):
        dedpo.label(MergeSettings(Path("p")))
    with pytest.raises(dedpo.UserError, match=r"settings are given, and seed too"):
        dedpo.merge(MergeSettings(Path("p")), seed=1)


# ---- the face itself


def test_there_is_a_function_for_every_stage():
    assert {*STAGES} - {"pairs"} | PAIRS == set(FACES)


@pytest.mark.parametrize("name", FACES)
def test_every_function_says_what_it_returns_and_raises(name):
    face = getattr(dedpo, name)
    words = inspect.getdoc(face) or ""
    assert "\n\nReturns:\n    " in words and "\n\nRaises:\n    UserError: " in words
    assert "return" in face.__annotations__ and len(words.splitlines()[0]) > 20


def test_the_package_imports_nothing_before_it_is_used():
    code = "import sys, dedpo_diffusion; print([name for name in sys.modules if name.startswith('dedpo_diffusion.') or name == 'torch'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ast.literal_eval(done.stdout) == []
