"""`dedpo compare` on scored sample folders: the numbers, the verdict, and what is refused."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from dedpo_diffusion.core.console import UserError
from dedpo_diffusion.evaluation.compare import compare, main
from dedpo_diffusion.evaluation.comparison.intervals import paired_difference, win_rate
from support.samples import PROMPTS, write_samples
from support.scores import BASE, CLUSTERS, put_scores, settings


@pytest.fixture
def arms(tmp_path):
    """Base; "even", which wins as often as it loses; "tuned", which is better everywhere."""
    values = {"base": BASE, "even": BASE + 0.1 * np.tile([1, -1], 6), "tuned": BASE + 0.2 + 0.05 * np.sin(np.arange(12))}
    return [put_scores(write_samples(tmp_path / name), truth=v, proxy=-v) for name, v in values.items()]


def scores_of(folder):
    rows = [row for row in pq.read_table(folder / "scores.parquet").to_pylist() if row["scorer"] == "truth"]
    return np.array([row["score"] for row in rows])


def same(entry, expected):
    """Equal but for the rounding of sums taken for many columns at once."""
    assert entry.keys() == expected.keys()
    for key, value in expected.items():
        np.testing.assert_allclose(entry[key], value, rtol=1e-9, atol=1e-12)


def test_numbers_are_those_of_the_interval_functions(arms):
    found = compare(settings(arms))
    assert (found["primary"], found["base"], found["n_images"], found["n_prompts"], found["resamples"]) == ("truth", "base", 12, 6, 500)
    for folder in arms:
        mine, base, entry = scores_of(folder), scores_of(arms[0]), found["arms"][folder.name]
        gain, wins = (f(mine, base, CLUSTERS, resamples=500) for f in (paired_difference, win_rate))
        same(entry["gain_over_base"], gain.as_dict() | {"p": gain.p, "p_holm": entry["by_scorer"]["truth"]["gain_over_base"]["p_holm"]})
        same(entry["win_rate_vs_base"], wins.as_dict())
        assert entry["truth"]["mean"] == pytest.approx(mine.mean()) and entry["truth"]["ci"][0] < mine.mean() < entry["truth"]["ci"][1]
        assert (entry["truth"]["n"], entry["truth"]["version"]) == (12, "truth-1")
        assert entry["by_scorer"]["proxy"]["gain_over_base"]["mean"] == pytest.approx((base - mine).mean())
    gap = paired_difference(scores_of(arms[2]), scores_of(arms[1]), CLUSTERS, resamples=500).as_dict()
    assert list(found["differences"]) == ["tuned_minus_even"]
    same(found["differences"]["tuned_minus_even"], gap)


def test_known_values(arms):
    """even: six gains of 0.1 and six losses of 0.1, one each a prompt: 0 and one half in every resample, of six answers each.
    t (0.975; 5) = 2.5706; a = t^2 / 6, and half of the rate's interval sqrt(a / 4 + a^2 / 4) / (1 + a)."""
    even, a = compare(settings(arms))["arms"]["even"], 2.5706**2 / 6
    half = np.sqrt(a / 4 + a * a / 4) / (1 + a)
    np.testing.assert_allclose(
        [even["gain_over_base"]["mean"], *even["gain_over_base"]["ci"]], [0, -np.sqrt(a) / 10, np.sqrt(a) / 10], atol=1e-5
    )
    np.testing.assert_allclose(
        [even["win_rate_vs_base"]["mean"], *even["win_rate_vs_base"]["ci"]], [0.5, 0.5 - half, 0.5 + half], atol=1e-5
    )


def test_rates_stay_within_what_is_possible(arms):
    """0 and 1 by image: a mean within [0, 1], gains and differences within [-1, 1]; never wrong to always right on six prompts is no
    certainty: the p of both is that of t = sqrt(6)."""
    for folder, values in zip(arms, (np.zeros(12), np.eye(12)[0], np.ones(12)), strict=True):
        put_scores(folder, truth=values)
    found = compare(settings(arms))
    entries = {name: (arm["truth"], arm["gain_over_base"], arm["win_rate_vs_base"]) for name, arm in found["arms"].items()}
    assert all(0 <= end <= 1 for mean, _, wins in entries.values() for end in (*mean["ci"], *wins["ci"]))
    assert all(-1 <= end <= 1 for _, gain, _ in entries.values() for end in gain["ci"])
    assert found["differences"]["tuned_minus_even"]["ci"][1] == 1.0
    _, gain, wins = entries["tuned"]
    assert (
        gain["mean"] == gain["ci"][1] == 1.0 and gain["ci"][0] == pytest.approx(1 - 2.5706 / np.sqrt(6), abs=1e-4) and wins["ci"][0] < 0.5
    )
    assert gain["p"] == pytest.approx(0.0580, abs=1e-4)
    assert entries["base"][0]["ci"][0] == 0.0 < entries["base"][0]["ci"][1] and entries["base"][1]["ci"] == [0.0, 0.0]


