"""The study: its cells, its simulated people and judges, what it makes of results, and a very small one end to end."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from dedpo_diffusion.core.console import UserError
from dedpo_diffusion.core.parser import Parser
from dedpo_diffusion.debias import merge_labels
from dedpo_diffusion.evaluation.benchmarks import study, teaching
from dedpo_diffusion.evaluation.benchmarks.study import Block, Cell, StudySettings, cells, run_name
from dedpo_diffusion.evaluation.benchmarks.study_report import (
    at_best,
    by_step,
    choose_default,
    recovered,
    regrets,
    steps_table,
    summarise,
    tables,
)
from dedpo_diffusion.evaluation.benchmarks.study_world import (
    JUDGES,
    METHODS,
    Pool,
    draw_sample,
    judge_answers_of,
    merged_targets,
    people_agreement,
    temperature_at,
)
from dedpo_diffusion.labels import adaptation
from dedpo_diffusion.labels.adaptation import Group
from support.training import fresh_accelerate_state  # noqa: F401 - a fixture

CONFIG = Path(__file__).parents[2] / "configs" / "study" / "main.yaml"


def pool(pairs: int = 600) -> Pool:
    """Random rewards, clutter and scores, independent of each other; the first statistic tells the rewards apart."""
    rng = np.random.default_rng(0)
    ids, reward, clutter, score = [str(k) for k in range(pairs)], rng.random((pairs, 2)), rng.random((pairs, 2)), rng.normal(size=pairs)
    clip = np.stack([1 / (1 + np.exp(-score)), score], axis=1)
    statistics = np.stack([reward[:, 0] - reward[:, 1], rng.normal(size=pairs)], axis=1)
    return Pool(Path("nowhere"), ids, ids, reward, clutter, clip, Group("statistics", ["good", "noise"], statistics))


def settings(*blocks: Block, **changes) -> StudySettings:
    return StudySettings(work=Path("work"), blocks=list(blocks), **changes)


def test_what_ignores_a_judge_or_a_share_is_trained_once():
    arms = ["human_only", "human_100", "judge_only", "tuned"]
    found = cells(settings(Block(arms, judges=["clip", "coin"], shares=[0.05, 0.25], seeds=(0, 1))))
    count = {arm: sum(cell.arm == arm for cell in found) for arm in ["base", *arms]}
    assert count == {"base": 1, "human_only": 4, "human_100": 2, "judge_only": 4, "tuned": 8}
    assert found[0].arm == "base" and len({cell.name for cell in found}) == len(found)


def test_a_cell_of_two_blocks_is_one_cell_and_its_name_is_of_all_that_makes_it():
    block = Block(["tuned"], seeds=(0, 3))
    assert cells(settings(block, block)) == cells(settings(block))
    assert cells(settings(block))[1].name == cells(settings(block, steps=150, minutes=1.0))[1].name
    names = {cells(settings(block, **change))[1].name for change in ({}, {"steps": 151}, {"strengths": (1.0, 2.0)}, {"draws": 8})}
    assert len(names) == 4


@pytest.mark.parametrize(
    ("block", "words"),
    [(Block(["tunned"]), "'tunned'"), (Block(judges=["vlm"]), "'vlm'"), (Block(people=["x"]), "'x'"), (Block(shares=[0.0]), "shares")],
)
def test_what_is_unknown_is_refused(block, words):
    with pytest.raises(UserError, match=words):
        cells(settings(block))


def test_the_config_does_its_main_cells_first_and_one_seed_of_the_whole_table_before_a_second():
    found = cells(Parser(StudySettings).parse(["--config", str(CONFIG), "--work", "work"]))[1:]
    assert {cell.seed for cell in found} == set(range(20, 30)), "fresh: no method was chosen by them"
    main, table = found[:40], found[:40] + found[40 : 40 + 10 + 28 + 66]
    assert {(cell.arm, cell.judge, cell.seed) for cell in main} == {
        (arm, "none" if arm.startswith("human") else "clip", seed)
        for arm in ("human_only", "human_100", "naive", "adapted")
        for seed in range(20, 30)
    }
    first = [cell for cell in table if cell.seed == 20 and cell.arm != "human_100"]
    taking = {(cell.arm, cell.judge, cell.share) for cell in first if cell.arm != "human_only"}
    assert taking == {(arm, judge, share) for arm in METHODS[1:] for judge in JUDGES for share in (0.01, 0.05, 0.25)}
    assert {cell.share for cell in first if cell.arm == "human_only"} == {0.01, 0.05, 0.25}


@pytest.mark.parametrize("agreement", [0.55, 0.7, 0.9])
def test_the_temperature_found_makes_people_agree_so_often(agreement):
    reward = pool().reward
    found = temperature_at(reward, agreement)
    assert people_agreement(reward, found) == pytest.approx(agreement, abs=1e-6)
    rng = np.random.default_rng(1)
    p = 1 / (1 + np.exp(-(reward[:, 0] - reward[:, 1]) / found))
    alike = np.mean((rng.random((2000, 600)) < p) == (rng.random((2000, 600)) < p))
    assert alike == pytest.approx(agreement, abs=0.003)


def test_people_cannot_agree_less_often_than_by_chance():
    with pytest.raises(UserError, match="cannot agree on 40"):
        temperature_at(pool().reward, 0.4)


def test_shares_are_nested_and_people_of_both_kinds_are_asked_the_same():
    one, again, other, noisy = (
        draw_sample(pool(), seed=seed, pairs=200, people=people)
        for seed, people in [(3, "quickstart")] * 2 + [(4, "quickstart"), (3, "noisy")]
    )
    assert all(np.array_equal(getattr(one, name), getattr(again, name)) for name in ("rows", "answer", "order"))
    assert not np.array_equal(one.rows, other.rows) and len(set(one.rows)) == 200
    assert np.array_equal(one.rows, noisy.rows) and np.array_equal(one.order, noisy.order) and not np.array_equal(one.answer, noisy.answer)
    tenth, quarter = (~np.isnan(one.human(share)) for share in (0.1, 0.25))
    assert tenth.sum() == 20 and quarter.sum() == 50 and (quarter | ~tenth).all() and np.array_equal(one.human(1.0), one.answer)


@pytest.mark.parametrize(
    ("judge", "right"), [("perfect", 1.0), ("random-90", 0.9), ("coin", 0.5), ("adversarial", 0.3), ("biased-80", 0.8)]
)
def test_a_judge_repeats_the_answer_as_often_as_its_name_says(judge, right):
    world = pool(3000)
    sample = draw_sample(world, seed=1, pairs=2000, people="quickstart")
    labels, difference = judge_answers_of(world, sample, judge, 1)
    assert abs(np.mean(labels == sample.answer) - right) <= 4 * np.sqrt(right * (1 - right) / 2000)
    assert ((difference > 0) == (labels == 1)).all()
    if judge == "biased-80":
        wrong, gap = labels != sample.answer, world.clutter[sample.rows, 0] - world.clutter[sample.rows, 1]
        assert (labels[wrong] == (gap[wrong] > 0)).all()


def test_a_judge_of_clutter_prefers_the_cleaner_image_and_knows_no_prompt():
    world = pool()
    sample = draw_sample(world, seed=1, pairs=400, people="quickstart")
    labels, difference = judge_answers_of(world, sample, "clean", 1)
    cleaner = world.clutter[sample.rows, 1] - world.clutter[sample.rows, 0]
    assert (difference == cleaner).all() and ((labels > 0.5) == (cleaner > 0)).all() and (labels[cleaner == 0] == 0.5).all()


@pytest.mark.slow
def test_adapted_targets_learn_from_people_what_the_judge_does_not_see():
    world = pool()
    sample = draw_sample(world, seed=0, pairs=400, people="quickstart")
    right = {
        arm: np.mean((merged_targets(world, sample, arm, "clip", 0.25, 0).target > 0.5) == sample.answer) for arm in ("naive", "adapted")
    }
    assert right["adapted"] > 0.85 > right["naive"]
    few = {arm: merged_targets(world, sample, arm, "coin", 0.02, 0) for arm in ("adapted", "tuned", "temperature")}  # 8 labels
    np.testing.assert_array_equal(few["adapted"].target, few["tuned"].target)
    assert few["adapted"].report["method"] == "tuned" and few["temperature"].report["method"] == "adapted"
    asked = ~np.isnan(sample.human(0.02))
    assert len(np.unique(few["temperature"].target[~asked])) <= 2 and np.isfinite(few["temperature"].target).all()


def test_methods_share_a_training_where_their_targets_and_visits_are_the_same():
    human, rows = np.array([1.0, 0.0, np.nan, np.nan]), np.array([3, 5, 8, 9])
    alone, useless = merge_labels(human, None, method="human_only"), merge_labels(human, np.full(4, 0.5), method="adapted")
    assert useless.weight[2:].tolist() == [0, 0]
    arms = [Cell(arm, "coin", 0.5, "quickstart", 3, "{}") for arm in ("human_only", "adapted", "tuned")]
    names = {run_name(cell, rows, merged) for cell, merged in zip(arms, (alone, useless, alone), strict=True)}
    assert len(names) == 1
    others = [run_name(replace(arms[0], seed=4), rows, alone), run_name(replace(arms[0], of="[]"), rows, alone)]
    others += [run_name(arms[0], rows[::-1], alone), run_name(arms[0], rows, merge_labels(1 - human, None, method="human_only"))]
    useful = merge_labels(human, np.array([0.9, 0.2, 0.8, 0.1]), method="adapted")
    others += [run_name(arms[1], rows, useful)]  # method adapted shares out the visits, by labels that the targets do not tell
    others += [run_name(arms[1], rows, replace(useful, report=useful.report | {"method": "tuned"}))]
    assert len({*names, *others}) == 7


def runs(arm: str, seed: int, rewards, *, judge="clip", share=0.05, people="quickstart") -> list[dict]:
    """Lines of a training; `rewards` by strength, one number for all prompts or one for each."""
    common = {"arm": arm, "judge": judge, "share": share, "people": people, "seed": seed}
    found = {strength: np.broadcast_to(np.asarray(value, dtype=float), 8).tolist() for strength, value in rewards.items()}
    return [common | {"strength": strength, "rewards": values, "reward": float(np.mean(values))} for strength, values in found.items()]


def test_the_best_strength_is_chosen_on_the_other_half():
    """Strength s is 1 on one prompt alone, 0 elsewhere: what each half is judged at was best on the other, so its 1 never counts."""
    spikes = np.eye(8)
    assert at_best(runs("tuned", 0, dict(enumerate(spikes[:2], 1)))) <= 1 / 8 < 2 / 8
    assert at_best(runs("tuned", 0, {1.0: 0.8, 2.0: 0.9, 3.0: 0.7})) == pytest.approx(0.9)


def test_regret_is_0_for_the_best_of_a_cell_and_never_below():
    rng = np.random.default_rng(0)
    for _ in range(20):
        found = regrets({method: dict(enumerate(rng.normal(size=5))) for method in METHODS})
        means = [entry["mean"] for entry in found.values()]
        assert (
            min(means) == 0 and sum(mean == 0 for mean in means) == 1 and all(e["ci"][0] <= e["mean"] <= e["ci"][1] for e in found.values())
        )
    assert regrets({"tuned": {0: 1.0}, "naive": {1: 1.0}}) is None


def test_the_pairs_of_a_ranking_are_drawn_together():
    whole = pool(240)
    rows = draw_sample(whole, seed=3, pairs=60, people="quickstart", images=4).rows
    assert len(set(rows)) == 60 and (np.sort(rows) == rows).all() and (rows.reshape(10, 6) // 6 == rows[::6, None] // 6).all()
    assert (rows[::6] % 6 == 0).all()


def test_the_default_is_of_least_worst_regret_and_the_simpler_one_of_alike():
    worst = dict(zip(METHODS, (0.02, 0.0119, 0.01, 0.05, 0.06), strict=True))
    assert choose_default(worst) == "tuned"
    assert choose_default(worst | {"tuned": 0.0121}) == "adapted"
    assert choose_default({}) is None


def test_a_share_of_a_gain_has_the_delta_methods_interval():
    """a = r whole exactly: no spread. Else r is the ratio of means."""
    whole = {0: 0.1, 1: 0.2, 2: 0.3}
    assert recovered({seed: 0.8 * gain for seed, gain in whole.items()}, whole)["ci"] == pytest.approx([0.8, 0.8])
    assert recovered({0: 0.1, 1: 0.1, 2: 0.1}, whole)["mean"] == pytest.approx(0.5)


def test_gains_differences_and_regrets_are_paired_by_seed():
    """adapted minus human_only: 0.03, 0.05, 0.04; mean 0.04, Student's half width 4.303 x 0.01 / sqrt 3 = 0.0248."""
    lines = runs("base", 0, {0.0: 0.5}, judge="none", share=0.0, people="none")
    for seed, (human, adapted) in enumerate([(0.60, 0.63), (0.70, 0.75), (0.65, 0.69)]):
        lines += runs("human_only", seed, {1.0: human, 2.0: 0.1}, judge="none") + runs("adapted", seed, {1.0: 0.2, 2.0: adapted})
        lines += [line for arm in ("tuned", "naive", "dedpo") for line in runs(arm, seed, {1.0: 0.55})]
    found = summarise(lines)
    (cell,) = found["cells"]
    assert cell["gain"]["adapted"]["mean"] == pytest.approx(0.19) and cell["gain"]["human_100"] is None
    assert cell["minus"]["adapted"]["human_only"]["ci"] == pytest.approx([0.0152, 0.0648], abs=1e-4)
    assert cell["regret"]["human_only"]["mean"] == pytest.approx(0.04)
    assert found["default"] == {"all": "adapted", "few": None, "enough": "adapted"}
    mean = found["mean_regret"]["quickstart"]["all"]
    assert mean["adapted"] == 0 and mean["human_only"] == pytest.approx(0.04)
    told = tables(found)
    assert "+0.040 (+0.015 to +0.065)" in told and "| quickstart | worst |" in told and "| quickstart | mean |" in told


