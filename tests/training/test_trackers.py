"""`dedpo train --tracker`: each tracker's own reader finds the settings, curves, grids and the label report; none of them can end a run."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from dedpo_diffusion.pipelines import train
from support.training import arguments, deviation, final, fresh_accelerate_state, metrics, stop_after  # noqa: F401 - one is a fixture

NAMES = ("wandb", "mlflow", "trackio")
STEPS = [1, 3, 4, 6, 8, 9, 12]  # of the lines of metrics, at log_every=4 and checkpoint_every=3
REPORT = {"method": "naive", "power": 0.25, "bias": {"value": -0.125}, "rows": [1, 2]}


def closed_port() -> int:
    """A port of this machine where nobody listens."""
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.fixture
def places(tmp_path, monkeypatch):
    """Every tracker writes below one folder and talks to nobody."""
    return set_places(tmp_path / "trackers", monkeypatch)


def set_places(root: Path, patch: pytest.MonkeyPatch) -> Path:
    root.mkdir()
    for name in ("MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_NAME", "WANDB_DIR", "WANDB_PROJECT", "WANDB_API_KEY", "TRACKIO_PROJECT"):
        patch.delenv(name, raising=False)
    patch.setenv("HOME", str(root))  # where a key would be kept
    patch.setenv("WANDB_MODE", "offline")
    patch.setenv("WANDB_SILENT", "true")
    patch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{closed_port()}")
    patch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    patch.setenv("MLFLOW_TRACKING_URI", (root / "mlruns").as_uri())
    patch.setenv("TRACKIO_DIR", str(root / "trackio"))
    return root


@pytest.fixture(scope="module")
def pairs_with_report(tiny_pairs, tmp_path_factory) -> Path:
    pairs = tmp_path_factory.mktemp("reported") / "data"
    shutil.copytree(tiny_pairs, pairs)
    (pairs / "targets" / "soft.json").write_text(json.dumps(REPORT))
    return pairs


@pytest.fixture(scope="module")
def tracked(tiny_model, pairs_with_report, tmp_path_factory):
    """A run with every tracker that is installed, stopped after step 6 and resumed: the run folder, and where the trackers write."""
    root, here = tmp_path_factory.mktemp("tracked"), [name for name in NAMES if find_spec(name) is not None]
    (root / "prompts.txt").write_text("a large red circle on a white background\na small blue square on a black background\n")
    given = {
        "log_every": 4, "tracker": json.dumps(["tensorboard", *here]), "tracker_project": "colours", "validation.every": 8,
        "validation.prompts": root / "prompts.txt", "validation.steps": 2, "validation.scorers": '["oracle_reward"]',
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        places = set_places(root / "trackers", patch)
        command = arguments(tiny_model, pairs_with_report, root / "run", **given)
        stop_after(patch, 6)
        assert train.main(command) == 130
        assert train.main(command) == 0
        yield root / "run", places


@pytest.mark.slow
def test_the_run_is_the_same_to_the_bit_without(tracked, tiny_model, pairs_with_report, tmp_path):
    assert train.main(arguments(tiny_model, pairs_with_report, tmp_path / "run", log_every=4, tracker="none")) == 0
    assert deviation(final(tracked[0]), final(tmp_path / "run")) == (0, 0)
    assert metrics(tracked[0]) == metrics(tmp_path / "run")
    assert not (tmp_path / "run" / "tensorboard").exists() and (tracked[0] / "tensorboard").is_dir()
    assert not (tmp_path / "run" / "trackers.json").exists()


def check_curve(found: dict[int, float], run: Path, name: str = "loss") -> None:
    """Every step's number, as metrics.jsonl has it."""
    assert sorted(found) == STEPS
    for line in metrics(run):
        assert found[line["step"]] == pytest.approx(line[name], rel=1e-12)


