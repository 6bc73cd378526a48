"""A scorer behind HTTP: the reference server in its own process, and servers that fail, change or answer nonsense."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dedpo_diffusion.core.console import UserError
from dedpo_diffusion.judges.scorers import http, load_scorer
from dedpo_diffusion.judges.scorers.http import HttpScore, png_base64
from dedpo_diffusion.judges.scorers.server import reference_server
from support.servers import Reply, decoded, serve


def pictures(count: int = 5, size: tuple[int, int] = (7, 5)) -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)) for _ in range(count)]


def brightness(images) -> np.ndarray:
    return np.array([np.asarray(image, dtype=np.float64).mean() for image in images])


PROMPTS = ["a cat", "ein Bär", "", "猫\n\x00 \"'", "a cat"]


def scoring(request):
    """A server that keeps the contract: the mean pixel plus the prompt's length."""
    if request.body is None:
        return Reply({"name": "bright", "version": "v1", "temperature": 2.5})
    assert len(request.body["prompts"]) == len(request.body["images"])
    means = brightness(map(decoded, request.body["images"]))
    return Reply({"version": "v1", "scores": [float(m) + len(p) for m, p in zip(means, request.body["prompts"], strict=True)]})


@pytest.fixture
def server():
    with serve(scoring) as running:
        yield running


def scorer_of(server, naps=None, **options):
    return HttpScore(server.root, sleep=[].append if naps is None else naps.append, **options)


