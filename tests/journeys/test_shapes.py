"""The real command, end to end, on the embedded world: small, but every stage and every file."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from dedpo_diffusion.core.defaults import DEFAULT_METHOD
from dedpo_diffusion.models.loading import resolve_model
from dedpo_diffusion.pipelines import quickstart

# what a user does with the exported file: no line of this project in it
PLAIN = """
import json, sys, torch
from diffusers import StableDiffusionPipeline
model, lora, jobs, out = sys.argv[1:]
pipe = StableDiffusionPipeline.from_pretrained(model, dtype=torch.float32)
pipe.load_lora_weights(lora)
jobs = json.loads(jobs)
generators = [torch.Generator("cpu").manual_seed(job["seed"]) for job in jobs]
images = pipe([job["prompt"] for job in jobs], generator=generators, num_inference_steps=12, guidance_scale=1.5).images
for job, image in zip(jobs, images):
    image.save(f"{out}/{job['file']}")
assert not any(name.startswith("dedpo") for name in sys.modules)
"""


SMALL = ["--pairs", "48", "--human_share", "0.25", "--steps", "6", "--strengths", "1", "2", "--eval_prompts", "16", "--eval_seeds", "1"]
ARMS = quickstart.arms(DEFAULT_METHOD)


@pytest.fixture(scope="module")
def journey(tmp_path_factory):
    out = tmp_path_factory.mktemp("journey") / "out"
    assert quickstart.main(["--out", str(out), *SMALL]) == 0
    return out


@pytest.mark.slow
def test_results_have_every_key(journey):
    results = json.loads((journey / "results.json").read_text())
    for arm in ("base", *ARMS):
        for name in ("oracle_reward", "gain_over_base", "win_rate_vs_base"):
            entry = results["arms"][arm][name]
            low, high = entry["ci"]
            assert low <= entry["mean"] <= high, (arm, name)
    assert results["arms"]["base"]["gain_over_base"]["mean"] == 0
    assert results["arms"]["base"]["win_rate_vs_base"]["mean"] == 0.5
    assert results["labels"]["n"] == 48
    assert results["labels"]["n_human"] == 12
    assert {"agreement", "power", "effective_human_labels"} <= set(results["labels"])
    stages = {"propose", "human", "label", "merge", "train", "export", "sample", "score", "compare", "total"}
    assert stages <= set(results["seconds"])
    assert results["n_images"] == 16
    assert results["default"] == DEFAULT_METHOD
    for arm in ARMS:
        assert results["arms"][arm]["best_strength"] in (1, 2)
        assert {"mean", "ci"} <= set(results["arms"][arm]["gain_at_best_strength"])
    assert set(results["default_minus"]) == set(ARMS) - {DEFAULT_METHOD}
    assert all({"mean", "ci"} <= set(entry) for entry in results["default_minus"].values())


def test_there_are_three_arms_whatever_the_default():
    assert quickstart.arms("tuned") == ["tuned", "human_only", "naive"]
    assert quickstart.arms("adapted") == ["adapted", "human_only", "naive"]
    assert quickstart.arms("naive") == ["naive", "human_only", "adapted"]


@pytest.mark.slow
def test_every_promised_file_is_there(journey):
    for name in ("report.html", "contact_sheet.png", "frontier.png", "aligned.safetensors", *(f"{arm}.safetensors" for arm in ARMS)):
        assert (journey / name).stat().st_size > 1000, name
    page = (journey / "report.html").read_text()
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert 'src="http' not in page


@pytest.mark.slow
def test_arms_share_prompt_and_seed(journey):
    columns = ["file", "prompt", "prompt_index", "seed"]
    tables = [
        pq.read_table(journey / "samples" / arm / "index.parquet", columns=columns)
        for arm in ("base", "human_only/strength-1", "naive/strength-2")
    ]
    assert tables[0].equals(tables[1])
    assert tables[0].equals(tables[2])


@pytest.mark.slow
def test_human_labels_are_a_quarter_and_the_judge_labels_all(journey):
    human, judge = (pq.read_table(journey / "data" / "labels" / f"{name}.parquet") for name in ("human", "pickscore"))
    assert (len(human), len(judge)) == (12, 48)
    assert set(human["label_0"].to_pylist()) <= {0.0, 1.0}


@pytest.mark.slow
def test_plain_diffusers_reproduces_the_images(journey, tmp_path):
    """In a process without this package; the batch differs, so float32 rounding may move a channel by a level or two."""
    folder = journey / "samples" / "naive" / "strength-1"
    jobs = pq.read_table(folder / "index.parquet").to_pylist()[:12]
    arguments = [resolve_model("shapes"), str(journey / "naive.safetensors"), json.dumps(jobs), str(tmp_path)]
    subprocess.run([sys.executable, "-c", PLAIN, *arguments], check=True, cwd=tmp_path)
    for job in jobs:
        ours, theirs = (np.asarray(Image.open(place / job["file"])).astype(int) for place in (folder, tmp_path))
        assert np.abs(ours - theirs).max() <= 2, job
        assert np.abs(ours - theirs).mean() < 0.1, job


@pytest.mark.slow
def test_the_same_command_again_repeats_nothing(journey, capsys):
    before = {file: file.stat().st_mtime_ns for file in journey.rglob("*.png") if file.name != "contact_sheet.png"}
    assert quickstart.main(["--out", str(journey), *SMALL]) == 0
    assert before == {file: file.stat().st_mtime_ns for file in before}
    assert "$ dedpo" not in capsys.readouterr().out


@pytest.mark.slow
def test_other_settings_in_the_same_folder_are_refused(journey, capsys):
    assert quickstart.main(["--out", str(journey), "--pairs", "50"]) == 2
    assert "limit is 48 there, 50 now" in capsys.readouterr().err
