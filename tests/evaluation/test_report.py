"""The report page: what it shows, that it needs no network, and its choice of images."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
from dataclasses import replace

import numpy as np
import pytest
import yaml
from PIL import Image

from dedpo_diffusion.core import charts as figures
from dedpo_diffusion.core.console import UserError
from dedpo_diffusion.core.page import document, page_file
from dedpo_diffusion.evaluation import compare
from dedpo_diffusion.evaluation.comparison import people
from dedpo_diffusion.evaluation.report import gallery
from dedpo_diffusion.evaluation.report import page as report
from dedpo_diffusion.evaluation.report import sections as report_sections
from support.reports import CHANGE, NAMES, Page, shown_verdict, told_by_schema_2
from support.samples import PROMPTS, write_samples
from support.scores import BASE, put_scores, settings


@pytest.fixture
def made(tmp_path):
    """Three arms, two runs, two targets' reports; returns the settings and where the page will be."""
    for seed, (name, values) in enumerate(zip(NAMES, (BASE, BASE + CHANGE / 2, BASE + CHANGE), strict=True)):
        put_scores(write_samples(tmp_path / "samples" / name, seed), truth=values, proxy=values)
    for k, name in enumerate(NAMES[1:]):
        run = tmp_path / "runs" / name
        run.mkdir(parents=True)
        bucket = {"first": 0, "last": 99, "count": 2, "margin": 1.0 + k, "ratio": 1.0}
        records = [{"step": s, "loss": 0.7 - s / 1000, "margin": None, "buckets": [bucket]} for s in range(1, 41)]
        (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        (run / "settings.yaml").write_text(yaml.safe_dump({"note": f"<{name}> & co"}))
    targets = tmp_path / "tuned.json"
    effective = {"value": 262.4, "ci": [230.0, 311.0]}
    targets.write_text(json.dumps({"sentences": ["Worth <262>."], "power": 0.43, "agreement": None, "effective_human_labels": effective}))
    return settings(
        [tmp_path / "samples" / name for name in NAMES], out=tmp_path / "out" / "report.html", targets=[targets],
        runs=[tmp_path / "runs" / name for name in NAMES[1:]],
    )  # fmt: skip


def loaded(changed):
    """The arms of these settings."""
    return [compare.load_arm(folder) for folder in changed.folders]


def write(changed):
    """Write the page with all that the schema may hold; returns its results."""
    arms = loaded(changed)
    results = told_by_schema_2(json.loads(json.dumps(compare.analyse(changed, arms))))
    report.write_report(changed, arms, results)
    return results


def page_of(changed) -> tuple[Page, str]:
    write(changed)
    text = changed.out.read_text(encoding="utf-8")
    return Page(text), text


def test_the_page_is_well_formed_and_needs_nothing_but_itself(made):
    page, text = page_of(made)
    assert page.open == []
    assert page.links and all(link.startswith(("data:image/png;base64,", "#")) for link in page.links)
    assert "http://" not in text and "https://" not in text and "@import" not in text and "url(" not in text
    assert "default-src 'none'; img-src data:;" in text


def test_the_policy_allows_this_script_alone():
    digest = base64.b64encode(hashlib.sha256(page_file("gallery.js", "dedpo_diffusion.evaluation.report").encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}';" in document("t", "", script=page_file("gallery.js", "dedpo_diffusion.evaluation.report"))
    assert "script-src 'none';" in document("t", "") and "<script>" not in document("t", "")


def test_the_page_shows_verdict_numbers_labels_and_settings(made):
    page, text = page_of(made)
    results = compare.analyse(made, loaded(made))
    assert shown_verdict(results) in page.text
    mean, (low, high) = (results["arms"]["human_only"]["gain_over_base"][key] for key in ("mean", "ci"))
    for value in (mean, low, high):
        assert f"{value:+.3f}".replace("-", "−") in page.text
    assert "Worth <262>." in page.text and "262 (230 to 311)" in page.text and "0.430" in page.text
    assert "note: <tuned> & co" in page.text and "<tuned>" not in text  # escaped
    roles = ["held_out", "held_out", "made_labels"]
    assert re.findall(r'<h3>(\w+) <mark class="(\w+)">', text)[:3] == list(zip(("truth", "people", "proxy"), roles, strict=True))
    assert "proxy made the training labels" in page.text


def test_the_page_shows_all_that_the_schema_holds(made):
    page, text = page_of(made)
    assert 'role="alert"' in text and "proxy rises, truth <falls>." in page.text
    assert text.index('role="alert"') < text.index('class="cards"')
    assert "0.042" in page.text and "&lt;0.001" in text  # p after Holm
    assert "+0.310 +0.140 to +0.470" in " ".join(page.text.split()) and "65.5%" in page.text
    assert "pairs whose majority prefers tuned" in page.text and "people who prefer" not in page.text
    assert "13 answers on 9 pairs by 2 people" in page.text and "equal answers 79% (60% to 90%)" in page.text and "kappa" not in page.text
    assert "<title>&lt;large&gt; (5)</title>" in text and "−0.777" in page.text and "0.1234" in page.text
    assert all(f'<h2 id="{link[1:]}">' in text for link in page.links if link.startswith("#"))


def test_numbers_of_few_prompts_are_in_words_and_not_in_large_type(made):
    results = compare.compare(made)
    assert results["n_prompts"] == 6 and "Only 6 prompts: too few" in results["verdict"]
    for prompts, cards in ((6, 1), (10, 3)):
        top = report_sections.headline(results | {"n_prompts": prompts}, "tuned")
        assert top.count('class="card"') == cards and "images per arm" in top and ":</h1>" not in top


def test_power_1_means_nothing_where_the_judge_has_no_power():
    worth = {"value": 219.0, "ci": None}
    for method, shown in (("tuned", "219"), ("dedpo", "219"), ("human_only", "–"), ("naive", "–")):
        told = {"method": method, "effective_human_labels_power_1": worth, "effective_human_labels": worth}
        assert report._label_figure(told, "effective_human_labels_power_1") == shown
        assert report._label_figure(told, "effective_human_labels") == "219"


def test_the_base_has_no_distance_from_itself(made):
    results = told_by_schema_2(compare.compare(made))
    nothing = {"mean": 0.0, "ci": [0.0, 0.0]}
    spread = {"version": "clip-1", "diversity": {"mean": 0.2, "ci": [0.1, 0.3]}, "diversity_minus_base": nothing, "drift": nothing}
    results["arms"]["base"]["spread"] = {"clip": spread}
    results["arms"]["tuned"]["spread"] = {}
    text = report_sections.spread_section(results)
    assert text.count("–") == 2 and "0.2000" in text and "0.0000" not in text


def test_missing_parts_of_the_schema_leave_no_empty_sections(made):
    arms = loaded(made)
    results = told_by_schema_2(json.loads(json.dumps(compare.analyse(made, arms))))
    del results["scorers"]["people"], results["arms"]["tuned"]["by_scorer"]["people"]
    results["arms"]["tuned"] |= {"people": None, "categories": {}, "spread": {}, "warnings": []}
    text = report.build_page(settings(made.folders, out=made.out), arms, results)
    titles = re.findall(r"<h2[^>]*>([^<]+)</h2>", text)
    assert titles == ["Scores", "Between the arms", "Images", "Side by side", "Largest gains", "Largest regressions"]


def test_one_person_one_judgement_and_an_unknown_role(made):
    results = told_by_schema_2(compare.compare(made))
    results["scorers"]["proxy"]["role"] = "unknown"
    results["arms"]["tuned"]["people"] |= {"answers": 1, "pairs": 1, "raters": ["Ada"], "agreement": None, "with_scorers": {}}
    assert "1 answer on 1 pair by 1 person" in report_sections.people_section(results)
    assert "proxy may have made the training labels" in report_sections.scores_section(results)


def test_numbers_have_the_digits_that_their_intervals_deserve(made):
    results = told_by_schema_2(compare.compare(made))
    for width, digits in ((1.0, 3), (0.04, 3), (0.0061, 4), (0.00042, 5), (1e-9, 6)):
        for name in NAMES[1:]:
            results["arms"][name]["by_scorer"]["truth"]["gain_over_base"]["ci"] = [0.1, 0.1 + width]
        assert report_sections.decimals(results, "truth") == digits


def decoded(source):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(source.split(",")[1]))))


