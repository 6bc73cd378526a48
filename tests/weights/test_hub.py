"""`dedpo export --push` against a stand-in of the hub: just what was announced arrives, and nothing of this machine or of the token."""

from __future__ import annotations

import json
import platform
import re
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import load_file, save_file

from dedpo_diffusion.core.console import UserError
from dedpo_diffusion.core.texts import size_words
from dedpo_diffusion.pipelines import export, train
from dedpo_diffusion.weights.header import read_header
from dedpo_diffusion.weights.hub import check_private, without_paths
from support.hub import TOKEN, hub  # noqa: F401 - one is a fixture
from support.training import arguments, fresh_accelerate_state  # noqa: F401 - a fixture

NAME = "someone/tuned-lora"


def spread(mean: float, low: float, high: float) -> dict:
    return {"mean": mean, "ci": [low, high]}


def results(folder: str) -> dict:
    """As `dedpo compare` writes them, with a warning that names a folder and people by their names."""
    scored = {"gain_over_base": spread(0.12, 0.05, 0.2), "win_rate_vs_base": spread(0.6, 0.5, 0.7), "n": 40}
    people = {
        "answers": 30, "pairs": 12, "raters": ["ann", "bob"], "agreement": {"raw": {"value": 0.6}}, "with_scorers": {},
    }  # fmt: skip
    arm = {"by_scorer": {"clip": scored}, "categories": {}, "spread": {}, "people": people, "warnings": [f"{folder}/a.png is grey."]}
    return {
        "schema": 2, "verdict": "On clip, tuned is better than base.", "notes": [], "primary": "clip", "base": "base", "n_images": 40,
        "n_prompts": 20, "resamples": 1000, "seed": 0, "differences": {}, "arms": {"base": {"by_scorer": {}}, "tuned": arm},
        "scorers": {"clip": {"version": "1", "kind": "scorer", "role": "held_out", "held_out": True}},
    }  # fmt: skip


@pytest.fixture(scope="module")
def run(tiny_model, tiny_pairs, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("pushed") / "run"
    assert train.main(arguments(tiny_model, tiny_pairs, out, optim__steps=2, checkpoint_every=1, lora__rank=2, lora__alpha=1)) == 0
    return out


@pytest.fixture
def report(tmp_path) -> Path:
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "results.json").write_text(json.dumps(results(str(tmp_path / "samples"))))
    Image.new("RGB", (8, 8)).save(tmp_path / "report" / "contact_sheet.png")
    return tmp_path / "report" / "results.json"


def announced(text: str) -> dict[str, str]:
    """Name and size of each file that was announced."""
    return dict(re.findall(r"^  (\S+)  ([\d.]+ \w+)", text, re.M))


def push(run: Path, out: Path, *more: object) -> int:
    return export.main([str(run), "--out", str(out), "--push", NAME, *map(str, more)])


def test_just_what_was_announced_arrives(hub, run, report, tmp_path, capfd):
    """Model, card, results and the picture that the card shows, in one commit; then the same again changes nothing."""
    out = tmp_path / "share" / "tuned.safetensors"
    assert push(run, out, "--results", report, "--private", "true") == 0
    shown = capfd.readouterr()
    held = hub.repositories[NAME]
    sheet = next(name for name in held.files if name.endswith(".png"))
    assert set(held.files) == {"tuned.safetensors", "README.md", "results.json", sheet}
    assert announced(shown.out) == {name: size_words(len(data)) for name, data in held.files.items()}
    assert held.private and held.commits == ["Add tuned.safetensors"]
    assert held.files["tuned.safetensors"] == out.read_bytes() and held.lfs == {"tuned.safetensors"}
    card = (out.parent / "README.md").read_text()
    assert held.files["README.md"].decode() == card.replace(f"{tmp_path}/samples/", "") != card and f"({sheet})" in card
    assert shown.out.index("results.json  ") < shown.out.index("sent: all 4 files")
    assert hub.tokens == {f"Bearer {TOKEN}"} and TOKEN not in shown.out + shown.err

    assert push(run, out, "--results", report) == 0
    assert "it is there, and private" in capfd.readouterr().out
    assert len(held.commits) == 1 and len(hub.puts) == 1


