"""The study: its cells, its simulated people and judges, what it makes of results, and a very small one end to end."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from dedpo_diffusion.core.console import UserError
from dedpo_diffusion.evaluation.benchmarks import study
from dedpo_diffusion.evaluation.benchmarks.study import Block, StudySettings, cells
from dedpo_diffusion.evaluation.benchmarks.study_report import regimes, summarise, table
from dedpo_diffusion.evaluation.benchmarks.study_world import Pool, draw_sample, human_labels, judge_labels
from support.training import fresh_accelerate_state  # noqa: F401 - a fixture

CONFIGS = sorted((Path(__file__).parents[2] / "configs" / "study").glob("*.yaml"))


def pool(pairs: int = 600) -> Pool:
    """Random rewards and clutter, independent of each other."""
    rng = np.random.default_rng(0)
    ids = [str(k) for k in range(pairs)]
    return Pool(Path("nowhere"), ids, ids, rng.random((pairs, 2)), rng.random((pairs, 2)), rng.random(pairs))


def settings(*blocks: Block, **changes) -> StudySettings:
    return StudySettings(work=Path("work"), blocks=list(blocks), **changes)


# ---- cells


def test_what_ignores_a_judge_or_a_share_is_trained_once():
    found = cells(settings(Block(["base", "human", "human_100", "tuned"], judges=["clip", "coin"], shares=[0.1, 0.25], seeds=(0, 1))))
    count = {arm: sum(cell.arm == arm for cell in found) for arm in ("base", "human", "human_100", "tuned")}
    assert count == {"base": 1, "human": 4, "human_100": 2, "tuned": 8}
    assert len({cell.name for cell in found}) == len(found)


def test_a_cell_of_two_blocks_is_one_cell_and_keeps_its_name():
    block = Block(["tuned"], seeds=(0, 3))
    assert cells(settings(block, block)) == cells(settings(block))
    assert cells(settings(block))[0].name == cells(settings(block, steps=100))[0].name
    assert cells(settings(block))[0].name != cells(settings(block, steps=101))[0].name


def test_each_arm_has_its_own_learning_rate_unless_a_block_names_some():
    rates = {"other": 1e-3, "naive": 2e-3}
    found = cells(settings(Block(["tuned", "naive"], seeds=(0, 0)), learning_rates=rates))
    assert [(cell.arm, cell.learning_rate) for cell in found] == [("tuned", 1e-3), ("naive", 2e-3)]
    named = cells(settings(Block(["naive"], seeds=(0, 0), learning_rates=[3e-3, 4e-3]), learning_rates=rates))
    assert [cell.learning_rate for cell in named] == [3e-3, 4e-3]


@pytest.mark.parametrize(("block", "words"), [(Block(["tunned"]), "unknown arm 'tunned'"), (Block(["tuned"], judges=["vlm"]), "'vlm'")])
def test_unknown_names_are_refused(block, words):
    with pytest.raises(UserError, match=words):
        cells(settings(block))


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_every_config_of_the_study_is_one(config):
    from jsonargparse import ArgumentParser

    parser = ArgumentParser()
    parser.add_argument("--config", action="config")
    parser.add_class_arguments(StudySettings)
    given = vars(parser.instantiate_classes(parser.parse_args(["--config", str(config), "--work", "work"])))
    given.pop("config")
    assert len(cells(StudySettings(**given))) > 10


# ---- people and judges


def test_shares_are_nested_and_seeds_are_fresh():
    world = pool()
    one, again, other = (draw_sample(world, seed=seed, pairs=200, held_out=100, temperature=0.1) for seed in (3, 3, 4))
    assert all(np.array_equal(getattr(one, name), getattr(again, name)) for name in ("rows", "answer", "order"))
    assert not np.array_equal(one.rows, other.rows)
    assert one.rows.max() < 500 and len(set(one.rows)) == 200
    tenth, quarter = (~np.isnan(human_labels(one, share)) for share in (0.1, 0.25))
    assert tenth.sum() == 20 and quarter.sum() == 50 and (quarter | ~tenth).all()
    assert np.array_equal(human_labels(one, 1.0), one.answer)


@pytest.mark.parametrize(
    ("judge", "right"), [("perfect", 1.0), ("random-90", 0.9), ("random-80", 0.8), ("coin", 0.5), ("adversarial", 0.3)]
)
def test_a_random_judge_repeats_the_answer_as_often_as_its_name_says(judge, right):
    world = pool(3000)
    sample = draw_sample(world, seed=1, pairs=2000, held_out=100, temperature=0.1)
    found = np.mean(judge_labels(world, sample, judge, 1) == sample.answer)
    assert abs(found - right) <= 4 * np.sqrt(right * (1 - right) / 2000)


def test_the_biased_judge_is_right_on_four_in_five_and_errs_towards_clutter_alone():
    world = pool()
    sample = draw_sample(world, seed=2, pairs=400, held_out=100, temperature=0.1)
    labels = judge_labels(world, sample, "biased-80", 2)
    wrong = labels != sample.answer
    assert wrong.mean() == pytest.approx(0.2, abs=0.003)
    gap = world.clutter[sample.rows, 0] - world.clutter[sample.rows, 1]
    assert (labels[wrong] == (gap[wrong] > 0)).all()
    assert np.abs(gap[wrong]).min() >= np.abs(gap[labels != (gap > 0)]).max()  # where it sees less clutter it does not err


# ---- the report


def line(arm: str, seed: int, reward: float, **changes) -> dict:
    return {
        "arm": arm, "judge": "none" if arm in study.NO_JUDGE else "clip", "share": 0.25, "balance": "none", "sampling": "uniform",
        "learning_rate": 1e-3, "pairs": 160, "temperature": 0.05, "steps": 60, "timesteps": [0, 1000], "seed": seed,
        "reward": reward, "accuracy": reward,
        "power": 0.4, "effective_human_labels": 50.0, "judge_agreement": 0.7, "last_margin_abs_mean": 1.0,
    } | changes  # fmt: skip


def test_differences_are_paired_by_seed():
    """tuned minus human: 0.03, 0.05, 0.04 on seeds 0 to 2, mean 0.04; Student's half width 4.303 x 0.01 / sqrt 3 = 0.0248."""
    lines = [line("base", 0, 0.5)]
    lines += [line("human", seed, value) for seed, value in enumerate([0.60, 0.70, 0.65, 0.9])]
    lines += [line("tuned", seed, value) for seed, value in enumerate([0.63, 0.75, 0.69])]
    lines += [line("human", 0, 0.1, share=0.5)]
    rows = {(row["arm"], row["share"]): row for row in summarise(lines)}
    tuned = rows["tuned", 0.25]
    assert tuned["seeds"] == 3 and tuned["gain"]["mean"] == pytest.approx(0.19)
    assert tuned["reward_minus_human"]["mean"] == pytest.approx(0.04)
    assert tuned["reward_minus_human"]["ci"] == pytest.approx([0.0152, 0.0648], abs=1e-4)
    assert rows["human", 0.25]["reward_minus_human"] is None  # nothing is compared with itself
    assert rows["human", 0.5]["gain"] == {"mean": pytest.approx(-0.4), "ci": None}
    text = table(list(rows.values()))
    assert "| clip (70%) | 25% of 160 | 0.05 | tuned | 0.001 | 3 | +0.190" in text and "+0.040 (+0.015 to +0.065)" in text


