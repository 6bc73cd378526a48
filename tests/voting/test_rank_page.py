"""The page of rankings in a real browser, Debian's Chromium, against the real command."""

from __future__ import annotations

import re
import signal
from urllib.parse import urljoin, urlsplit

import pytest

from dedpo_diffusion.labels.files import read_labels, read_votes
from support.browser import PHONE, WATCH_POLICY, WIDE, browser  # noqa: F401
from support.voting import command, finish, image_numbers, make_ranked

pytestmark = pytest.mark.slow  # a browser for each test

SIZE = (160, 120)
OPTIONS = ("--rank", "true", "--repeats", "0", "--overlap", "1")
KNOWN = image_numbers(3, 4, SIZE)


@pytest.fixture
def folder(tmp_path):
    return make_ranked(tmp_path / "d", prompts=3, size=SIZE)


@pytest.fixture
def visit(browser):
    """Open an address in a fresh profile; at the end, nothing but lost connections may have gone wrong in it."""
    contexts, problems = [], []

    def open_page(url, **options):
        context = browser.new_context(**(WIDE | options))
        context.set_default_timeout(15000)
        context.add_init_script(WATCH_POLICY)
        contexts.append(context)
        page, host = context.new_page(), urlsplit(url).hostname
        page.on("console", lambda message: problems.append(message.text) if message.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", lambda request: None if urlsplit(request.url).hostname in (None, host) else problems.append(request.url))
        page.goto(url)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert [problem for problem in problems if "ERR_CONNECTION_REFUSED" not in problem and "ERR_CONNECTION_RESET" not in problem] == []


def ready(page, after=""):
    """Wait for images that can be ranked, others than those of `after`; their ticket."""
    page.wait_for_function("(old) => (document.querySelector('#tiles').dataset.ready ?? old) !== old", arg=after)
    return page.locator("#tiles").get_attribute("data-ready")


def shown(page):
    """(prompt, number) of the image at each place."""
    urls = [urljoin(page.url, image.get_attribute("src")) for image in page.locator(".tile img").all()]
    return [KNOWN[page.request.get(url).body()] for url in urls]


def tile(page, place):
    return page.locator(f".tile[data-place='{place}']")


def badges(page):
    return page.locator(".badge").all_inner_texts()


def ended(page):
    page.wait_for_function("() => !document.querySelector('#end').hidden")


def expected(said):
    """The comparisons that rankings mean: (prompt, number) -> rank, all of them in one dict."""
    found = {}
    for p in {prompt for prompt, _ in said}:
        for a in range(4):
            for b in range(a + 1, 4):
                first, second = said[p, a], said[p, b]
                found[f"p{p}-{a}{b}"] = 0.5 if first == second else float(first < second)
    return found


def labels_of(folder):
    labels = read_labels(folder, "human")
    return dict(zip(labels.pair_id, labels.label_0.tolist(), strict=True))


def note(said, page, ranks):
    for image, rank in zip(shown(page), ranks, strict=True):
        said[image] = rank


def test_mouse_clicks_ties_and_a_drag(folder, visit):
    said = {}
    with command(folder, *OPTIONS) as process:
        page = visit(f"{process.url}?rater=ann")
        first = ready(page)
        for place in (2, 0, 3):
            tile(page, place).click()
        assert badges(page) == ["2", "–", "1", "3"] and page.locator("#order").inner_text() == "3 > 1 > 4"
        note(said, page, [1, 3, 0, 2])
        page.get_by_role("button", name="Done").click()  # the one that was left out comes last
        second = ready(page, first)
        tile(page, 1).click()
        tile(page, 0).click()
        page.get_by_role("button", name="Tie last two").click()
        assert badges(page) == ["1=", "1=", "–", "–"]
        tile(page, 3).click()
        tile(page, 0).click()  # taken out again
        assert badges(page) == ["–", "1", "–", "2"]
        page.get_by_role("button", name="Undo").click()
        assert badges(page) == ["1=", "1=", "–", "3"]
        note(said, page, [0, 0, 3, 2])
        page.get_by_role("button", name="Done").click()
        ready(page, second)
        tile(page, 3).drag_to(tile(page, 0))  # beats it
        tile(page, 1).drag_to(tile(page, 3))  # and is beaten in turn
        assert page.locator("#order").inner_text() == "2 > 4 > 1"
        tile(page, 2).drag_to(tile(page, 1))
        tile(page, 2).drag_to(page.locator("#prompt"))  # nowhere: nothing
        assert page.locator("#order").inner_text() == "3 > 2 > 4 > 1"
        note(said, page, [3, 1, 0, 2])
        page.get_by_role("button", name="Done").click()
        ended(page)
        assert "You ranked 3 and skipped 0." in page.locator("#counts").inner_text()
        page.get_by_role("button", name="Save labels").click()
        page.get_by_text("Saved 18 labels in labels/human.parquet").wait_for()
        page.get_by_role("button", name="Summary").first.click()
        page.locator("#figures").get_by_text("3 rankings (18 comparisons) by 1 person").wait_for()
    assert labels_of(folder) == expected(said)


def test_the_keyboard_alone(folder, visit):
    said = {}
    with command(folder, *OPTIONS) as process:
        page = visit(process.url)
        page.keyboard.type("ann")
        page.keyboard.press("Enter")
        first = ready(page)
        for key in ("4", "2", "=", "1", "3", "Backspace", "3"):
            page.keyboard.press(key)
        assert badges(page) == ["3", "1=", "4", "1="]
        page.keyboard.press("z")
        page.locator("#zoom[open]").wait_for()
        page.keyboard.press("Escape")
        page.keyboard.press("Enter")
        second = ready(page, first)
        page.keyboard.press("u")  # nothing is ranked here: the last ranking is taken back
        assert ready(page, second) == first and badges(page) == ["–"] * 4
        note(said, page, [3, 2, 1, 0])
        for key in ("4", "3", "2", "1", "5", "Enter"):  # there is no fifth image
            page.keyboard.press(key)
        ready(page, first)
        page.keyboard.press("Enter")  # nothing to save yet
        page.keyboard.press("s")
        third = ready(page, second)
        note(said, page, [0, 0, 0, 0])
        for key in "1", "2", "t", "3", "t", "4", "t":
            page.keyboard.press(key)
        assert page.locator("#order").inner_text() == "1 = 2 = 3 = 4" and third
        page.keyboard.press("Enter")
        ended(page)
        code, out, _ = finish(process)
    assert code == 0 and "left out: 1 skips, 1 undone" in out
    assert labels_of(folder) == expected(said)
    votes = read_votes(folder, "human")
    assert len(set(votes.extra["ranking"])) == 2 and len(votes.pair_id) == 12


def test_at_phone_width_everything_is_in_the_window_and_fingers_do_it(folder, visit):
    said = {}
    with command(folder, *OPTIONS) as process:
        page = visit(f"{process.url}?rater=ann", **PHONE)
        first = ready(page)
        sizes = page.evaluate("[document.documentElement.scrollWidth, document.documentElement.scrollHeight, innerWidth, innerHeight]")
        assert (sizes[0] <= sizes[2]) and (sizes[1] <= sizes[3])
        boxes = [tile(page, place).bounding_box() for place in range(4)]
        assert all(box["width"] > 150 and box["height"] > 150 for box in boxes)
        assert all(box["x"] >= 0 and box["x"] + box["width"] <= 390 and box["y"] + box["height"] <= 844 for box in boxes)
        for button in page.locator("#answers button, #tools button").all():
            if button.is_visible():
                box = button.bounding_box()
                assert box["height"] >= 44 and box["x"] >= 0 and box["x"] + box["width"] <= 390
        for place in (1, 0, 2):
            tile(page, place).tap()
        assert badges(page) == ["2", "1", "3", "–"]
        note(said, page, [1, 0, 2, 3])
        page.locator("[data-do=done]").tap()
        second = ready(page, first)
        note(said, page, [0, 1, 2, 3])
        drag_by_touch(page, tile(page, 0).locator(".badge"), tile(page, 1))
        drag_by_touch(page, tile(page, 2).locator(".badge"), tile(page, 3))
        assert page.locator("#order").inner_text() == "1 > 2 > 3 > 4"
        page.locator("[data-do=done]").tap()
        ready(page, second)
        finish(process)
    assert labels_of(folder) == expected(said)


def drag_by_touch(page, source, target):
    """A finger goes from one element to another."""
    (a, b), touch = (one.bounding_box() for one in (source, target)), page.context.new_cdp_session(page)
    start, end = ({"x": box["x"] + box["width"] / 2, "y": box["y"] + box["height"] / 2} for box in (a, b))
    touch.send("Input.dispatchTouchEvent", {"type": "touchStart", "touchPoints": [start]})
    for part in (0.3, 0.6, 1.0):
        point = {key: start[key] + part * (end[key] - start[key]) for key in start}
        touch.send("Input.dispatchTouchEvent", {"type": "touchMove", "touchPoints": [point]})
    touch.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})