@pytest.mark.slow
def test_wandb_has_it_all(tracked):
    """In the records that `wandb sync` sends, as wandb's own messages decode them."""
    pytest.importorskip("wandb", reason="wandb is not installed")
    from support.wandb_files import records

    run, _ = tracked
    config, curve, files, artifacts, codes, ids = {}, {}, [], [], [], set()
    for file in sorted(run.glob("wandb/offline-run-*/*.wandb")):
        for record in records(file):
            items = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
            values = {name: json.loads(value) for name, value in items.items()}
            if "loss" in values:
                curve[values["step"]] = values["loss"]
            if "samples/path" in values:
                files.append((values["step"], file.parent / "files" / values["samples/path"]))
            config |= {item.key: json.loads(item.value_json) for item in record.config.update if item.key}
            ids |= {record.run.run_id} - {""}
            assert record.run.project in ("", "colours")
            artifacts += [record.artifact.type] if record.artifact.type else []
            codes += [record.exit.exit_code] if record.HasField("exit") else []
    assert len(ids) == 1 and ids == {json.loads((run / "trackers.json").read_text())["wandb"]}
    check_curve(curve, run)
    assert config["optim.learning_rate"] == 0.003 and config["label_report.bias.value"] == -0.125
    assert {step for step, _ in files} == {0, 8, 12} and all(path.is_file() for _, path in files)
    assert "label_report" in artifacts and codes == [1, 0]


@pytest.mark.slow
def test_mlflow_has_it_all(tracked):
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed")
    run, places = tracked
    client = mlflow.MlflowClient(tracking_uri=(places / "mlruns").as_uri())
    (found,) = client.search_runs([client.get_experiment_by_name("colours").experiment_id])
    assert found.info.run_id == json.loads((run / "trackers.json").read_text())["mlflow"]
    assert found.info.status == "FINISHED" and found.info.run_name == "run"
    check_curve({point.step: point.value for point in client.get_metric_history(found.info.run_id, "loss")}, run)
    sampled = client.get_metric_history(found.info.run_id, "validation/scores/oracle_reward/mean")
    assert [point.step for point in sampled] == [8, 12]
    assert found.data.params["optim.learning_rate"] == "0.003" and found.data.params["label_report.power"] == "0.25"
    images = [file.path for file in client.list_artifacts(found.info.run_id, "images") if file.path.endswith(".png")]
    assert sorted(int(path.split("+")[2]) for path in images) == [0, 8, 12]
    report = client.download_artifacts(found.info.run_id, "label_report/soft.json", str(places))
    assert json.loads(Path(report).read_text()) == REPORT


@pytest.mark.slow
def test_trackio_has_it_all(tracked):
    trackio = pytest.importorskip("trackio", reason="trackio is not installed")
    from trackio.sqlite_storage import SQLiteStorage

    run, places = tracked
    (found,) = trackio.Api().runs("colours")
    assert found.name == json.loads((run / "trackers.json").read_text())["trackio"] and found.name.startswith("run-")
    assert found.config["optim.learning_rate"] == 0.003 and found.config["label_report.method"] == "naive"
    lines = SQLiteStorage.get_logs("colours", found.name)
    check_curve({line["step"]: line["loss"] for line in lines if "loss" in line}, run)
    images = {line["step"]: line["samples"]["file_path"] for line in lines if "samples" in line}
    assert sorted(images) == [0, 8, 12] and all((places / "trackio" / "media" / path).is_file() for path in images.values())
    held = [file for file in (places / "trackio" / "artifacts").rglob("*") if file.is_file()]
    assert any(file.read_bytes() == json.dumps(REPORT).encode() for file in held)


@pytest.mark.slow
def test_tensorboard_has_the_curve(tracked):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tracked[0] / "tensorboard"))
    events.Reload()
    found = {point.step: point.value for point in events.Scalars("loss")}
    assert sorted(found) == STEPS
    for line in metrics(tracked[0]):
        assert found[line["step"]] == pytest.approx(line["loss"], rel=1e-6)  # float32 there


# ---- trackers that fail


def warnings_of(text: str, name: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith(f"Warning: tracker {name}:")]


