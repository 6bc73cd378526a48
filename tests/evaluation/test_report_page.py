"""The page of `dedpo compare` in a real browser, Debian's Chromium, from its file: nothing may be fetched, nothing may go wrong."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from dedpo_diffusion.evaluation import compare
from dedpo_diffusion.evaluation.report import gallery
from dedpo_diffusion.evaluation.report import page as report
from support.browser import HOSTILE, PHONE, WATCH_POLICY, WIDE, browser  # noqa: F401
from support.reports import CHANGE, NAMES, told_by_schema_2
from support.samples import PROMPTS, write_samples
from support.scores import BASE, put_scores, settings

pytestmark = pytest.mark.slow  # a browser for each test

COUNT = 12


@pytest.fixture(scope="module")
def arms(tmp_path_factory):
    """Base, and two arms of which the second is better; some prompts try to be more than text."""
    root, found = tmp_path_factory.mktemp("report"), []
    for seed, (name, values) in enumerate(zip(NAMES, (BASE, BASE - CHANGE / 2, BASE + CHANGE), strict=True)):
        folder = write_samples(root / name, seed)
        table = pq.read_table(folder / "index.parquet")
        prompts = [HOSTILE + prompt if k < 4 else prompt for k, prompt in enumerate(table["prompt"].to_pylist())]
        pq.write_table(table.set_column(table.column_names.index("prompt"), "prompt", [prompts]), folder / "index.parquet")
        found.append(compare.load_arm(put_scores(folder, truth=values, proxy=-values)))
        for row in found[-1].rows:
            row["category"] = "first & <b>" if row["prompt_index"] < 3 else "second"
    return found


@pytest.fixture(scope="module")
def file(arms, tmp_path_factory):
    """The page with all that the schema may hold, and answers of people on three pairs."""
    changed = settings([arm.folder for arm in arms], out=tmp_path_factory.mktemp("out") / "report.html")
    results = told_by_schema_2(compare.analyse(changed, arms))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gallery, "people_said", lambda arms: [[None] * 12, *[[1.0, 0.0, -0.5, *[None] * 9]] * (len(arms) - 1)])
        report.write_report(changed, arms, results)
    return changed.out


@pytest.fixture
def visit(browser):
    """Open a file in a fresh profile; no request but for it, no word on the console, no dialog, at any time."""
    contexts, problems = [], []

    def open_page(file, **options):
        context = browser.new_context(**(WIDE | options))
        context.set_default_timeout(15000)
        contexts.append(context)
        if options.get("java_script_enabled", True):
            context.add_init_script(WATCH_POLICY)
        page = context.new_page()
        page.on("console", lambda message: problems.append(message.text))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("dialog", lambda dialog: (problems.append(dialog.message), dialog.dismiss()))
        page.on("request", lambda asked: None if asked.url.startswith((file.as_uri(), "data:")) else problems.append(asked.url))
        page.goto(file.as_uri())
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert problems == []


def rows(page):
    return [int(row) for row in page.locator(".pair").evaluate_all("all => all.map((pair) => pair.dataset.row)")]


def where(values, sign, reverse=False):
    """Rows in the order of their values, those of one sign."""
    order = np.argsort(-values if reverse else values, kind="stable")
    return [int(row) for row in order if np.sign(values[row]) == sign]


def change(arms, k, scorer="truth"):
    return arms[k].scores[scorer] - arms[0].scores[scorer]


def cut(page, number=0):
    """How much of the arm's image is cut off on the left, in percent."""
    shape = page.locator(".stage img.right").nth(number).evaluate("(image) => getComputedStyle(image).clipPath")
    return float(shape.removesuffix("%)").split()[-1])


# ---- the slider


def test_the_slider_follows_mouse_and_keys(visit, file):
    page = visit(file)
    stage = page.locator(".stage").first
    stage.scroll_into_view_if_needed()
    box = stage.bounding_box()
    assert cut(page) == 50
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.mouse.down()
    for share in (0.4, 0.2):
        page.mouse.move(box["x"] + share * box["width"], box["y"] + box["height"] / 2)
        assert cut(page) == pytest.approx(100 * share, abs=2)
    page.mouse.up()
    page.mouse.move(box["x"] + 0.9 * box["width"], box["y"] + box["height"] / 2)
    assert cut(page) == pytest.approx(20, abs=2) and cut(page, 1) == 50  # let go; and it is this pair's alone
    before = cut(page)
    page.keyboard.press("ArrowRight")
    assert cut(page) == before + 1
    page.keyboard.press("End")
    assert cut(page) == 100
    slider = page.get_by_role("slider").first
    assert slider.get_attribute("aria-label").startswith("base left of the line, tuned right of it: <img src=")
    assert slider.get_attribute("aria-valuetext") == "100 % base"