def test_images_are_those_of_the_chosen_rows(made):
    """Six prompts, the first seed of each, in three arms; then, where no script runs, the largest gains and losses."""
    page, _ = page_of(made)
    assert len(page.images) == 3 * (6 + 4 + 4)
    for place, folder in enumerate(made.folders):
        for strip, file in ((1, "1-0.png"), (6, "0-1.png"), (10, "5-0.png")):  # second prompt, largest gain, largest loss
            np.testing.assert_array_equal(decoded(page.images[3 * strip + place]), np.asarray(Image.open(folder / file)))
    assert "Chosen by score: the 4 images of 12 whose truth rose most from base to tuned." in page.text


def test_the_gallery_knows_every_pair_its_scores_and_its_images(made):
    arms = loaded(made)
    results = told_by_schema_2(compare.analyse(settings(made.folders, primary="truth"), arms))
    arms[1].rows[3]["category"], arms[2].rows[3]["category"], arms[2].rows[4]["category"] = "odd", "other", "other"  # the first tells
    _, data = gallery.image_sections(arms, results, "tuned")
    blocks = Page(data).blocks
    known = json.loads(blocks["known"])
    assert (known["arms"], known["best"]) == (list(NAMES), 2)
    assert [scorer["name"] for scorer in known["scorers"]] == ["truth", "people", "proxy"] and known["scorer"] == 0
    assert [pair["row"] for pair in known["pairs"]] == list(range(12))
    for pair, row in zip(known["pairs"], arms[0].rows, strict=True):
        assert (pair["prompt"], pair["seed"], pair["category"]) == (row["prompt"], row["seed"], "odd" if pair["row"] == 3 else None)
        assert pair["scores"][0] == [arm.scores["truth"][pair["row"]] for arm in arms] and pair["scores"][1] == [None] * 3
        for k, arm in enumerate(arms):
            expected = np.asarray(Image.open(arm.folder / arm.rows[pair["row"]]["file"]))
            np.testing.assert_array_equal(decoded(blocks[f"image-{pair['row']}-{k}"]), expected)


