"""What the tests of several processes share: training commands run one after another by the same processes, over gloo on the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "BasicTransformerBlock,ResnetBlock2D",
}  # what `accelerate launch` makes of configs/accelerate/fsdp2.yaml


def launch(processes: int, job: Path) -> list[str]:
    """The command that runs this file on a job."""
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes), __file__, str(job)]


def write_job(folder: Path, runs: list[dict], *, visits: bool = False) -> Path:
    """A job: runs with "arguments" and, if need be, "env"; `visits` writes each process's to FOLDER/visits-RANK.json:
    visit, place and timestep."""
    job = folder / "job.json"
    job.write_text(json.dumps({"runs": runs, "visits": str(folder) if visits else None}))
    return job


def together(processes: int, folder: Path, runs: list[dict], *, visits: bool = False) -> subprocess.CompletedProcess:
    """Do all runs."""
    return subprocess.run(launch(processes, write_job(folder, runs, visits=visits)), capture_output=True, text=True, timeout=400)


def main() -> int:
    """Do the job as one of its processes."""
    job = json.loads(Path(sys.argv[1]).read_text())
    from accelerate.state import AcceleratorState, GradientState, PartialState

    from dedpo_diffusion.pipelines import train
    from dedpo_diffusion.training.data import PairLoader

    destroy, PartialState.destroy_process_group = PartialState.destroy_process_group, lambda self, group=None: None  # the next run's too
    seen: list[list[tuple[int, int, int]]] = []
    load = PairLoader.load

    def noting(self, first_visit, draws):
        loaded = load(self, first_visit, draws)
        timesteps = loaded.draws.timesteps.tolist()
        places = loaded.places[:: len(loaded.places) // len(timesteps)]  # of a group, its first pair's
        seen[-1] += zip(range(first_visit, first_visit + len(timesteps)), places, timesteps, strict=True)
        return loaded

    PairLoader.load = noting
    for run in job["runs"]:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        for name in FSDP:
            os.environ.pop(name, None)
        os.environ.update(run.get("env", {}))
        seen.append([])
        if code := train.main(run["arguments"]):
            return code
    if job["visits"]:
        (Path(job["visits"]) / f"visits-{os.environ['RANK']}.json").write_text(json.dumps(seen))
    destroy(PartialState())  # threads of a group that outlives Python's end may abort the process
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