def test_worst_regrets_and_the_rule_are_told_for_few_and_for_enough_labels_too():
    """At 1 % naive is best by 0.1, at 5 % tuned by 0.02: over both, the worst regret of tuned (0.1) is larger than of naive (0.02)."""
    lines = runs("base", 0, {0.0: 0.5}, judge="none", share=0.0, people="none")
    for arm in METHODS:
        judge = {"judge": "none"} if arm == "human_only" else {}
        lines += runs(arm, 0, {1.0: 0.7 if arm == "naive" else 0.6}, share=0.01, **judge)
        lines += runs(arm, 0, {1.0: 0.72 if arm == "tuned" else 0.7}, share=0.05, **judge)
    found = summarise(lines)
    assert found["default"] == {"all": "naive", "few": "naive", "enough": "tuned"}
    worst = found["worst_regret"]["quickstart"]
    assert (worst["all"]["tuned"]["share"], worst["enough"]["naive"]["share"]) == (0.01, 0.05)
    assert worst["all"]["tuned"]["mean"] == pytest.approx(0.1) and worst["enough"]["tuned"]["mean"] == 0


def test_gains_after_each_look_are_at_the_strength_that_is_best_there():
    lines = runs("base", 0, {0.0: 0.5}, judge="none", share=0.0, people="none")
    for seed, more in ((0, 0.0), (1, 0.1)):
        early, late = (runs("tuned", seed, {0.5: at + more, 1.0: other + more}) for at, other in ((0.6, 0.7), (0.8, 0.4)))
        lines += [line | {"step": 10} for line in early] + [line | {"step": 20} for line in late]
    found = by_step(lines)
    assert [(entry["step"], entry["arm"], entry["seeds"], round(entry["gain"]["mean"], 9)) for entry in found] == [
        (10, "tuned", 2, 0.25),
        (20, "tuned", 2, 0.35),
    ]
    assert steps_table(found).splitlines()[0].endswith("| 10 steps | 20 steps |") and steps_table(found).count("\n") == 3
    [cell] = summarise(lines)["cells"]
    assert cell["gain"]["tuned"]["mean"] == pytest.approx(0.35), "all else is of the last step"
    assert by_step([line for line in lines if line.get("step") != 10]) == []