def test_nothing_of_this_machine_is_sent(hub, run, report, tmp_path):
    assert push(run, tmp_path / "share" / "tuned.safetensors", "--results", report) == 0
    everything = b"".join(hub.repositories[NAME].files.values())
    for word in (str(tmp_path), str(run.parent), str(Path.home()), platform.node(), "/tmp/"):
        assert word.encode() not in everything, word
    held = json.loads(hub.repositories[NAME].files["results.json"])
    assert held["arms"]["tuned"]["people"]["raters"] == 2
    assert held["arms"]["tuned"]["warnings"] == ["a.png is grey."]
    wanted = results("")  # the numbers are the same
    for key in ("verdict", "scorers", "n_images", "primary"):
        assert held[key] == wanted[key]
    assert json.loads(report.read_text())["arms"]["tuned"]["people"]["raters"] == ["ann", "bob"]  # the file here stays


def test_a_whole_model_is_sent_as_its_folder(hub, run, tmp_path, capfd):
    """A merged model, whose own parts name the folder that they were loaded from."""
    out = tmp_path / "whole"
    assert push(run, out, "--format", "merged") == 0
    held = hub.repositories[NAME]
    assert set(held.files) == {file.relative_to(out).as_posix() for file in out.rglob("*") if file.is_file()}
    assert set(announced(capfd.readouterr().out)) == set(held.files)
    assert not held.private and "model_index.json" in held.files and "unet/diffusion_pytorch_model.safetensors" in held.files
    texts = {name: data for name, data in held.files.items() if not name.endswith((".safetensors", "vocab.json", "merges.txt"))}
    assert all(b"/tmp/" not in data and str(run.parent).encode() not in data for data in texts.values())


def test_a_lora_file_goes_without_a_card(hub, run, tmp_path, capfd):
    assert export.main([str(run), "--out", str(tmp_path / "one.safetensors")]) == 0
    assert push(tmp_path / "one.safetensors", tmp_path / "two.safetensors") == 0
    assert set(hub.repositories[NAME].files) == {"two.safetensors"}
    assert "no model card" in capfd.readouterr().out


def test_metadata_with_a_path_are_not_sent(hub, run, tmp_path, capfd):
    """What another program wrote into a LoRA; kohya's facts are kept by an export."""
    assert export.main([str(run), "--out", str(tmp_path / "one.safetensors")]) == 0
    one = tmp_path / "one.safetensors"
    save_file(load_file(one), one, metadata=read_header(one).metadata | {"modelspec.description": "from /home/ann/loras/one"})
    assert push(one, tmp_path / "two.safetensors") == 2
    said = capfd.readouterr().err
    assert "modelspec.description" in said and "/home/ann/loras/one" in said and "nothing is sent" in said
    assert hub.asked == []


def test_a_picture_with_a_path_in_it_is_not_sent(hub, run, report, tmp_path, capfd):
    told = PngInfo()
    told.add_text("parameters", "C:\\Users\\ann\\models\\base.safetensors")
    Image.new("RGB", (8, 8)).save(report.parent / "contact_sheet.png", pnginfo=told)
    assert push(run, tmp_path / "share" / "tuned.safetensors", "--results", report) == 2
    assert "parameters" in capfd.readouterr().err and hub.asked == []


# ---- what stands in the way


@pytest.mark.parametrize(
    ("method", "path", "said", "status", "arrived"),
    [
        ("PUT", r"/lfs/.*", (400, "no room"), "broke off", "none of the 2 files arrived"),
        ("POST", r".*/preupload/main", (403, "you may not write here"), "you may not write here", "none of the 2 files arrived"),
        ("POST", r".*/commit/main", (400, "closed"), "broke off", "none of the 2 files arrived"),
        ("POST", r".*/commit/main", "hang up", "broke off", "none of the 2 files arrived"),
        ("POST", r"/api/repos/create", (403, "you may not"), "broke off", "could not be asked"),
    ],
)
def test_a_broken_upload_says_what_arrived_and_is_taken_up(method, path, said, status, arrived, hub, run, tmp_path, capfd):
    hub.refuse = lambda asked, where: said if asked == method and re.fullmatch(path, where) else None
    assert push(run, tmp_path / "tuned.safetensors") == 2
    shown = capfd.readouterr()
    assert status in shown.err and arrived in shown.err, shown.err
    assert TOKEN not in shown.out + shown.err and "Traceback" not in shown.err
    hub.refuse = lambda asked, where: None
    assert push(run, tmp_path / "tuned.safetensors") == 0
    assert set(hub.repositories[NAME].files) == {"tuned.safetensors", "README.md"}
    assert len(hub.puts) == 1  # what was stored before the break is not sent again
    assert len(hub.repositories[NAME].commits) == 1