def test_the_slider_follows_a_finger(visit, file):
    page = visit(file, **PHONE)
    stage = page.locator(".stage").first
    stage.scroll_into_view_if_needed()
    box = stage.bounding_box()
    page.touchscreen.tap(box["x"] + 0.25 * box["width"], box["y"] + box["height"] / 2)
    assert cut(page) == pytest.approx(25, abs=2)
    page.get_by_role("button", name="Side by side").click()
    left, right = (stage.locator("img").nth(k).bounding_box() for k in range(2))
    assert left["x"] + left["width"] <= right["x"] and left["width"] == right["width"] > 100
    assert stage.locator("img.right").evaluate("(image) => getComputedStyle(image).clipPath") == "none"


# ---- which pairs


def test_filters_show_exactly_the_pairs_they_name(visit, file, arms):
    page, gain = visit(file), change(arms, 2)
    assert rows(page) == [*range(COUNT)] and page.locator("#count").inner_text() == "12 of 12 pairs: base against tuned"
    for name, sign in (("Wins", 1), ("Losses", -1), ("Ties", 0)):
        expected = [row for row in range(COUNT) if np.sign(gain[row]) == sign]
        page.get_by_role("button", name=f"{name} {len(expected)}").click()
        assert expected and rows(page) == expected
    page.get_by_role("button", name="Largest regressions").click()
    assert rows(page) == where(gain, -1) and page.get_by_label("order").input_value() == "worst"
    page.get_by_role("button", name="human_only").click()
    assert rows(page) == where(change(arms, 1), -1) != where(gain, -1)
    assert page.locator(".stage .name.right").first.inner_text() == "human_only"
    page.get_by_label("by scorer").select_option("proxy")
    assert rows(page) == where(change(arms, 1, "proxy"), -1)
    page.get_by_label("by scorer").select_option("people")
    assert rows(page) == [2]
    page.get_by_role("button", name="Ties 1").click()
    assert rows(page) == [1]
    page.get_by_role("button", name="All 12").click()
    page.get_by_label("order").select_option("best")
    assert rows(page) == [0, 1, 2, *range(3, 12)]  # those that nobody judged come last


def test_order_search_and_category(visit, file, arms):
    page, gain = visit(file), change(arms, 2)
    page.get_by_label("order").select_option("best")
    assert rows(page) == [int(row) for row in np.argsort(-gain, kind="stable")]
    page.get_by_label("order").select_option("sampled")
    page.get_by_label("in prompts").fill(PROMPTS[4].upper())
    assert rows(page) == [8, 9]
    page.get_by_label("in prompts").fill("<SCRIPT>")
    assert rows(page) == [0, 1, 2, 3]
    page.get_by_label("in prompts").fill("no such prompt")
    assert rows(page) == [] and page.locator("#count").inner_text() == "No pair is like that." and page.locator("#more").is_hidden()
    page.get_by_label("in prompts").fill("")
    page.locator("#category").select_option("first & <b>")
    assert rows(page) == [0, 1, 2, 3, 4, 5]
    page.get_by_role("button", name="Wins 5").click()
    assert rows(page) == [1, 2, 3, 4, 5]


def test_a_card_holds_prompt_seed_category_and_scores_as_text(visit, file, arms):
    page = visit(file)
    card = page.locator(".pair").nth(1)
    assert card.locator(".prompt").inner_text() == HOSTILE + PROMPTS[0] and card.locator(".prompt *").count() == 0
    assert card.locator(".facts").inner_text() == "seed 101 · first & <b>"
    lines = [line.split("\t") for line in card.locator(".marks").inner_text().replace("\n\t", "\t").split("\n")]
    base, tuned = (arms[k].scores["truth"][1] for k in (0, 2))
    assert lines == [
        ["truth", f"{base:.3f} → {tuned:.3f}", "+0.400 ▲"],
        ["people", "", "0.000"],
        ["proxy", f"−{base:.3f} → −{tuned:.3f}", "−0.400 ▼"],
    ]
    card.scroll_into_view_if_needed()
    page.wait_for_function("() => document.querySelectorAll('.pair img')[3].naturalWidth === 64")
    assert card.locator("img.right").get_attribute("alt") == f"tuned: {HOSTILE}{PROMPTS[0]}"
    shown = card.locator("img.right").evaluate("""async (image) => {
        const canvas = new OffscreenCanvas(64, 64).getContext("2d");
        canvas.drawImage(image, 0, 0);
        return [...canvas.getImageData(0, 0, 64, 64).data];
    }""")
    drawn = np.asarray(Image.open(arms[2].folder / arms[2].rows[1]["file"]))
    np.testing.assert_array_equal(np.array(shown).reshape(64, 64, 4)[..., :3], drawn)