@pytest.mark.parametrize("reload", [False, True])
def test_a_kill_of_the_server_between_two_clicks_loses_nothing(folder, visit, reload):
    """Ranked before the kill: kept on disk. Steps before it: kept in the tab, through a reload too. Steps while it is dead: as ever."""
    said = {}
    with command(folder, *OPTIONS) as process:
        page = visit(f"{process.url}?rater=ann")
        port = re.search(r":(\d+)/", process.url)[1]
        first = ready(page)
        note(said, page, [3, 2, 1, 0])
        for key in ("4", "3", "2", "Enter"):
            page.keyboard.press(key)
        second = ready(page, first)
        note(said, page, [0, 2, 1, 3])
        tile(page, 0).click()
        process.send_signal(signal.SIGKILL)
        process.wait()
    if not reload:
        tile(page, 2).click()
        page.keyboard.press("2")
        page.keyboard.press("Enter")  # nobody hears it yet
        page.get_by_text("Connection lost. Your answers are safe").wait_for()
    with command(folder, *OPTIONS, "--port", port) as process:  # the later --port counts
        if reload:
            page.reload()
            assert ready(page) == second and badges(page) == ["1", "–", "–", "–"]
            tile(page, 2).click()
            page.keyboard.press("2")
            page.keyboard.press("Enter")
        third = ready(page, second)
        assert third not in (first, second) and page.locator("#count").inner_text() == "2 of 3"
        code, _, _ = finish(process)
    assert code == 0 and labels_of(folder) == expected(said)
    assert len(read_votes(folder, "human").pair_id) == 12