def broken(name: str, places: Path) -> dict[str, str]:
    """No login; no server; a file where the folder should be."""
    (places / "occupied").write_text("a file")
    return {
        "wandb": {"WANDB_MODE": "online"},
        "mlflow": {"MLFLOW_TRACKING_URI": f"http://127.0.0.1:{closed_port()}"},
        "trackio": {"TRACKIO_DIR": str(places / "occupied")},
    }[name]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_one_that_cannot_begin_is_told_once_and_the_run_is_whole(name, tiny_model, tiny_pairs, tmp_path, places):
    """In a process of its own, since the packages read their variables once."""
    pytest.importorskip(name, reason=f"{name} is not installed")
    command = [sys.executable, str(Path(train.__file__)), *arguments(tiny_model, tiny_pairs, tmp_path / "run", tracker=name)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **broken(name, places)})
    assert done.returncode == 0, done.stderr
    told = warnings_of(done.stdout, name)
    assert len(told) == 1 and "Training goes on" in told[0], done.stdout
    assert len(metrics(tmp_path / "run")) == 12
    assert name == "trackio" or not (tmp_path / "run" / "trackers.json").exists()  # trackio tries its folder at the first point alone


@pytest.mark.slow
def test_one_that_breaks_in_mid_run_is_told_once_and_counted(tiny_model, tiny_pairs, tmp_path, places, capfd, monkeypatch):
    pytest.importorskip("mlflow", reason="mlflow is not installed")
    real = train.save

    def save_and_lose_the_store(session, now):
        real(session, now)
        shutil.rmtree(places / "mlruns", ignore_errors=True)
        (places / "mlruns").write_text("a file where the folder was")

    monkeypatch.setattr(train, "save", lambda session, now: save_and_lose_the_store(session, now) if now == 6 else real(session, now))
    assert train.main(arguments(tiny_model, tiny_pairs, tmp_path / "run", tracker="mlflow")) == 0
    out = capfd.readouterr().out
    assert len(warnings_of(out, "mlflow")) == 1, out
    assert "tracker mlflow: 7 entries did not reach it" in out  # the lines of steps 7 to 12, and the end
    assert len(metrics(tmp_path / "run")) == 12


# ---- before anything is claimed


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ('["wandb", "wandb"]', "named twice"),
        ('["none", "tensorboard"]', "none goes with no other"),
        ("[]", "--tracker none"),
        ("comet", "one of tensorboard"),
    ],
)
def test_names_that_cannot_be_meant_are_refused(given, said, tiny_model, tiny_pairs, tmp_path, capsys):
    assert train.main(arguments(tiny_model, tiny_pairs, tmp_path / "run", tracker=given)) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("smoke", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_one_that_is_not_installed_says_what_to_install(name, smoke, tiny_model, tiny_pairs, tmp_path, capsys, monkeypatch):
    """In a path without it; a folder of that name in the way, as wandb leaves one, is no package."""
    from dedpo_diffusion.training import trackers

    (tmp_path / name).mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path), *(part for part in sys.path if not has_tracker(part))])
    monkeypatch.setattr(sys, "modules", {key: value for key, value in sys.modules.items() if key.partition(".")[0] not in NAMES})
    assert find_spec(name) is not None and not trackers._installed(name)
    more = {"smoke": "sd15"} if smoke else {}
    assert train.main(arguments(tiny_model, tiny_pairs, tmp_path / "run", tracker=name, **more)) == 2
    assert f"pip install {name}" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def has_tracker(folder: str) -> bool:
    return any((Path(folder) / name / "__init__.py").is_file() for name in NAMES)


@pytest.mark.slow
def test_a_plain_run_imports_no_tracker(tiny_model, tiny_pairs, tmp_path):
    code = (
        "import sys\nfrom dedpo_diffusion.pipelines import train\n"
        "assert train.main(sys.argv[1:]) == 0\n"
        f"found = {set(NAMES)!r} & set(sys.modules)\nassert not found, found\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments(tiny_model, tiny_pairs, tmp_path / "run")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
