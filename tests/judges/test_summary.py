"""From label files on disk to a table, a JSON and a picture for each judge."""

from __future__ import annotations

import io
import json
import shutil

import numpy as np
import pytest
from PIL import Image
from scipy.special import expit

from dedpo_diffusion.core.console import UserError
from dedpo_diffusion.core.files import file_digest
from dedpo_diffusion.core.records import Labels, Pair
from dedpo_diffusion.judges.summary import summarise
from dedpo_diffusion.labels.files import read_labels, write_labels
from dedpo_diffusion.labels.image_statistics import image_statistics
from dedpo_diffusion.pairs.dataset import PairWriter
from dedpo_diffusion.shapes import oracle
from support.scenes import scenes

COUNT = 170


def encoded(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def pairs(made, tmp_path):
    """A pair dataset with human labels of 160 pairs, a judge that is good but for its love of light, and a hard one."""
    return shutil.copytree(made, tmp_path / "pairs")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    tmp_path, rng = tmp_path_factory.mktemp("summary"), np.random.default_rng(0)
    prompts, images = scenes(COUNT, 7)
    with PairWriter(tmp_path / "pairs", shard_pairs=40) as writer:
        for k, (prompt, (one, other)) in enumerate(zip(prompts, images, strict=True)):
            source = {"model": ("sd15", "sdxl")[k % 2], "row": k, "constant": 1, "seed": k % 40}
            writer.add(Pair(f"p{k}", prompt, encoded(one), encoded(other), source))
    rewards = np.stack([oracle.reward(prompts, [two[side] for two in images]) for side in (0, 1)], axis=1)
    truth = expit((rewards[:, 0] - rewards[:, 1]) / oracle.TEMPERATURE)
    folder, ids = tmp_path / "pairs", [f"p{k}" for k in range(COUNT)]
    write_labels(folder, "human", Labels(ids[:160], (rng.random(160) < truth[:160]).astype(float)))
    light = np.array([[image_statistics(image)["brightness"] for image in two] for two in images])
    scores = rewards / oracle.TEMPERATURE + 40 * light
    extra = {"score_0": scores[:, 0].tolist(), "score_1": scores[:, 1].tolist(), "judge_version": ["light-1"] * COUNT}
    extra |= {"order_consistent": [k % 10 > 0 for k in range(COUNT)], "validity": [0.9] * COUNT}
    write_labels(folder, "light", Labels(ids, expit(scores[:, 0] - scores[:, 1]), extra))
    write_labels(folder, "hard", Labels(ids[5:], (truth[5:] > 0.5).astype(float)))
    return folder


def test_each_judge_gets_a_json_and_a_picture(pairs, capsys):
    found = summarise(pairs, ["light", "hard"], human="human", resamples=100, extra={"light": {"tokens": 7}})
    said = capsys.readouterr().out
    for name in ("light", "hard"):
        assert json.loads((pairs / "labels" / f"{name}.json").read_text()) == found[name]
        with Image.open(pairs / "labels" / f"{name}.png") as picture:
            assert picture.size == (1400, 900)
        assert name in said and found[name]["name"] == name
    light, hard = found["light"], found["hard"]
    assert light["pairs"] == {"all": 170, "labelled": 160, "looked_at": 160, "unanswered": 0, "seed": 0}
    assert (light["n"], light["judge_version"], light["tokens"]) == (160, "light-1", 7) and light["validity"] == pytest.approx(0.9)
    assert light["order_consistency"]["value"] == 0.9 and light["leans"][0]["statistic"] == "brightness" and light["leans"][0]["named"]
    assert set(light["by_group"]) == {"model"}  # row and seed have too many values, constant only one
    assert light["human"] == {"file": "labels/human.parquet", "sha256": file_digest(pairs / "labels" / "human.parquet")}
    assert hard["pairs"]["unanswered"] == 5 and hard["n"] == 155 and "no answer to 5" in said
    assert hard["order_consistency"]["value"] is None and hard["judge_version"] is None
    assert "brighter image" in said and "AUC" in said
    assert not list((pairs / "labels").glob(".*"))


@pytest.mark.slow
def test_more_pairs_than_wanted_are_drawn_at_random_by_seed(pairs, capsys):
    few = summarise(pairs, ["light"], human="human", most=30, resamples=20)["light"]
    assert few["n"] == 30 and few["pairs"]["looked_at"] == 30 and few["pairs"]["labelled"] == 160
    assert "160 pairs are labelled; judges are compared with people on 30 of them" in capsys.readouterr().out
    assert summarise(pairs, ["light"], human="human", most=30, resamples=20)["light"] == few
    assert summarise(pairs, ["light"], human="human", most=30, resamples=20, seed=1)["light"]["auc"] != few["auc"]


def test_too_few_labels_make_no_summary(pairs, capsys):
    assert summarise(pairs, ["light"], human="people") == {}
    write_labels(pairs, "few", Labels(["p0", "p1"], np.array([0.0, 1.0])))
    assert summarise(pairs, ["light"], human="few") == {}
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and all("dedpo vote" in line for line in lines) and "holds 2 labels" in lines[1]
    assert summarise(pairs, ["few", "human"], human="human") == {}
    assert "no summary of few: it shares 2 pairs with human" in capsys.readouterr().out
    assert not (pairs / "labels" / "few.json").exists()


def test_no_older_report_stays_beside_labels_that_cannot_be_summarised(pairs):
    labels = pairs / "labels"

    def there():
        return sorted(path.name for path in labels.iterdir() if path.suffix in (".json", ".png"))

    summarise(pairs, ["light", "hard"], human="human", most=30, resamples=5)
    assert there() == ["hard.json", "hard.png", "light.json", "light.png"]
    write_labels(pairs, "light", Labels(["p0", "p1"], np.array([0.0, 1.0])))
    assert set(summarise(pairs, ["light", "hard"], human="human", most=30, resamples=5)) == {"hard"}
    assert there() == ["hard.json", "hard.png"]
    write_labels(pairs, "human", Labels(["p0", "p1"], np.array([0.0, 1.0])))
    assert summarise(pairs, ["light"], human="human") == {}
    assert there() == ["hard.json", "hard.png"]  # it was not asked about
    assert summarise(pairs, ["hard"], human="human") == {}
    assert there() == []


def test_what_the_labels_took_to_make_is_kept_while_they_are_the_same(pairs):
    told = {"pairs_per_second": 5.0, "waiting_share": 0.1, "prompt_tokens": 70, "answer_tokens": 10, "cost": None}
    first = summarise(pairs, ["light"], human="human", most=19, resamples=5, extra={"light": told})["light"]
    again = summarise(pairs, ["light"], human="human", most=19, resamples=5, extra={"light": {"prompt_tokens": 71}})["light"]
    assert first["by_group"] == {}  # even two values are too many for 19 pairs
    assert again == first | {"prompt_tokens": 71} and again["pairs_per_second"] == 5.0
    labels = read_labels(pairs, "light")
    labels.extra["judge_version"] = ["light-2"] * COUNT
    write_labels(pairs, "light", labels)
    assert not set(told) & set(summarise(pairs, ["light"], human="human", most=19, resamples=5)["light"])


def test_pairs_not_labelled_at_random_are_said_to_be(pairs, capsys):
    ids = [f"p{k}" for k in range(40)]
    write_labels(pairs, "chosen", Labels(ids, np.arange(40) % 2 * 1.0, {"propensity": [0.5] * 40}))
    assert summarise(pairs, ["hard"], human="chosen", resamples=20)["hard"]["propensities"]
    assert "labelled pairs, which were not drawn at random" in capsys.readouterr().out


def test_a_missing_judge_is_named(pairs):
    with pytest.raises(UserError, match="no-one"):
        summarise(pairs, ["no-one"], human="human")