def test_the_base_against_itself_is_exactly_nothing(arms):
    entry = compare(settings(arms))["arms"]["base"]
    assert entry["gain_over_base"] == {"mean": 0.0, "ci": [0.0, 0.0], "p": 1.0, "p_holm": 1.0}
    assert entry["win_rate_vs_base"] == {"mean": 0.5, "ci": [0.5, 0.5]}


def test_the_order_of_the_rows_changes_nothing(arms):
    before = compare(settings(arms))
    for name in ("index", "scores"):
        table = pq.read_table(arms[2] / f"{name}.parquet")
        pq.write_table(table.take(pa.array(np.random.default_rng(0).permutation(len(table)))), arms[2] / f"{name}.parquet")
    after = compare(settings(arms))
    assert after.pop("notes") == ["tuned lists its images in another order than base; they are paired by prompt and seed."]
    assert before.pop("notes") == [] and after == before


def test_swapping_base_and_arm_mirrors_the_gain(arms):
    there, back = compare(settings(arms[::2])), compare(settings(arms[::-2]))
    forward, backward = there["arms"]["tuned"]["gain_over_base"], back["arms"]["base"]["gain_over_base"]
    np.testing.assert_allclose([forward["mean"], *forward["ci"]], [-backward["mean"], *[-x for x in backward["ci"][::-1]]], atol=1e-12)
    assert there["arms"]["tuned"]["win_rate_vs_base"]["mean"] == 1.0 and back["arms"]["base"]["win_rate_vs_base"]["mean"] == 0.0


def test_verdicts_say_better_worse_or_that_it_cannot_be_told(arms):
    better, worse, untold = (compare(settings(pair))["verdict"] for pair in (arms[::2], arms[::-2], arms[:2]))
    assert better.startswith("On truth, tuned is better than base: gain +0.2") and "win rate 100.0%" in better
    assert worse.startswith("On truth, base is worse than tuned: gain -0.2")
    assert untold.startswith("On truth, even and base cannot be told apart: gain")
    both = compare(settings(arms))["verdict"]
    assert "of 2 arms tuned has the largest gain, ahead of even (+0.2" in both
    proxy = compare(settings(arms, primary="proxy"))
    assert proxy["verdict"].startswith("On proxy, even and base cannot be told apart: gain")
    assert "Unknown whether proxy made the training labels: give --targets or --held_out." in proxy["verdict"]
    assert "ahead of tuned (+0.2" in proxy["verdict"]


def test_a_rival_that_cannot_be_told_apart_is_named(arms, tmp_path):
    rival = put_scores(write_samples(tmp_path / "rival"), truth=scores_of(arms[2]) + 0.1 * np.tile([1, 1, -1.1, -1.1], 3), proxy=BASE)
    assert "tuned has the largest gain, ahead of even (" in (verdict := compare(settings([*arms, rival]))["verdict"])
    assert ", but not distinguishable from rival (+0.00" in verdict
    assert set(compare(settings([*arms, rival]))["differences"]) == {"tuned_minus_even", "rival_minus_even", "rival_minus_tuned"}


def test_the_command_writes_results_page_and_sheet_together(arms, tmp_path, capsys):
    out = tmp_path / "made" / "report.html"
    arguments = ["--out", str(out), "--resamples", "500", "--held_out+", "truth", "--primary", "truth", "--seed", "3"]
    assert main([*map(str, arms), *arguments]) == 0
    found = json.loads((out.parent / "results.json").read_text())
    assert found == compare(settings(arms, seed=3, primary="truth"))
    assert sorted(path.name for path in out.parent.iterdir()) == ["contact_sheet.png", "report.html", "results.json"]
    printed = capsys.readouterr().out
    assert found["verdict"] in printed and "truth (truth-1), held out" in printed and "proxy (proxy-1), not known to be held out" in printed