@pytest.mark.parametrize("looks", [[2, 1], [2, 3], [150], [0]])
def test_looks_that_no_checkpoint_has_are_refused(looks):
    with pytest.raises(UserError, match="looks"):
        cells(settings(Block(["tuned"]), looks=looks))


@pytest.mark.slow
def test_a_very_small_study_runs_resumes_and_reports(tmp_path, capsys):
    config = tmp_path / "small.yaml"
    config.write_text(
        "pool: 40\npairs: 40\nsteps: 3\nlooks: [1, 2]\ndraws: 2\nprompts: 2\nimage_seeds: 1\nstrengths: [1.0, 2.0]\nblocks:\n"
        "  - arms: [human_only, adapted]\n    shares: [0.5]\n    seeds: [0, 0]\n"
    )
    command = ["--config", str(config), "--work", str(tmp_path / "work"), "--report", str(tmp_path / "report")]
    assert study.main([*command, "--minutes", "0"]) == 0
    assert "3 cells are not done yet" in capsys.readouterr().out and not (tmp_path / "work" / "pool").exists()
    assert study.main(command) == 0
    found = pq.read_table(tmp_path / "report" / "results.parquet").to_pylist()
    assert [row["strength"] for row in found] == [0.0, *[1.0, 2.0] * 6] and all(len(row["rewards"]) == 2 for row in found)
    assert [row["step"] for row in found] == [None, *[1, 1, 2, 2, 3, 3] * 2]
    for name in ("summary.json", "tables.md", "figure.png", "steps.png"):
        assert (tmp_path / "report" / name).stat().st_size > 500
    assert not list((tmp_path / "work" / "runs").iterdir()) and not list((tmp_path / "work" / "pool" / "targets").iterdir())
    command[3] = str(tmp_path / "elsewhere")  # the report alone is enough to go on from
    capsys.readouterr()
    assert study.main(command) == 0
    assert "3 cells, 0 of them to do" in capsys.readouterr().out
    before, after = (
        {path.name: json.loads(path.read_text()) for path in (tmp_path / work / "cells").iterdir()} for work in ("work", "elsewhere")
    )
    known = {name: [{k: v for k, v in line.items() if v is not None} for line in lines] for name, lines in before.items()}
    assert after == known
    assert study.main([*command, "--steps", "4"]) == 2  # another study would lose these cells


@pytest.mark.slow
def test_teaching_is_measured_on_pairs_that_nobody_answered(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(study.world, "make_pool", lambda work, pairs: pool(pairs))
    monkeypatch.setattr(adaptation, "INNER", 5)
    monkeypatch.setattr(adaptation, "RESAMPLES", 2)
    out = tmp_path / "teaching.json"
    argv = ["--work", str(tmp_path), "--out", str(out), "--shares", "0.4", "--pool", "150", "--pairs", "100", "--seeds", "5", "6"]
    assert teaching.main(argv) == 0
    clip, coin = json.loads(out.read_text())["cells"]
    assert (clip["judge"], coin["judge"]) == ("clip", "coin")
    assert clip["adapt"]["agreement"]["mean"] > clip["temperature"]["agreement"]["mean"] + 0.1  # the first statistic tells rewards apart
    assert (
        clip["adapt"]["log_loss"] < clip["temperature"]["log_loss"] and clip["adapt"]["worst_fifth"] <= clip["adapt"]["agreement"]["mean"]
    )
    assert "clip, 40%, adapt: right on" in capsys.readouterr().out
    assert teaching.main([*argv[:-1], "5"]) == 2
