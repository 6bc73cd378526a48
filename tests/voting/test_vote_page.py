"""The page of `dedpo vote` in a real browser, Debian's Chromium, against the real command."""

from __future__ import annotations

import io
import re
from urllib.parse import urljoin, urlsplit

import numpy as np
import pytest
from PIL import Image

from dedpo_diffusion.core.records import Pair
from dedpo_diffusion.evaluation.comparison import people
from dedpo_diffusion.evaluation.comparison.samples import read_index
from dedpo_diffusion.labels.files import read_labels, read_votes
from dedpo_diffusion.pairs.dataset import PairReader, PairWriter
from dedpo_diffusion.shapes.world import render, sample_scene
from support.browser import HOSTILE, PHONE, WATCH_POLICY, WIDE, browser, press, ready  # noqa: F401
from support.voting import command, finish, make_samples

pytestmark = pytest.mark.slow  # a browser for each test

TOKEN = "abcdefghijklmnopqrst"


def png(image):
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def shapes_pairs(folder, count):
    """Two scenes to each prompt, and prompts that try to be more than text."""
    rng = np.random.default_rng(0)
    with PairWriter(folder) as writer:
        for k in range(count):
            scene = sample_scene(rng)
            images = png(render(scene)), png(render(sample_scene(rng, scene.attributes)))
            writer.add(Pair(f"p{k}", HOSTILE + scene.attributes.prompt, *images))
    return folder


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A voting that many tests share, each with a rater of its own: everybody is asked about every pair."""
    with command(shapes_pairs(tmp_path_factory.mktemp("page") / "shapes", 8), "--overlap", "1", "--repeats", "0") as server:
        yield server


@pytest.fixture
def visit(browser):
    """Open an address in a fresh profile; at the end, nothing but what a test expects may have gone wrong in it."""
    contexts, pages = [], []

    def open_page(url, *, context=None, first=lambda page: None, **options):
        if context is None:
            context = browser.new_context(**({"viewport": {"width": 1280, "height": 800}} | options))
            context.set_default_timeout(15000)
            context.add_init_script(WATCH_POLICY)
            contexts.append(context)
        page = context.new_page()
        page.problems, host = [], urlsplit(url).netloc
        page.on("console", lambda message: page.problems.append(message.text) if message.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: page.problems.append(str(error)))
        page.on("dialog", lambda dialog: (page.problems.append(dialog.message), dialog.dismiss()))
        page.on("request", lambda request: None if urlsplit(request.url).netloc in ("", host) else page.problems.append(request.url))
        pages.append(page)
        first(page)
        page.goto(url)
        return page

    yield open_page
    problems = [problem for page in pages for problem in page.problems]
    for context in contexts:
        context.close()
    assert problems == []


# ---- what a person does and sees


def as_rater(server, name):
    return f"{server.url}?rater={name}"


def count(page):
    return page.locator("#count").inner_text()


def shown_files(page):
    """The files behind the images on the left and on the right."""
    ready(page)
    return [page.request.get(urljoin(page.url, image.get_attribute("src"))).body() for image in page.locator("#images img").all()]


def record_votes(page):
    """What the page sends from now on."""
    sent = []
    page.on("request", lambda request: sent.append(request.post_data_json) if request.url.endswith("/api/vote") else None)
    return sent


# ---- the journey


def answer_here(page, reader, said, key, value):
    """Press a key, and note what it says of image 0: `value` is for the image on the left."""
    first, second = shown_files(page)
    pair = next(pair for pair in reader.iter_pairs() if {pair.image_0, pair.image_1} == {first, second})
    press(page, key)
    said[pair.pair_id] = 1 - value if value is not None and first == pair.image_1 else value
    return pair.pair_id


LEFT, TIE, RIGHT, SKIP = 1.0, 0.5, 0.0, None
PRESSED = [
    ("ArrowLeft", LEFT), ("ArrowRight", RIGHT), ("ArrowDown", TIE), ("a", LEFT), ("d", RIGHT), ("t", TIE), ("s", SKIP), ("1", LEFT),
    ("2", RIGHT), ("Space", TIE), ("ArrowLeft", LEFT), ("D", RIGHT), ("ArrowLeft", LEFT),
]  # fmt: skip


def test_labels_are_what_was_pressed_after_undo_and_restart(visit, tmp_path):
    folder, said = shapes_pairs(tmp_path / "data", 12), {}
    reader = PairReader(folder)
    with command(folder, "--repeats", "0") as server:
        page = visit(server.url)
        page.get_by_label("Your name").fill("Zoë & Søn")
        page.keyboard.press("Enter")
        for key, value in PRESSED[:10]:
            last = answer_here(page, reader, said, key, value)
        assert count(page) == "10 of 12" and page.locator("#saved").inner_text() == "saved: tie"
        before = ready(page)
        page.keyboard.press("u")
        ready(page, after=before)
        assert count(page) == "9 of 12" and page.locator("#saved").inner_text() == "undone"
        page.context.close()
        assert finish(server)[0] == 0
    with command(folder, "--repeats", "0") as server:
        page = visit(as_rater(server, "Zo%C3%AB%20%26%20S%C3%B8n"))
        assert answer_here(page, reader, said, *PRESSED[10]) == last  # what was undone is asked again
        for key, value in PRESSED[11:]:
            answer_here(page, reader, said, key, value)
        page.get_by_role("heading", name="Nothing left to label").wait_for()
        assert "You answered 11 and skipped 1." in page.locator("#counts").inner_text()
        page.get_by_role("button", name="Save labels").click()
        page.get_by_text("Saved 11 labels in labels/human.parquet.").wait_for()
        labels = read_labels(folder, "human")
        page.get_by_role("button", name="Summary").click()
        row = page.locator("#figures tr", has_text="Zoë & Søn").inner_text().split("\t")
        assert row[:3] == ["Zoë & Søn", "11", "2"]
    assert len(said) == 12
    assert dict(zip(labels.pair_id, labels.label_0.tolist(), strict=True)) == {k: v for k, v in said.items() if v is not None}
    votes = read_votes(folder, "human")
    assert set(votes.rater) == {"Zoë & Søn"} and all(seconds > 0 for seconds in votes.extra["seconds"])


def test_a_lost_connection_loses_nothing_and_a_lost_token_is_said(visit, tmp_path):
    folder = shapes_pairs(tmp_path / "data", 6)
    with command(folder, "--repeats", "0", "--token", TOKEN) as server:
        page = visit(server.url)
        assert TOKEN not in page.url
        page.get_by_label("Your name").fill("Mina")
        page.get_by_role("button", name="Start").click()
        press(page, "ArrowLeft")
        assert finish(server)[0] == 0
        sent, ticket = record_votes(page), ready(page)
        page.keyboard.press("ArrowRight")
        page.get_by_text("Connection lost").wait_for()
        page.keyboard.press("ArrowLeft")  # the first answer is on its way still, so this is none
    with command(folder, "--repeats", "0", "--token", TOKEN, "--port", str(urlsplit(server.url).port)):
        page.get_by_role("button", name="Try now").click()
        ready(page, after=ticket)
        assert page.get_by_role("alert").is_hidden()
        assert count(page) == "2 of 6"
        assert {(vote["ticket"], vote["answer"]) for vote in sent} == {(ticket, "right")}
        page.context.clear_cookies()
        page.keyboard.press("ArrowLeft")
        page.get_by_role("alert").get_by_text("open the address that dedpo vote printed").wait_for()
    assert page.problems and all("Failed to load resource" in problem for problem in page.problems)
    page.problems.clear()


def test_two_models_are_voted_on_blind(visit, tmp_path):
    """What is pressed is what the vote file holds, after an undo; the page names no model and tells nobody who is ahead."""
    two = [make_samples(tmp_path / name, prompts=3, same=(5,)) for name in ("quokka", "wombat")]
    rows = {np.asarray(Image.open(two[1] / row["file"])).tobytes(): row["file"] for row in read_index(two[1])}
    said = {}

    def answer(page, key):
        pixels = [np.asarray(Image.open(io.BytesIO(data))).tobytes() for data in shown_files(page)]
        file = next(rows[image] for image in pixels if image in rows)
        press(page, key)
        if key != "s":
            said[file] = 0.5 if key == "t" else float((key == "ArrowLeft") == (pixels[0] in rows))

    with command(two, "--repeats", "0") as server:
        page = visit(as_rater(server, "Mina"))
        answer(page, "ArrowRight")
        before = ready(page)
        page.keyboard.press("u")
        ready(page, after=before)
        assert page.locator("#everyone").inner_text() == "answered by anyone: 0 of 5" and page.title() == "Two models · dedpo vote"
        for key in ("ArrowLeft", "ArrowLeft", "t", "s", "ArrowRight"):
            answer(page, key)
        page.get_by_role("heading", name="Nothing left to answer").wait_for()
        assert "4 of 5 pairs have an answer." in page.locator("#counts").inner_text()
        page.get_by_role("button", name="Save answers").click()
        page.get_by_text("Saved the answers on 5 pairs.").wait_for()
        shown = page.locator("body").inner_text()
        page.get_by_role("button", name="Summary").click()
        page.locator("#figures").get_by_text("4 answers by 1 person on 4 of 5 pairs, of ").wait_for()
        shown += page.locator("body").inner_text() + page.content()
        assert not re.search("quokka|wombat|win|ahead|better|worse", shown.replace("window", ""))
    votes = people.read_votes(two[0], read_index(two[0]), two[1], read_index(two[1]))
    files = [read_index(two[1])[row]["file"] for row in votes.row]
    assert dict(zip(files, votes.preferred.tolist(), strict=True)) == said | {"005-wombat.png": 0.5}


# ---- one answer to one pair


def test_a_key_held_down_votes_once(server, visit):
    page = visit(as_rater(server, "held"))
    ticket, sent = ready(page), record_votes(page)
    for key in ("ArrowLeft", "Enter"):
        page.keyboard.down(key)
        ticket = ready(page, after=ticket)
        for _ in range(5):
            page.keyboard.down(key)  # without a release in between: auto-repeat
        page.keyboard.up(key)
        page.get_by_role("button", name="Right").focus()  # Enter presses it
    press(page, "t")
    assert [vote["answer"] for vote in sent] == ["left", "right", "tie"]


def test_fast_presses_vote_once(server, visit):
    page = visit(as_rater(server, "hasty"))
    ticket, sent = ready(page), record_votes(page)
    page.evaluate("""() => {
        const press = () => document.querySelector("[data-do=left]").click();
        press();
        const pressing = setInterval(press, 10);
        const stop = () => images.children.length && setTimeout(() => clearInterval(pressing), 150);
        new MutationObserver(stop).observe(images, { childList: true }); // until 150 ms after the next pair appeared
    }""")
    ready(page, after=ticket)
    assert len(sent) == 1 and count(page) == "1 of 8"


def test_nothing_is_sent_before_both_images_are_seen(server, visit):
    page = visit(as_rater(server, "early"), first=lambda page: page.route("**/image/*/right", lambda route: None))
    page.locator("#vote").wait_for()
    sent = record_votes(page)
    for key in ("ArrowLeft", "ArrowRight", "t", "s"):
        page.keyboard.press(key)
    page.get_by_role("button", name="Left").click()
    assert page.locator("#images img").count() == 0
    page.unroute("**/image/*/right")  # lets go of those held
    press(page, "ArrowLeft")
    assert [vote["answer"] for vote in sent] == ["left"]


def test_a_pair_answered_elsewhere_is_said_and_not_overwritten(server, visit):
    page = visit(as_rater(server, "twofold"))
    other = visit(as_rater(server, "twofold"), context=page.context)
    assert ready(page) == ready(other)
    press(page, "ArrowLeft")
    other.keyboard.press("ArrowRight")
    other.get_by_role("alert").get_by_text("That was not saved").wait_for()
    assert ready(other, after="") == ready(page) and count(other) == "1 of 8"
    assert len(other.problems) == 1 and "409" in other.problems.pop()


def test_an_image_that_cannot_be_shown_can_be_skipped_only(server, visit):
    def spoil(page):
        page.route("**/image/*/left", lambda route: route.fulfill(body=b"no image", content_type="image/png"))

    page = visit(as_rater(server, "unlucky"), first=spoil)
    page.get_by_text("An image cannot be shown").wait_for()
    sent = record_votes(page)
    page.unroute("**/image/*/left")
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("s")
    ready(page)
    assert [vote["answer"] for vote in sent] == ["skip"]


def test_time_in_a_hidden_tab_does_not_count(server, visit):
    page = visit(as_rater(server, "slow"))
    ready(page)
    sent = record_votes(page)
    hide = """(value) => {
        Object.defineProperty(document, "hidden", { value, configurable: true });
        document.dispatchEvent(new Event("visibilitychange"));
    }"""
    page.evaluate(hide, True)
    page.wait_for_timeout(1500)
    page.evaluate(hide, False)
    press(page, "ArrowLeft")
    since_opened = page.evaluate("performance.now()") / 1000
    assert 0 < sent[0]["seconds"] < since_opened - 1.5


# ---- what is on the screen


def test_a_prompt_is_text_whatever_it_holds(server, visit):
    page = visit(as_rater(server, "reader"))
    ready(page)
    assert page.locator("#prompt").inner_text().startswith(HOSTILE)
    assert page.locator("#prompt *").count() == 0


def test_zoom_opens_and_closes_and_a_tap_is_no_vote(server, visit):
    page = visit(as_rater(server, "zoomer"))
    sent, small = record_votes(page), None
    zoomed, image = page.locator("#zoom"), page.get_by_alt_text("left image")
    ready(page)
    small = image.bounding_box()["width"]
    for opening, closing in (("z", "z"), ("Z", "Escape")):
        page.keyboard.press(opening)
        zoomed.wait_for()
        assert image.bounding_box()["width"] > small
        page.keyboard.press(closing)
        zoomed.wait_for(state="hidden")
        page.wait_for_function("() => !zoom.contains(images)")  # as an expression it would need eval
    image.click()
    zoomed.wait_for()
    image.click()
    zoomed.wait_for(state="hidden")
    assert sent == []
    page.keyboard.press("z")
    press(page, "ArrowRight")  # a large pair can be answered, and the next one has its prompt
    assert zoomed.is_hidden() and [vote["answer"] for vote in sent] == ["right"]


def test_keys_of_the_browser_and_of_open_panels_are_no_votes(server, visit):
    page = visit(as_rater(server, "careful"))
    ready(page)
    sent = record_votes(page)
    for key in ("Control+a", "Alt+ArrowDown", "x", "Shift", "Enter"):
        page.keyboard.press(key)
    page.keyboard.press("?")
    page.get_by_role("heading", name="Keys").wait_for()
    for key in ("ArrowLeft", "t", "s"):
        page.keyboard.press(key)
    page.keyboard.press("Escape")
    page.get_by_role("heading", name="Keys").wait_for(state="hidden")
    press(page, "s")
    assert [vote["answer"] for vote in sent] == ["skip"]


def test_the_space_bar_is_a_tie_after_a_click_and_presses_a_button_reached_by_tab(server, visit):
    page = visit(as_rater(server, "spacious"))
    ticket, sent = ready(page), record_votes(page)
    page.get_by_role("button", name="Left").click()
    ready(page, after=ticket)
    press(page, "Space")
    while page.evaluate("document.activeElement.dataset.do") != "right":
        page.keyboard.press("Tab")
    press(page, "Space")
    assert [vote["answer"] for vote in sent] == ["left", "tie", "right"]


def test_the_name_is_remembered_and_offered(server, visit):
    page = visit(server.url)
    page.get_by_label("Your name").fill("  ")
    page.get_by_role("button", name="Start").click()
    assert page.locator("#start").is_visible()  # blanks are no name
    page.get_by_label("Your name").fill("  Ada ")
    page.keyboard.press("Enter")
    press(page, "t")
    page.reload()
    press(page, "t")  # the same tab is the same person
    assert count(page).startswith("2 of")
    page = visit(server.url, context=page.context)
    page.locator("#raters option").first.wait_for(state="attached")
    assert page.locator("#start").is_visible() and page.get_by_label("Your name").input_value() == "Ada"
    assert "Ada" in page.locator("#raters option").evaluate_all("options => options.map((option) => option.value)")
    assert page.get_by_role("heading").inner_text() == "shapes"


def test_another_person_can_take_over_the_tab(server, visit):
    page = visit(as_rater(server, "first"))
    press(page, "t")
    page.get_by_role("button", name="Summary").click()
    page.get_by_role("button", name="Change name").click()
    name = page.get_by_label("Your name")
    name.wait_for()
    assert name.input_value() == ""
    page.reload()
    name.wait_for()  # neither the address nor the tab knows the first any more
    name.fill("second")
    page.keyboard.press("Enter")
    ready(page)
    assert count(page).startswith("0 of")


def test_a_lost_connection_hides_neither_progress_nor_answers(server, visit):
    page = visit(as_rater(server, "cut off"))
    ready(page)
    page.problems = []  # the browser notes the failed requests
    page.context.set_offline(True)
    page.keyboard.press("t")
    banner = page.get_by_role("alert")
    banner.wait_for()
    bottom = page.wait_for_function("() => document.documentElement.style.getPropertyValue('--banner').replace('px', '') * 1").json_value()
    assert bottom == pytest.approx(banner.bounding_box()["height"], abs=1)
    places = [page.locator(name).bounding_box() for name in ("#progress", "#vote header button", "#answers", "#everyone")]
    assert min(box["y"] for box in places) >= bottom and max(box["y"] + box["height"] for box in places) <= 800
    page.context.set_offline(False)
    banner.wait_for(state="hidden")
    ready(page)
    page.wait_for_function("() => document.documentElement.style.getPropertyValue('--banner') === '0px'")
    page.problems.clear()


def test_a_total_that_falls_because_others_answer_is_explained(visit, tmp_path):
    with command(shapes_pairs(tmp_path / "few", 6), "--overlap", "0", "--repeats", "0") as server:
        mine, theirs = visit(as_rater(server, "ann")), visit(as_rater(server, "bob"))
        press(mine, "t")
        assert count(mine) == "1 of 6" and mine.locator("#saved").inner_text() == "saved: tie"
        press(theirs, "t", "t")
        press(mine, "t")
        assert count(mine) == "2 of 4" and "others answered some of your pairs" in mine.locator("#saved").inner_text()


ON_ITS_SIDE = PHONE | {"viewport": {"width": 844, "height": 390}}


@pytest.mark.parametrize("device", [WIDE, PHONE, ON_ITS_SIDE], ids=["wide", "phone", "on its side"])
def test_everything_is_visible_without_scrolling(server, visit, device):
    def lengthen(route):
        reply = route.fetch()
        route.fulfill(response=reply, body=reply.text().replace('"prompt":"', '"prompt":"' + "still life with fruit, " * 80, 1))

    size = device["viewport"]
    page = visit(as_rater(server, f"viewer {size}"), first=lambda page: page.route("**/api/next*", lengthen), **device)
    for prompt in ("long", "short"):
        ticket = ready(page)
        images = [image.bounding_box() for image in page.locator("#images img").all()]
        buttons = [button.bounding_box() for button in page.locator("#vote button:visible").all()]
        for box in [*images, *buttons, page.locator("#prompt").bounding_box()]:
            assert 0 <= box["x"] <= size["width"] - box["width"] and 0 <= box["y"] <= size["height"] - box["height"]
        assert page.evaluate("[document.documentElement.scrollWidth, document.documentElement.scrollHeight]") == [*size.values()]
        assert page.locator("#prompt").bounding_box()["height"] <= 0.2 * size["height"] + 1
        assert page.locator("#prompt.long").count() == (prompt == "long")
        sides = [images[0]["width"], images[0]["height"], images[1]["width"], images[1]["height"]]
        assert sides == pytest.approx([sides[0]] * 4, abs=0.1) and sides[0] > 100
        assert (images[0]["y"] + sides[1] <= images[1]["y"]) == (device is PHONE)  # stacked
        page.get_by_role("button", name="Tie").click()
        ready(page, after=ticket)
    style = page.locator("#images img").first.evaluate("(i) => [getComputedStyle(i).imageRendering, getComputedStyle(i).backgroundColor]")
    assert style == ["pixelated", "rgb(255, 255, 255)"]
    if "has_touch" in device:
        assert min(min(box["width"], box["height"]) for box in buttons) >= 44
        assert page.locator("kbd:visible").count() == 0
    names = page.locator("#answers button").evaluate_all("all => all.map((b) => b.querySelector('span')?.textContent ?? 'Tie')")
    assert names == (["Top", "Tie", "Bottom"] if device is PHONE else ["Left", "Tie", "Right"])