def test_the_regime_compares_all_with_a_quarter_each_at_its_better_rate():
    """Means: human 0.6 at 1e-3 and 0.5 at 3e-3, human_100 0.7 and 0.8: 0.8 - 0.6, seed by seed 0.25 and 0.15."""
    rewards = {("human", 1e-3): [0.55, 0.65], ("human", 3e-3): [0.5, 0.5], ("human_100", 1e-3): [0.7, 0.7], ("human_100", 3e-3): [0.8, 0.8]}
    lines = [
        line(arm, seed, reward, learning_rate=rate, share=1.0 if arm == "human_100" else 0.25)
        for (arm, rate), values in rewards.items()
        for seed, reward in enumerate(values)
    ]
    assert "| 160 | 0.05 | 60 | 0 to 1000 | 2 | +0.200 (-0.435 to +0.835) |" in regimes(lines)  # 12.706 x 0.0707 / sqrt 2
    assert regimes(lines[:2]) == ""


# ---- end to end


@pytest.mark.slow
def test_a_very_small_study_runs_resumes_and_reports(tmp_path, capsys):
    config = tmp_path / "small.yaml"
    config.write_text(
        "pool: 16\nheld_out: 4\nimages: 4\npairs: 12\nsteps: 2\nbatch: 4\ndraws: 2\nblocks:\n"
        "  - arms: [base, human, human_100, tuned, tuned_follow, naive_dr_dpo]\n    shares: [0.5]\n    seeds: [0, 0]\n"
        "  - arms: [tuned]\n    judges: [self]\n    shares: [0.5]\n    seeds: [0, 0]\n"
        "  - arms: [tuned]\n    shares: [0.5]\n    seeds: [0, 0]\n    samplings: [stratified]\n    balances: [output]\n"
    )
    command = ["--config", str(config), "--work", str(tmp_path / "work"), "--report", str(tmp_path / "report"), "--least_seeds", "1"]
    assert study.main([*command, "--minutes", "0"]) == 0
    assert "8 cells are not done yet" in capsys.readouterr().out
    assert study.main(command) == 0
    found = pq.read_table(tmp_path / "report" / "results.parquet").to_pylist()
    assert len(found) == 8 and all(0 < row["reward"] < 1 for row in found)
    human, everyone = (next(row for row in found if row["arm"] == arm) for arm in ("human", "human_100"))
    assert human["effective_human_labels"] == 6 and everyone["effective_human_labels"] == 12
    summary = json.loads((tmp_path / "report" / "summary.json").read_text())
    assert len(summary["arms"]) == 7
    for name in ("table.md", "figure.png"):
        assert (tmp_path / "report" / name).stat().st_size > 500
    assert not list((tmp_path / "work" / "runs").iterdir()) and not list((tmp_path / "work" / "pool" / "targets").iterdir())
    before = {path.name: json.loads(path.read_text()) for path in (tmp_path / "work" / "cells").iterdir()}
    command[3] = str(tmp_path / "elsewhere")  # the report alone is enough to go on from
    capsys.readouterr()
    assert study.main(command) == 0
    assert "8 cells, 0 of them to do" in capsys.readouterr().out
    after = {path.name: json.loads(path.read_text()) for path in (tmp_path / "elsewhere" / "cells").iterdir()}
    plain = {name: {key: value for key, value in line.items() if value is not None} for name, line in before.items()}
    assert after == plain