def test_answers_of_people_are_means_over_single_answers(made, monkeypatch):
    rows, raters = np.array([2, 2, 5, 5, 2]), ["a", "b", "a", "a", "b"]
    given = people.Votes(rows, raters, np.array([1.0, 0.5, 0.0, 1.0, 1.0]), np.array([False, False, False, True, False]))
    monkeypatch.setattr(people, "read_votes", lambda *_: given)
    arms = loaded(made)
    assert gallery.people_said(arms)[::2] == [[None] * 12, [None, None, 0.5, None, None, -1.0, *[None] * 6]]
    monkeypatch.setattr(people, "read_votes", lambda *_: None)
    assert gallery.people_said(arms) == [[None] * 12] * 3


def test_no_prompt_can_leave_the_data(made):
    hostile = "</script><script>alert(1)</script><!--"
    rows = [{"file": "a.png", "prompt": hostile, "prompt_index": 0, "seed": 0, "category": hostile}]
    arms = [replace(arm, name=hostile, rows=rows, scores={"truth": np.zeros(1)}) for arm in loaded(made)[:2]]
    results = {"scorers": {"truth": {}}, "primary": "truth", "base": hostile, "arms": {}}
    thumbnails = {(0, k): gallery.Thumbnail("image/png;base64,AAAA", 64, 64) for k in range(2)}
    page = Page(gallery.gallery_data(arms, results, [0], thumbnails, hostile, [hostile]))
    assert json.loads(page.blocks["known"])["pairs"][0]["prompt"] == hostile and page.open == [] and len(page.blocks) == 3


@pytest.mark.parametrize("arms", [2, 4])
def test_many_pairs_are_the_largest_changes_and_evenly_spaced_others(made, arms):
    rng = np.random.default_rng(0)
    rows = [{"prompt_index": k} for k in range(1000)]
    arm = loaded(made)[0]
    several = [replace(arm, rows=rows, scores={"s": rng.normal(size=1000)}) for _ in range(arms)]
    chosen, rule = gallery.chosen_rows(several, "s", 120)
    assert len(chosen) == len(set(chosen)) == 120 and chosen == sorted(chosen)
    each = 30 // (arms - 1)
    for arm in several[1:]:
        order = np.argsort(arm.scores["s"] - several[0].scores["s"])
        assert {*order[:each], *order[-each:]} <= set(chosen)
    assert rule.startswith("120 of 1000 pairs:") and f"the {each} whose s fell most" in rule
    risen = [several[0], *(replace(arm, scores={"s": several[0].scores["s"] + np.eye(1000)[k]}) for k, arm in enumerate(several[1:]))]
    chosen, rule = gallery.chosen_rows(risen, "s", 120)
    assert "the 1 whose s rose most, and" in rule and "fell most" not in rule and f"and {120 - len(several[1:])} evenly" in rule
    few, rule = gallery.chosen_rows(several, "s", 1000)
    assert few == list(range(1000)) and rule == "All 1000 pairs."