def test_notes_name_arms_sampled_otherwise_and_judges_called_held_out(arms, tmp_path):
    for folder, guidance in zip(arms, (3.0, 3.0, 7.5), strict=True):
        free = dict.fromkeys(("lora", "limit", "categories", "size", "height", "width"), folder.name)  # no reason for a note
        (folder / "settings.yaml").write_text(yaml.safe_dump({"guidance": guidance, "steps": 20, **free}))
    (tmp_path / "mix.json").write_text(json.dumps({"judge": "truth"}))
    found = compare(settings(arms, targets=[tmp_path / "mix.json"]))["notes"]
    assert found == [
        "tuned was sampled with guidance 7.5, base with 3.0.",
        "truth is called held out, yet it is a judge of the targets mix.",
    ]


def drop_half_the_scores(folder):
    table = pq.read_table(folder / "scores.parquet")
    pq.write_table(table.slice(4), folder / "scores.parquet")


def other_version(folder):
    table = pq.read_table(folder / "scores.parquet")
    versions = pa.array([value.replace("truth-1", "truth-2") for value in table["version"].to_pylist()])
    pq.write_table(table.set_column(table.column_names.index("version"), "version", versions), folder / "scores.parquet")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "scores.parquet").unlink(), "tuned holds no scores; run `dedpo score"),
        (
            drop_half_the_scores,
            r"4 of 12 images have no score of truth \(first: 0-0.png\); .* --with truth=...`, with the same weights as before",
        ),
        (lambda f: put_scores(f, other=BASE), "share no scorer .*tuned: other"),
        (other_version, "was scored with truth-2, .* with truth-1: such scores do not compare"),
        (lambda f: (f / "3-0.png").unlink(), "3-0.png is missing"),
    ],
)
def test_folders_that_do_not_compare(arms, damage, message):
    damage(arms[2])
    with pytest.raises(UserError, match=message):
        compare(settings(arms))


def test_the_first_scorer_that_is_held_out_is_primary_unless_another_is_asked_for(arms):
    assert compare(settings(arms, held_out=[]))["primary"] == "truth"
    assert compare(settings(arms, held_out=["proxy"]))["primary"] == "proxy"
    assert compare(settings(arms, held_out=["proxy"], primary="truth"))["primary"] == "truth"


def test_people_who_judged_every_arm_come_before_a_scorer_that_is_not_held_out(arms):
    from dedpo_diffusion.evaluation.compare import choose_primary

    scorers = {
        name: {"role": role, "kind": kind} for name, role, kind in (("truth", "made_labels", "scorer"), ("people", "held_out", "people"))
    }
    asked = settings(arms, held_out=[])
    assert [choose_primary(asked, scorers, people=people) for people in (True, False)] == ["people", "truth"]
    assert choose_primary(asked, scorers | {"hps": {"role": "held_out", "kind": "scorer"}}, people=True) == "hps"


def test_p_values_are_corrected_for_the_scorers_of_an_arm(arms):
    """proxy is minus truth: equal p, so both are doubled."""
    for arm in ("even", "tuned"):
        entries = compare(settings(arms))["arms"][arm]["by_scorer"].values()
        for gain in (entry["gain_over_base"] for entry in entries):
            assert gain["p_holm"] == pytest.approx(min(1.0, 2 * gain["p"])) and (gain["p"] < 0.05) == (
                gain["ci"][0] > 0 or gain["ci"][1] < 0
            )


def test_categories_have_the_numbers_of_their_rows(arms):
    """Prompts 0 to 2 and 3 and 4, and prompt 5 alone, which has no interval."""
    names = ["shape"] * 6 + ["size"] * 4 + ["lone"] * 2
    for folder in arms:
        table = pq.read_table(folder / "index.parquet")
        pq.write_table(table.append_column("category", pa.array(names)), folder / "index.parquet")
    found = compare(settings(arms))["arms"]["tuned"]["categories"]
    assert list(found) == ["shape", "size", "lone"]
    rows, base = np.array(names) == "shape", scores_of(arms[0])
    entry, gain = found["shape"]["truth"], paired_difference(scores_of(arms[2])[rows], base[rows], CLUSTERS[rows], resamples=500)
    assert (entry["n_prompts"], entry["n_images"]) == (3, 6)
    same(entry["gain_over_base"], gain.as_dict() | {"p": gain.p})
    lone = found["lone"]["truth"]
    assert lone["n_prompts"] == 1 and lone["gain_over_base"]["ci"] is None and lone["win_rate_vs_base"] == {"mean": 1.0, "ci": None}
    assert lone["gain_over_base"]["mean"] == pytest.approx((scores_of(arms[2]) - base)[10:].mean())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"primary": "beauty"}, r"--primary beauty: no scorer that all folders share \(those are: truth, proxy\)"),
        ({"held_out": ["trut"]}, "--held_out trut: no scorer"),
        ({"resamples": 5}, "resamples is 5"),
        ({"seed": -1}, "seed is -1; give 0"),
    ],
)
def test_bad_settings(arms, changes, message):
    with pytest.raises(UserError, match=message):
        compare(settings(arms, **changes))