def test_the_enlarged_pair_and_its_keys(visit, file, arms):
    page, order = visit(file), where(change(arms, 2), -1)
    page.get_by_role("button", name="Largest regressions").click()
    page.get_by_role("button", name="Enlarge").first.click()
    box, place = page.get_by_role("dialog"), page.locator("#place")
    prompt = [arms[0].rows[row]["prompt"] for row in order]
    for key, at in (("", 0), ("ArrowRight", 1), ("ArrowRight", 2), ("ArrowLeft", 1), ("ArrowLeft", 0), ("ArrowLeft", 0)):
        if key:
            page.keyboard.press(key)
        assert (place.inner_text(), box.locator(".prompt").inner_text()) == (f"{at + 1} of {len(order)}", prompt[at])
        page.wait_for_function("() => [...document.querySelectorAll('dialog img')].every((image) => image.naturalWidth === 64)")
        assert [image.get_attribute("alt") for image in box.locator("img").all()] == [f"base: {prompt[at]}", f"tuned: {prompt[at]}"]
        assert box.locator("img").first.bounding_box()["width"] > 300
    assert box.get_by_role("button", name="Previous pair").is_disabled()
    page.keyboard.press("Escape")
    box.wait_for(state="hidden")
    assert page.evaluate("() => document.activeElement.className") == "enlarge"


# ---- the page as a whole


@pytest.mark.parametrize("device", [WIDE, PHONE, {"viewport": {"width": 320, "height": 600}}], ids=["wide", "phone", "narrow"])
def test_the_page_never_scrolls_sideways_and_warns_at_once(visit, file, device):
    page = visit(file, **device)
    width = device["viewport"]["width"]
    alert = page.get_by_role("alert")
    assert alert.is_visible() and alert.bounding_box()["y"] < device["viewport"]["height"]
    for press in ((), ("Side by side",), ("Enlarge",)):
        for name in press:
            page.get_by_role("button", name=name).first.click()
        assert page.evaluate("() => document.documentElement.scrollWidth") == width
    box = page.get_by_role("dialog").bounding_box()
    assert box["x"] >= 0 and box["x"] + box["width"] <= width


def test_without_scripts_the_strips_are_there(visit, file):
    page = visit(file, java_script_enabled=False)
    for title, count in (("Side by side", 6), ("Largest gains", 4), ("Largest regressions", 4)):
        part = page.locator("section", has=page.get_by_role("heading", name=title, exact=True))
        assert part.locator(".strip").count() == count and part.locator("img").first.is_visible()
    assert page.locator("#gallery").is_hidden() and page.get_by_text("Drag across").is_hidden()
    assert visit(file).get_by_role("heading", name="Largest gains").count() == 0


def test_of_500_pairs_few_are_built_and_fewer_read(visit, arms, tmp_path):
    """The page says how many of how many it shows, and only what is near the window has a picture."""
    count = 510
    gain, base = np.linspace(-1, 1, count), arms[0]
    numbered = [base.rows[0] | {"seed": k, "prompt_index": k // 2, "prompt": f"prompt {k // 2}", "category": None} for k in range(count)]
    two = [replace(base, name=name, rows=numbered, scores={"truth": x}) for name, x in zip(NAMES[:2], (0 * gain, gain), strict=True)]
    changed = settings([base.folder] * 2, out=tmp_path / "report.html", resamples=100)
    report.write_report(changed, two, compare.analyse(changed, two))
    page = visit(changed.out)
    assert page.get_by_text(
        "500 of 510 pairs: the 125 whose truth rose most and the 125 whose truth fell most, and 250 evenly"
    ).is_visible()
    assert page.locator(".pair").count() == 24 and page.locator(".pair img[src]").count() <= 12
    assert page.locator("#count").inner_text() == "500 of 500 pairs: base against human_only"
    page.locator(".pair").first.scroll_into_view_if_needed()
    page.wait_for_function("() => document.querySelector('.pair img').naturalWidth === 64")
    assert 0 < page.locator(".pair img[src]").count() <= 24
    page.get_by_role("button", name="Show 24 more (476 left)").click()
    assert page.locator(".pair").count() == 48 and page.locator("#more").inner_text() == "Show 24 more (452 left)"
    page.get_by_role("button", name="Largest regressions").click()
    assert rows(page) == [*range(24)]  # the steepest falls are among those shown
