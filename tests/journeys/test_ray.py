"""The engine past one machine: a Ray cluster leaves the files of one process, whatever it loses."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from importlib.util import find_spec

import pytest

from dedpo_diffusion.evaluation import score
from dedpo_diffusion.pipelines import label

RAY = pytest.mark.skipif(find_spec("ray") is None, reason='Ray is not here; pip install "dedpo_diffusion[ray]"')
NAMES = ("label", "sample", "score", "propose", "validate")
LOSABLE = NAMES[:4]


@pytest.fixture(scope="module")
def nodes():
    from support.ray_cluster import TwoNodes

    both = TwoNodes()
    yield both
    both.close()


@pytest.fixture(scope="module")
def journeys(tiny_model, tmp_path_factory):
    from support.ray_cluster import stages

    root = tmp_path_factory.mktemp("ray")
    (root / "prompts.txt").write_text("a small red circle\na large cross\n")
    return stages(root, tiny_model, root / "prompts.txt")


@pytest.fixture(scope="module")
def whole(journeys):
    """What one process leaves of each stage."""
    found = {}
    for name, stage in journeys.items():
        assert stage.run() == 0
        found[name] = stage.files()
        stage.clear()
    return found


@pytest.fixture
def each_part_is_saved(monkeypatch):
    monkeypatch.setattr(score, "SAVE_EVERY", -1.0)


# ---- with Ray


@RAY
@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_two_nodes_leave_the_files_of_one_process(name, journeys, whole, nodes, capfd):
    nodes.complete()
    stage = journeys[name]
    assert stage.run(*nodes.options) == 0
    assert "Ray: 2 nodes with 2 CPU cores and no GPUs" in capfd.readouterr().out
    assert stage.files() == whole[name]
    stage.clear()


@RAY
@pytest.mark.slow
@pytest.mark.parametrize("name", LOSABLE)
def test_a_lost_node_leaves_the_same_files(name, journeys, whole, nodes, each_part_is_saved):
    from support.ray_cluster import run_and_lose

    nodes.complete()
    stage = journeys[name]
    code, done = run_and_lose(stage, nodes, after=4)
    assert code == 0
    assert 4 <= done < 20, "it was lost in the middle"
    assert stage.files() == whole[name]
    stage.clear()


@RAY
@pytest.mark.slow
def test_a_killed_command_goes_on_and_does_nothing_twice(journeys, whole, nodes):
    nodes.complete()
    stage = journeys["label"]
    command = [sys.executable, "-m", "dedpo_diffusion.pipelines.label", *stage.arguments, *nodes.options]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and stage.done() < 4:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    time.sleep(2)  # its workers end with it
    parts = {path: path.stat().st_mtime_ns for path in stage.folder.glob(".oracle_reward.parts/shard-*.parquet")}
    assert 4 <= len(parts) < 30
    again = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    kept = True
    while again.poll() is None and kept:  # until all are joined and removed
        try:
            kept = all(path.stat().st_mtime_ns == time_ns for path, time_ns in parts.items())
        except FileNotFoundError:
            break
        time.sleep(0.05)
    said = again.communicate()[0]
    assert kept and again.returncode == 0 and f"{8 * len(parts)} of 240 pairs are labelled already; going on" in said
    assert stage.files() == whole["label"]
    stage.clear()


@RAY
@pytest.mark.slow
def test_a_task_that_kills_every_worker_is_told_of(nodes):
    from dedpo_diffusion.core.console import UserError
    from dedpo_diffusion.core.engine import open_engine
    from dedpo_diffusion.settings import RaySettings

    nodes.complete()
    with open_engine("ray", RaySettings(nodes.cluster.address)) as engine:
        crew = engine.crew(os.getpid)
        assert sorted(crew.run(["a", "b"], lambda _: str.upper)) == [(0, "A"), (1, "B")]
        with pytest.raises(UserError, match="3 workers died while they had die in hand"):
            list(crew.run(["live", "die"], lambda _: lambda task: os._exit(1) if task == "die" else task))


@RAY
@pytest.mark.slow
def test_mistakes_are_told_in_a_line(journeys, nodes, capfd, tmp_path):
    nodes.complete()
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        nowhere = f"127.0.0.1:{unused.getsockname()[1]}"
    stage = journeys["label"]
    for more, words in (
        (["--ray.address", nowhere], f"the Ray cluster at {nowhere} is not reached"),
        (["--ray.address", nodes.cluster.address, "--ray.cpus", "64"], "no node of the Ray cluster has 64 CPU cores"),
        (["--ray.address", nodes.cluster.address, "--device", "cuda"], "no node of the Ray cluster has a GPU"),
        (["--ray.address", nodes.cluster.address, "--device", "cuda:1"], "is one of this machine's"),
        (["--ray.address", nodes.cluster.address, "--with", "pickscore=nowhere"], "nowhere"),
        (["--ray.workers", "0"], "--ray.workers is 0; it must be at least 1"),
    ):
        assert stage.run("--engine", "ray", *more) == 2
        assert words in capfd.readouterr().err
    assert not list(stage.folder.glob("*.parquet"))
    stage.clear()


# ---- without


@pytest.mark.slow
def test_the_plain_install_never_imports_ray(tiny_pairs, tmp_path):
    code = (
        "import sys\nfrom dedpo_diffusion.pipelines import STAGES, main\nimport importlib\n"
        "for module, _ in STAGES.values():\n    importlib.import_module(f'dedpo_diffusion.{module}')\n"
        f"assert main(['validate', {str(tiny_pairs)!r}, '--out', {str(tmp_path / 'v.json')!r}, '--workers', '1']) == 0\n"
        "assert 'ray' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_without_ray_it_says_what_to_install(tiny_pairs, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ray", None)  # an import of it fails
    assert label.main([str(tiny_pairs), "--with", "oracle_reward", "--engine", "ray"]) == 2
    assert capsys.readouterr().err.count('pip install "dedpo_diffusion[ray]"') == 1


def test_a_cluster_is_for_the_engine_ray(tiny_pairs, capsys):
    assert label.main([str(tiny_pairs), "--with", "oracle_reward", "--ray.address", "127.0.0.1:1"]) == 2
    assert "--ray.address and --ray.workers are for --engine ray" in capsys.readouterr().err