def test_folders_that_make_no_comparison(arms, tmp_path):
    with pytest.raises(UserError, match="two folders or more"):
        compare(settings(arms[:1]))
    twin = put_scores(write_samples(tmp_path / "again" / "tuned"), truth=BASE, proxy=BASE)
    with pytest.raises(UserError, match="two folders are named 'tuned'"):
        compare(settings([*arms, twin]))


def test_one_prompt_tells_nothing_of_others(tmp_path, monkeypatch):
    monkeypatch.setattr("support.samples.PROMPTS", PROMPTS[:1])
    both = [put_scores(write_samples(tmp_path / name), truth=BASE[:2]) for name in "ab"]
    with pytest.raises(UserError, match="one prompt only"):
        compare(settings(both))


def test_a_mistake_leaves_nothing_half_written(arms, tmp_path, capsys):
    out = tmp_path / "made" / "report.html"
    assert main([*map(str, arms), "--out", str(out), "--runs+", str(tmp_path / "no-run")]) == 2
    assert "there is no run folder" in capsys.readouterr().err
    assert not out.parent.exists()


@pytest.mark.parametrize("text", ["", "- 1\n", "a: [", "\x00"])
def test_settings_of_a_folder_that_cannot_be_read(arms, text):
    (arms[2] / "settings.yaml").write_text(text)
    with pytest.raises(UserError, match=r"(?s)tuned/settings.yaml (holds no settings|cannot be read as YAML).*; restore it, or remove it"):
        compare(settings(arms))


@pytest.mark.parametrize(
    "report",
    [
        {"judge": 3},
        {"judges": [{"n": 3}]},
        {"judges": ["pickscore"]},
        {"judges": 1},
        {"sentences": [1]},
        {"sentences": "a"},
        {"warnings": [{}]},
    ],
)
def test_reports_of_targets_of_an_odd_shape(arms, tmp_path, report):
    (tmp_path / "mix.json").write_text(json.dumps(report))
    with pytest.raises(UserError, match=f"mix.json: '{next(iter(report))}' is not as `dedpo merge` writes it; give"):
        compare(settings(arms, targets=[tmp_path / "mix.json"]))


def test_judges_of_a_report_without_their_numbers(tmp_path):
    from dedpo_diffusion.evaluation.report.page import label_section

    (tmp_path / "mix.json").write_text(json.dumps({"judges": [{"name": "a"}, {"name": "b"}]}))
    with pytest.raises(UserError, match=r"mix.json: its judges or curve are not as"):
        label_section([tmp_path / "mix.json"])


def test_a_page_that_would_be_a_folder_is_refused_at_once(tmp_path, capsys):
    assert main(["no-base", "no-arm", "--out", str(tmp_path)]) == 2
    assert "is a folder; name the page to write" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["people", "by_scorer", "gain_over_base", "win_rate_vs_base", "categories", "spread", "warnings"])
def test_scorers_named_as_entries_of_the_results(arms, name):
    put_scores(arms[1], **{"truth": BASE, name: BASE})
    with pytest.raises(UserError, match=f"even holds scores of a scorer named '{name}', which .*; rename that scorer"):
        compare(settings(arms))


def test_the_printed_table_has_the_decimals_of_a_small_scale(arms, capsys):
    from dedpo_diffusion.evaluation.compare import print_tables

    for folder, gain in zip(arms, (0, 1, 2), strict=True):
        put_scores(folder, truth=1e-3 * (BASE + gain * (1 + 0.2 * BASE)))
    results = compare(settings(arms))
    print_tables(results)
    words = f"{results['arms']['tuned']['gain_over_base']['mean']:+.5f}"
    assert words in capsys.readouterr().out and f"gain {words}" in results["verdict"]