@pytest.mark.parametrize(("count", "wanted"), [(1, 1), (5, 9), (9, 9), (10, 9), (100, 7), (3, 0)])
def test_spaced_rows_are_different_and_hold_both_ends(count, wanted):
    found = gallery.spaced(list(range(count)), wanted)
    assert len(set(found)) == len(found) == min(count, wanted) and (wanted < 2 or {0, count - 1} <= set(found))


def test_evenly_spaced_rows_never_look_at_scores(made):
    arm = compare.load_arm(made.folders[0])
    assert gallery.evenly_spaced(arm, 12) == [0, 2, 4, 6, 8, 10]
    assert gallery.evenly_spaced(arm, 3) == [0, 4, 10] and gallery.evenly_spaced(arm, 1) == [0]


def test_extremes_hold_true_changes_only():
    assert gallery.extremes(CHANGE, 4) == ([1, 2, 3, 4], [10, 9, 8, 7])
    assert gallery.extremes(np.array([0.0, 0.1, 0.0]), 4) == ([1], [])


def test_curves_are_drawn_per_run_and_missing_metrics_left_out(made):
    _, text = page_of(made)
    titles = re.findall(r"<figure><figcaption>([^<]+)</figcaption><svg", text)
    assert titles == ["loss", "margin by timestep", "balance: winner over loser, by timestep"]
    assert text.count("<polyline") == 2 * 2 + 2 + 2  # the loss: raw and smoothed


def test_validation_curves_begin_before_training_and_mark_the_best_step(made):
    scores = {"truth": {"mean": 0.5, "start": 0.4}}
    lines = [{"step": s, "loss": x, "start_loss": 0.69, "accuracy": None, "scores": scores} for s, x in ((10, 0.6), (20, 0.5), (30, 0.55))]
    (made.runs[0] / "validation.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    records = {"a": report.read_metrics(made.runs[0], "validation"), "b": []}
    found = report.validation_curves(records, {"a": 4, "b": 5})
    assert list(found) == ["held-out loss", "truth of held-out prompts"]
    loss = [(0.0, 0.69), (10.0, 0.6), (20.0, 0.5), (30.0, 0.55)]
    assert found["held-out loss"] == [figures.Curve("a", loss, 4, (20.0, 0.5))]
    assert found["truth of held-out prompts"][0].points[:2] == [(0.0, 0.4), (10.0, 0.5)]
    drawn = report.training_section(made.runs, NAMES)
    assert "<figcaption>held-out loss</figcaption>" in drawn and drawn.count("<circle") == 2 and "a ring at the best step" in drawn


def test_bucket_means_are_weighted_by_count_over_the_last_half():
    """Last half: records 2 and 3. (1 * 1 + 5 * 3) / 4 = 4."""
    values = [(100, 1), (100, 1), (1.0, 1), (5.0, 3)]
    records = [{"step": s, "buckets": [{"first": 0, "last": 99, "count": c, "margin": m}]} for s, (m, c) in enumerate(values)]
    assert report.by_timestep(records, "margin") == [(49.5, 4.0)]
    assert report.by_timestep(records, "ratio") == []


def test_a_page_without_runs_and_targets(made):
    bare = settings(made.folders, out=made.out)
    page, text = page_of(bare)
    assert "Settings" not in page.text
    assert page.open == [] and "Training" not in page.text and "Labels" not in page.text


def test_the_contact_sheet_holds_the_pictures_at_double_size(made):
    write(made)
    sheet = np.asarray(Image.open(made.out.parent / "contact_sheet.png"))
    cell, expected = 128, np.asarray(Image.open(made.folders[2] / "3-0.png"))  # row 3, third column
    x, y = 190 + 12 + 2 * (cell + 12), 40 + 3 * (cell + 24 + 12)
    np.testing.assert_array_equal(sheet[y : y + cell : 2, x : x + cell : 2], expected)


def test_large_images_become_thumbnails_and_tiny_ones_stay(tmp_path):
    Image.new("RGB", (512, 384), (9, 90, 200)).save(tmp_path / "a.png")
    made = gallery.thumbnail(tmp_path / "a.png", 256)
    assert made.data.startswith("image/webp;base64,") and (made.width, made.height, made.small) == (256, 192, False)
    assert decoded(made.data).shape == (192, 256, 3) and np.abs(decoded(made.data).astype(int) - (9, 90, 200)).max() < 6
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (128, 90, 3), dtype=np.uint8))
    noise.save(tmp_path / "b.png")
    tiny = gallery.thumbnail(tmp_path / "b.png", 64)
    assert tiny.small and np.array_equal(decoded(tiny.data), np.asarray(noise))