def test_an_answer_that_is_lost_is_no_failure(hub, run, tmp_path, capfd):
    """The commit is made, and the hub hangs up before it says so."""
    hub.refuse = lambda asked, where: "after" if where.endswith("/commit/main") else None
    assert push(run, tmp_path / "tuned.safetensors") == 0
    assert "sent: all 2 files" in capfd.readouterr().out
    assert set(hub.repositories[NAME].files) == {"tuned.safetensors", "README.md"}


def test_a_token_in_the_hubs_own_words_is_not_repeated(hub, run, tmp_path, capfd):
    hub.token = "another"
    assert push(run, tmp_path / "tuned.safetensors") == 2
    shown = capfd.readouterr()
    assert TOKEN not in shown.out + shown.err and "nothing was sent" in shown.err


def test_a_public_repository_is_not_taken_for_a_private_one(hub, run, tmp_path, capfd):
    assert push(run, tmp_path / "tuned.safetensors") == 0
    assert "everyone can see" in capfd.readouterr().out
    assert push(run, tmp_path / "again.safetensors", "--private", "true") == 2
    assert "is public" in capfd.readouterr().err
    assert "again.safetensors" not in hub.repositories[NAME].files


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--push", "one/two/three"], "OWNER/NAME"),
        (["--push", "alone"], "OWNER/NAME"),
        (["--push", "some one/name"], "OWNER/NAME"),
        (["--private", "true"], "--push"),
    ],
)
def test_refused_before_anything_is_made(more, said, hub, run, tmp_path, capfd):
    assert export.main([str(run), "--out", str(tmp_path / "x.safetensors"), *more]) == 2
    assert said in capfd.readouterr().err
    assert not (tmp_path / "x.safetensors").exists() and hub.asked == []


def test_without_a_login_nothing_is_made(hub, run, tmp_path, capfd, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no token"))
    assert push(run, tmp_path / "x.safetensors") == 2
    assert "hf auth login" in capfd.readouterr().err
    assert not (tmp_path / "x.safetensors").exists() and hub.asked == []


# ---- paths in texts


WORDS = st.text("abcXYZ019-_.", min_size=1, max_size=8).filter(lambda word: word.strip("."))


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(WORDS, min_size=2, max_size=5), st.sampled_from(["{}", "see {} there", '"{}"', "({})", "file={}", "a\n{}\nb", "{}, {}"]))
def test_every_absolute_path_is_found_and_cut(parts, around):
    for path in ("/" + "/".join(parts), "~/" + "/".join(parts), "C:\\" + "\\".join(parts), "D:/" + "/".join(parts)):
        text = around.format(path, path)
        with pytest.raises(UserError, match="nothing is sent"):
            check_private("a text", text)
        cut = without_paths({"k": [text]})["k"][0]
        assert path not in cut and "/" not in cut and "\\" not in cut and parts[-1].rstrip(".") in cut
        check_private("a text", cut)


@pytest.mark.parametrize(
    "text",
    [
        "https://huggingface.co/owner/name",
        "runs/tuned",
        "owner/base-model",
        "and/or",
        "1/2/3 of it",
        "</p><br/>",
        "a / b",
        "[x](https://a.b/c/d)",
        "10:30",
    ],
)
def test_what_is_no_path_is_left(text):
    check_private("a text", text)
    assert without_paths(text) == text


def test_the_machines_name_is_found(monkeypatch):
    monkeypatch.setattr(platform, "node", lambda: "bench-17")
    with pytest.raises(UserError, match="bench-17"):
        check_private("a text", "made on bench-17.")
    check_private("a text", "made on workbench-171")