def test_the_reference_server_runs_without_this_package_and_scores(tmp_path):
    """Copied away and in Python's isolated mode, so that neither this project nor its folder can help it."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    copy = shutil.copy(reference_server.__file__, tmp_path / "reference_server.py")
    process = subprocess.Popen([sys.executable, "-I", str(copy), "--port", str(port)], stderr=subprocess.PIPE, cwd=tmp_path)
    try:
        for _ in range(200):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert process.poll() is None, process.stderr.read().decode()
            time.sleep(0.05)
        scorer = load_scorer(f"http=http://127.0.0.1:{port}", device="cpu", batch=2)
        assert (scorer.name, scorer.version, scorer.temperature) == ("brightness", "http-brightness mean-1", 1.0)
        np.testing.assert_allclose(scorer.score(PROMPTS, pictures()), brightness(pictures()), atol=1e-9)
    finally:
        process.kill()
        process.communicate()


def test_the_reference_server_is_short_and_needs_pillow_alone():
    lines = Path(reference_server.__file__).read_text(encoding="utf-8").splitlines()
    assert sum(bool(line.strip()) for line in lines) <= 40
    imported = {line.split()[1].split(".")[0] for line in lines if line.startswith(("import ", "from "))}
    assert imported - set(sys.stdlib_module_names) == {"PIL"}


@pytest.mark.parametrize("batch", [1, 2, 64])
def test_scores_keep_their_prompt_and_image_in_any_batch(server, batch):
    scorer = scorer_of(server, batch=batch)
    found = scorer.score(PROMPTS, pictures())
    assert found.dtype == np.float64 and found.shape == (5,)
    np.testing.assert_array_equal(found, brightness(pictures()) + [len(p) for p in PROMPTS])
    assert [len(request.body["images"]) for request in server.requests[1:]] == {1: [1] * 5, 2: [2, 2, 1], 64: [5]}[batch]
    assert scorer.score([], []).shape == (0,)
    assert (scorer.name, scorer.version, scorer.temperature) == ("bright", "http-bright v1", 2.5)


def test_large_images_make_small_requests(server, monkeypatch):
    monkeypatch.setattr(http, "MOST_CHARACTERS", 2 * len(png_base64(pictures()[0])) + 20)
    np.testing.assert_array_equal(scorer_of(server).score([""] * 5, pictures()), brightness(pictures()))
    assert [len(request.body["images"]) for request in server.requests[1:]] == [2, 2, 1]


def test_images_arrive_pixel_by_pixel_and_without_notes():
    image = pictures(1)[0]
    image.info |= {"icc_profile": b"profile", "exif": b"Exif\x00\x00", "dpi": (10, 10)}
    found = decoded(png_base64(image))
    np.testing.assert_array_equal(np.asarray(found), np.asarray(image))
    assert found.format == "PNG" and found.mode == "RGB" and not {"icc_profile", "exif"} & set(found.info)
    assert decoded(png_base64(image.convert("CMYK"))).mode == "RGB"


def test_a_busy_server_is_asked_again_and_its_retry_after_is_kept(server):
    naps, troubles = [], [Reply({}, 503), Reply(None), Reply({}, 429, {"Retry-After": "7"}), Reply(b"", 500)]
    scorer = scorer_of(server, naps)
    server.answer = lambda request: troubles.pop(0) if troubles else scoring(request)
    np.testing.assert_array_equal(scorer.score([""], pictures(1)), brightness(pictures(1)))
    assert len(naps) == 4 and naps[2] >= 7
    for nap, whole in zip(naps[:2], (1, 2), strict=True):
        assert whole / 2 <= nap <= whole


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (Reply({"detail": "out of memory\nstack"}, 503), r"status 503: out of memory \(the last of 3 attempts\); start the server"),
        (Reply(None), r"the connection broke .* \(the last of 3 attempts\)"),
        (Reply(b"busy", 429, {"Retry-After": "86400"}), r"status 429: busy \(come back in 86400 seconds\); "),
        (Reply({"error": "image too large"}, 413), "status 413: image too large; give http=URL"),
        (Reply(b"", 308, {"Location": "https://else.where/"}), "status 308: https://else.where/"),
    ],
)
def test_a_server_that_keeps_failing_stops_the_run(server, reply, message):
    scorer = scorer_of(server, retries=2)
    server.answer = lambda request: reply
    with pytest.raises(UserError, match=rf"scorer http at {server.root}: {message}") as caught:
        scorer.score([""], pictures(1))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dripping", [False, True])
def test_a_slow_server_meets_the_timeout(server, dripping):
    """A server that sends a byte now and then never rests long, and must not escape."""
    scorer = scorer_of(server, retries=1)
    scorer.connection.timeout = 0.15  # only now, since a busy machine may be slow to greet
    server.answer = lambda request: Reply((b" ",) * 40) if dripping else (time.sleep(0.4), scoring(request))[1]
    with pytest.raises(UserError, match=r"no answer within 0.15 seconds \(the last of 2 attempts\)"):
        scorer.score([""], pictures(1))


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"version": "v1", "scores": [1.0]}, "it answered 1 scores to 2 images"),
        ({"version": "v1", "scores": [1.0, 2.0, 3.0]}, "it answered 3 scores to 2 images"),
        ({"version": "v1", "scores": "12"}, "it answered scores '12' to 2 images"),
        ({"version": "v1"}, "it answered scores None"),
        ({"version": "v1", "scores": [1.0, float("nan")]}, "score 1 of 2 is nan"),
        ({"version": "v1", "scores": [float("inf"), 1.0]}, "score 0 of 2 is inf"),
        ({"version": "v1", "scores": [1.0, "0.5"]}, "score 1 of 2 is '0.5'"),
        ({"version": "v1", "scores": [True, 1.0]}, "score 0 of 2 is True"),
        ({"version": "v1", "scores": [1.0, None]}, "score 1 of 2 is None"),
        ({"version": "v1", "scores": [10**400, 1.0]}, "score 0 of 2 is 1000.*and must be a finite number"),
        ({"version": "v2", "scores": [1.0, 2.0]}, "its version was 'v1' and is 'v2' now; scores of two versions do not compare"),
        ({"scores": [1.0, 2.0]}, "its version was 'v1' and is None now"),
        ([1.0, 2.0], r"it answered \[1.0, 2.0\], and must answer a JSON object"),
        (b"<html>hello", r"an answer that is no JSON \('<html>hello'\); mend the server"),
        (b"", "an answer that is no JSON"),
        (b"[" * 100000, "an answer that is no JSON"),
    ],
)
def test_answers_that_break_the_contract_are_named(server, said, message):
    scorer = scorer_of(server)
    server.answer = lambda request: Reply(said)
    with pytest.raises(UserError, match=message) as caught:
        scorer.score(["", ""], pictures(2))
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"version": "v1"}, "its name is None"),
        ({"name": "../human", "version": "v1"}, "its name is '../human'"),
        ({"name": "a", "version": ""}, "its version is ''"),
        ({"name": "a", "version": 3}, "its version is 3"),
        ({"name": "a", "version": "1\n2"}, "its version is"),
        ({"name": "a", "version": "v", "temperature": 0}, "its temperature is 0"),
        ({"name": "a", "version": "v", "temperature": "1"}, "its temperature is '1'"),
    ],
)
def test_servers_that_do_not_say_who_they_are(said, message):
    with serve(lambda request: Reply(said)) as server, pytest.raises(UserError, match=message):
        scorer_of(server)


def test_versions_of_different_servers_never_meet():
    versions = set()
    for name, version in (("a-b", "c"), ("a", "b-c"), ("a", "b"), ("a", "b c")):
        with serve(lambda request, said={"name": name, "version": version}: Reply(said)) as server:
            versions.add(scorer_of(server).version)
    assert len(versions) == 4


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("http", "http=URL"),
        ("http=imagereward", "'imagereward' is no address"),
        ("http=ftp://127.0.0.1", "is no address"),
        ("http=http://user:secret@127.0.0.1:1", "user name or password"),
        ("http=http://user:secret@127.0.0.1:port", "cannot be read"),
    ],
)
def test_addresses_that_cannot_be_asked(spec, message):
    with pytest.raises(UserError, match=message) as caught:
        load_scorer(spec, device=None, batch=4)
    assert "secret" not in str(caught.value)


def test_a_server_that_does_not_run_is_said_at_once_in_one_line():
    with socket.create_server(("127.0.0.1", 0)) as free:
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    naps = []
    with pytest.raises(UserError, match=rf"scorer http at {url}: no connection \(.*\); start the server, or give http=URL") as caught:
        HttpScore(url, sleep=naps.append)
    assert "\n" not in str(caught.value) and naps == []


def test_a_proxy_in_the_environment_does_not_matter_on_this_machine(server, monkeypatch):
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    assert scorer_of(server).name == "bright"