def test_an_unfinished_last_line_of_metrics_is_left_out_and_a_damaged_one_refused(made):
    path = made.runs[0] / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 41, "lo')
    assert len(report.read_metrics(made.runs[0])) == 40
    path.write_text('{"loss": 1}\n')
    with pytest.raises(UserError, match=r"metrics.jsonl line 1 is not a record with a step"):
        report.read_metrics(made.runs[0])


def test_targets_and_runs_of_one_name_are_told_apart_by_their_folders(tmp_path):
    paths = [tmp_path / part / "targets" / "tuned.json" for part in ("a", "b")]
    for k, path in enumerate(paths):
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps({"sentences": [f"Worth {k}."], "power": 0.1 + k, "power_se": 0.25}))
    told = report.label_section(paths)
    assert "<th>a/targets/tuned</th><th>b/targets/tuned</th>" in told and "Worth 0." in told and "Worth 1." in told
    assert "<tr><th>standard error of the power</th><td>0.250</td><td>0.250</td></tr>" in told
    runs = [tmp_path / "x" / "run", tmp_path / "y" / "run", tmp_path / "x" / "other"]
    assert list(report.by_name(runs)) == ["x/run", "y/run", "other"]


@pytest.mark.parametrize(("content", "message"), [(None, "cannot be read"), ("{", "cannot be read as JSON"), ("[]", "holds no report")])
def test_targets_reports_that_are_none(tmp_path, content, message):
    if content is not None:
        (tmp_path / "t.json").write_text(content)
    with pytest.raises(UserError, match=message):
        report.read_targets_report(tmp_path / "t.json")


@pytest.mark.parametrize(("low", "high"), [(-0.013, 0.118), (0.0, 1e-6), (-3.0, 250.0), (1234.5, 1234.9)])
def test_ticks_are_round_and_inside(low, high):
    found = figures.ticks(low, high)
    assert 2 <= len(found) <= 7 and low <= found[0] + 1e-9 * (high - low) and found[-1] <= high + 1e-9 * (high - low)
    steps = np.diff(found)
    np.testing.assert_allclose(steps, steps[0], rtol=1e-6)
    assert round(steps[0] / 10 ** np.floor(np.log10(steps[0])), 6) in (1, 2, 2.5, 5, 10)


def test_forest_places_dot_and_interval_to_scale():
    """The distances dot to end and end to zero line on the page are in proportion to the numbers."""
    drawn = figures.forest([figures.Gain("a", 0.3, 0.1, 0.5, 1)], "t")
    x_low, x_high = map(float, re.search(r'<line x1="([\d.]+)" y1="[\d.]+" x2="([\d.]+)" y2="[\d.]+" stroke=', drawn).groups())
    dot, zero = float(re.search(r'cx="([\d.]+)"', drawn)[1]), float(re.search(r'x1="([\d.]+)"[^>]*class="zero"', drawn)[1])
    np.testing.assert_allclose((x_high - dot) / (dot - x_low), 1, atol=0.01)
    np.testing.assert_allclose((dot - zero) / (x_high - zero), 0.3 / 0.5, atol=0.01)


def test_forest_fills_the_dot_where_the_interval_leaves_out_the_line():
    gains = [figures.Gain("sure", 0.7, 0.6, 0.8, 1), figures.Gain("unsure", 0.55, 0.45, 0.65, 2), figures.Gain("alone", 0.9, None, None, 3)]
    drawn = figures.forest(gains, "t", line=0.5, form=".0%")
    fills = re.findall(r'<circle [^>]*fill="([^"]+)"', drawn)
    assert fills == ["var(--s1)", "var(--panel)", "var(--panel)"] and drawn.count("stroke-linecap") == 2
    assert ">70%<" in drawn and "60 %" in drawn


def test_smoothing_keeps_lines_straight_and_averages_noise():
    line = [(float(x), 2.0 * x) for x in range(50)]
    np.testing.assert_allclose(figures.smoothed(line), line)
    noise = [(float(x), (-1.0) ** x) for x in range(100)]
    assert max(abs(y) for _, y in figures.smoothed(noise)[10:90]) < 0.2


def test_flat_and_single_point_curves_are_drawn():
    for points in ([(1.0, 0.5)], [(1.0, 0.0), (2.0, 0.0)]):
        drawn = figures.chart([figures.Curve("a", points, 1)], "t", smooth=True)
        assert "nan" not in drawn and drawn.count("<polyline") == 1


def test_the_page_has_every_prompt(made):
    page, _ = page_of(made)
    assert all(prompt in page.text for prompt in PROMPTS)
