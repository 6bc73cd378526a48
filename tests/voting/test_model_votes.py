"""`dedpo vote BASE ARM`: two models' images, blind; what is served, what becomes of the answers, what is refused."""

from __future__ import annotations

import io
import json
import re
import struct
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dedpo_diffusion.core.console import UserError
from dedpo_diffusion.core.records import Votes
from dedpo_diffusion.evaluation.compare import compare
from dedpo_diffusion.evaluation.comparison.model_votes import open_samples, outcome, read_samples
from dedpo_diffusion.evaluation.comparison.people import read_votes, votes_left_out
from dedpo_diffusion.evaluation.comparison.samples import read_index
from dedpo_diffusion.labels.agreement import vote_summary
from dedpo_diffusion.pipelines.vote import main
from dedpo_diffusion.settings import CompareSettings, VoteSettings
from dedpo_diffusion.voting.plan import Plan, turns
from dedpo_diffusion.voting.sample_export import to_answers
from support.scores import put_scores
from support.voting import client_of, command, finish, in_process, make_samples, post


@pytest.fixture
def two(tmp_path):
    """Base and arm, 12 prompts with 2 seeds each; images 3, 8 and 9 are the same in both."""
    return [make_samples(tmp_path / name, same=(3, 8, 9)) for name in ("quokka", "wombat")]


def pixels(data):
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).tobytes()


def votes_of(base, arm):
    return read_votes(base, read_index(base), arm, read_index(arm))


# ---- the journey


def wish(row):
    """What everybody says of an image of the arm: better, worse, a tie; or they skip."""
    return (1.0, 0.0, 0.5, 1.0, None)[row["seed"] % 5]


def answer_everything(url, rater, rows):
    """Vote until nothing is left; returns [(file of the arm, preferred or None, whether the arm stood on the left)]; `rows` by pixels."""
    said = []
    with client_of(url) as client:
        state = client.get("/api/next", params={"rater": rater}).json()
        while item := state["item"]:
            left, right = (rows.get(pixels(client.get(item[side]).content)) for side in ("left", "right"))
            assert (left is None) != (right is None)
            row = left or right
            assert row["prompt"] == item["prompt"]
            arm, base = ("left", "right") if left else ("right", "left")
            answer = {1.0: arm, 0.0: base, 0.5: "tie", None: "skip"}[wish(row)]
            state = post(client, "/api/vote", rater=rater, ticket=item["ticket"], answer=answer, seconds=0.5)
            said.append((row["file"], wish(row), left is not None))
    return said


@pytest.mark.slow
def test_answers_of_two_people_are_what_the_vote_file_holds(two, capsys):
    base, arm = two
    rows = {pixels((arm / row["file"]).read_bytes()): row for row in read_index(arm)}
    with command(two, "--repeats", "0.3", "--overlap", "0.5") as server:
        greeting = server.stdout.readline() + server.stdout.readline()
        assert "21 pairs of 11 prompts" in greeting  # of one, both images are the same
        assert "3 more of identical images" in greeting
        with ThreadPoolExecutor(2) as pool:
            said = dict(zip(("anna", "ben"), pool.map(lambda who: answer_everything(server.url, who, rows), ("anna", "ben")), strict=True))
        with client_of(server.url) as client:
            found = client.get("/api/summary").json()
        code, out, err = finish(server)
    assert (code, err) == (0, "") and f"wrote {arm / 'votes' / 'vs-quokka.parquet'}" in out and "dedpo compare" in out
    assert [rater["rater"] for rater in found["raters"]] == ["anna", "ben"] and found["between"]["raw"]["value"] == 1
    assert any("Krippendorff's alpha 1.00" in sentence for sentence in found["sentences"]) and found["judges"] == []
    assert any("identical images so far" in sentence and sentence.endswith(": 3.") for sentence in found["sentences"])
    votes = votes_of(base, arm)
    files = [row["file"] for row in read_index(arm)]
    read = [(files[row], rater, preferred) for row, rater, preferred in zip(votes.row, votes.rater, votes.preferred.tolist(), strict=True)]
    for rater, pressed in said.items():
        kept = [(file, rater, preferred) for file, preferred, _ in pressed if preferred is not None]
        assert [entry for entry in read if entry[1] == rater] == kept
        mine = [votes.repeat[k] for k, entry in enumerate(read) if entry[1] == rater]
        assert sum(mine) > 0 and [file for (file, *_), again in zip(kept, mine, strict=True) if again].count(kept[0][0]) <= 1
    assert [entry for entry in read if entry[1] == ""] == [(file, "", 0.5) for file in files if file[:3] in ("003", "008", "009")]
    table = pq.read_table(arm / "votes" / "vs-quokka.parquet")
    sides = set(zip(*(table[name].to_pylist() for name in ("rater", "file", "swapped")), strict=True))
    assert sides >= {(rater, file, left) for rater, pressed in said.items() for file, preferred, left in pressed if preferred is not None}
    assert table["file_base"].to_pylist() == [file.replace("wombat", "quokka") for file in table["file"].to_pylist()]
    for words in ("better", "worse", "no difference", "win"):
        assert words not in out
    capsys.readouterr()
    assert main([str(base), str(arm), "--export_only", "true", "--repeats", "0.3", "--overlap", "0.5"]) == 0
    told = capsys.readouterr().out
    wishes = {row["file"]: wish(row) for row in rows.values()} | {file: 0.5 for file in files if file[:3] in ("003", "008", "009")}
    judged = [value for value in wishes.values() if value is not None]
    assert f"wombat wins {np.mean(judged):.1%} (95 %: " in told and f"of {len(judged)} pairs of 12 prompts" in told


@pytest.mark.slow
def test_a_killed_server_loses_nothing_and_other_images_are_refused(two, capsys):
    base, arm = two
    options = ("--repeats", "0")
    with command(two, *options) as server, client_of(server.url) as client:
        state = client.get("/api/next", params={"rater": "anna"}).json()
        for _ in range(5):
            state = post(client, "/api/vote", rater="anna", ticket=state["item"]["ticket"], answer="left", seconds=1)
        server.kill()
        server.wait()
    assert votes_of(base, arm) is None
    assert [note[:8] for note in left_out(base, arm)] == ["5 votes "]
    with in_process(VoteSettings(two, port=0, repeats=0)) as (_, url), client_of(url) as client:
        after = client.get("/api/next", params={"rater": "anna"}).json()
        assert after["progress"]["answered"] == 5 and after["item"] == state["item"]
        assert set(post(client, "/api/export")) == {"labels", "sentences"}
    assert sum(rater == "anna" for rater in votes_of(base, arm).rater) == 5
    index = pq.read_table(arm / "index.parquet")  # another order of the rows is no other images
    pq.write_table(index.take(np.arange(len(index))[::-1]), arm / "index.parquet")
    assert main([*map(str, two), *options, "--export_only", "true"]) == 0
    assert sum(rater == "anna" for rater in votes_of(base, arm).rater) == 5
    row = read_index(arm)[0]
    Image.new("RGB", (8, 8)).save(arm / row["file"])  # the arm is sampled again
    assert main([*map(str, two), *options]) == 2
    assert "begun with other images than the two folders hold now" in capsys.readouterr().err
    assert votes_of(base, arm) is None


# ---- blind


def chunks(png):
    """Names of a PNG file's chunks."""
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    names, at = [], 8
    while at < len(png):
        names.append(png[at + 4 : at + 8])
        at += 12 + struct.unpack(">I", png[at : at + 4])[0]
    return names


def traffic(folders):
    """All that two people are served, of whom one always says left and one skips; a pair's images without their sides.

    Tickets and times of day are left out.
    """
    heard, raw = [], b""

    def note(*answers):
        nonlocal raw
        told = []
        for answer in answers:
            head = {name: value for name, value in answer.headers.items() if name != "date"}
            raw += str(answer.url).partition("127.0.0.1")[2].encode() + repr(head).encode() + answer.content
            told.append((answer.status_code, sorted(head.items()), re.sub(rb"[0-9a-f]{20}", b"TICKET", answer.content)))
        heard.append(sorted(told))
        return answers[0]

    voting = VoteSettings(folders, port=0, repeats=0.3, overlap=1)  # both are asked about all: which pairs are shared hangs on tickets
    with in_process(voting) as (_, url), client_of(url) as client:
        for path in ("/", "/static/vote.js", "/static/vote.css", "/api/summary", "/nowhere", "/image/" + "0" * 20 + "/left"):
            note(client.get(path))
        for rater, answer in (("anna", "left"), ("ben", "skip")):
            state = note(client.get("/api/next", params={"rater": rater})).json()
            while item := state["item"]:
                images = [client.get(item[side]) for side in ("left", "right")]
                note(*images)
                assert all(set(chunks(image.content)) == {b"IHDR", b"IDAT", b"IEND"} for image in images)
                body = {"rater": rater, "ticket": item["ticket"], "answer": answer, "seconds": 1}
                state = note(client.post("/api/vote", json=body)).json()
            note(client.post("/api/undo", json={"rater": rater}))
        for path in ("/api/session", "/api/summary"):
            note(client.get(path))
        note(client.post("/api/export", json={}))
    return heard, raw


def test_nothing_that_is_served_tells_which_model_drew_which_image(tmp_path):
    """Swapping the folders, of which one holds WebP files, changes no byte of all that is served, but for sides and tickets."""
    two = [make_samples(tmp_path / name, prompts=8, kind=kind) for name, kind in (("quokka", "PNG"), ("wombat", "WEBP"))]
    (there, raw), (back, swapped) = traffic(two), traffic(two[::-1])
    assert there == back and len(there) > 40
    for folder in two:
        assert (folder / "votes").is_dir() and folder.name.encode() in (folder / read_index(folder)[0]["file"]).read_bytes()
        assert folder.name.encode() not in raw + swapped
    assert raw != swapped


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 9), st.sampled_from("ab"), st.sampled_from([0.0, 0.5, 1.0]), st.booleans()), min_size=1))
def test_the_summary_is_the_same_with_the_two_models_exchanged(said):
    def summed(exchanged):
        pair, rater, label_0, swapped = zip(*said, strict=True)
        label_0 = np.abs(np.array(label_0) - exchanged)
        extra = {"swapped": [side != exchanged for side in swapped], "repeat": [False] * len(said)}
        votes = Votes([str(k) for k in pair], label_0, np.ones(len(said), np.int64), list(rater), extra)
        return json.loads(json.dumps(vote_summary(votes, resamples=50)), parse_float=lambda text: round(float(text), 9))

    assert summed(False) == summed(True)


def test_an_image_that_is_gone_is_told_without_saying_whose(tmp_path):
    two = [make_samples(tmp_path / name, prompts=3) for name in ("quokka", "wombat")]
    told = set()
    for folder in two:
        with in_process(VoteSettings(two, port=0, name=f"without-{folder.name}")) as (_, url), client_of(url) as client:
            held = {path: path.read_bytes() for path in folder.glob("*.png")}
            for path in held:
                path.unlink()
            item = client.get("/api/next", params={"rater": "anna"}).json()["item"]
            told |= {(client.get(item[side]).status_code, client.get(item[side]).text) for side in ("left", "right")}
            post(client, "/api/vote", rater="anna", ticket=item["ticket"], answer="skip", seconds=1)
            for path, data in held.items():
                path.write_bytes(data)
    ((status, text),) = told
    assert status == 404 and "skip the pair" in text


def test_the_arm_stands_left_half_the_time_and_elsewhere_against_another_arm(tmp_path):
    """200 pairs: shares lie within 4 standard errors of a half."""
    base, *arms = [make_samples(tmp_path / name, prompts=100, size=(2, 2)) for name in ("base", "one", "other")]
    sides = []
    for arm in arms:
        reader = read_samples(base, arm)
        plan, where = Plan(reader.ids(), seed=0), {row["seed"]: i for i, (_, row) in enumerate(reader.asked)}
        sides.append([plan.swapped("anna", where[seed]) for seed in sorted(where)])
        assert len(set(plan.ids)) == 200
    for share in (np.mean(sides[0]), np.mean(sides[1]), np.mean(np.equal(*sides))):
        assert abs(share - 0.5) < 4 * np.sqrt(0.25 / 200)


# ---- the order, and pairs of identical images


@settings(deadline=None)
@given(st.dictionaries(st.text(max_size=3), st.integers(1, 4), min_size=1, max_size=8), st.integers(0, 99), st.randoms())
def test_every_prompt_comes_once_before_any_comes_again(counts, seed, shuffler):
    images = [(prompt, k) for prompt, count in counts.items() for k in range(count)]
    order = {}
    for _ in range(2):
        shuffler.shuffle(images)
        keys = turns(*zip(*images, strict=True), seed)
        order[tuple(images[i] for i in np.argsort(keys))] = None
    (order,) = order  # whatever the order of the rows
    for turn in range(max(counts.values())):
        now = [prompt for prompt, count in counts.items() if count > turn]
        came, order = order[: len(now)], order[len(now) :]
        assert sorted(prompt for prompt, _ in came) == sorted(now)


def test_prompts_with_more_seeds_do_not_come_earlier():
    """400 seeds: a prompt with 9 seeds comes before one with a single seed half the time, within 4 standard errors."""
    prompts, seeds = ["many"] * 9 + ["one"], range(10)
    earlier = [bool(turns(prompts, seeds, seed)[:9].min() < turns(prompts, seeds, seed)[9]) for seed in range(400)]
    assert abs(np.mean(earlier) - 0.5) < 4 * np.sqrt(0.25 / 400)


def test_identical_images_are_ties_from_when_their_turn_comes(two):
    """At any time, what was asked and what counts as a tie is the beginning of one order that knows nothing of the images."""
    reader = read_samples(*two)
    rows = [arm for _, arm in (*reader.asked, *reader.identical)]
    keys = turns([row["prompt"] for row in rows], [row["seed"] for row in rows], 0)
    order = [rows[i]["file"] for i in np.argsort(keys)]
    assert sorted(row["file"][:3] for _, row in reader.identical) == ["003", "008", "009"]
    with open_samples(VoteSettings(two, repeats=0, overlap=0)) as voting:
        assert to_answers(voting.service, reader) == []
        for number in range(21):
            state = voting.service.state("anna")
            voting.service.vote("anna", state["item"]["ticket"], "skip" if number == 4 else "left", 1.0)
            found = [row["file"] for row in to_answers(voting.service, reader)]
            skipped = {order[k] for k in range(len(order)) if order[k] in order[: len(found) + 1]} - set(found) if number >= 4 else set()
            assert set(found) | skipped == set(order[: len(found) + len(skipped)]) and len(skipped) == (number >= 4)
        last = to_answers(voting.service, reader)
    assert len(last) == 23 and all((row["preferred"], row["seconds"]) == (0.5, None) for row in last if row["rater"] == "")


# ---- what is said at the end


def answered(values, prompts):
    return [
        {"file": f"{k}.png", "prompt": prompt, "seed": k, "rater": "anna", "preferred": value, "repeat": False}
        for k, (value, prompt) in enumerate(zip(values, prompts, strict=True))
    ]  # fmt: skip


def test_the_outcome_counts_every_pair_once_and_leaves_repetitions_out():
    """Three people on one pair (1, 1, 0), one on another (0.5): (1 + 1/2) / 2 = 75 %; a repetition changes nothing."""
    answers = answered([1.0, 0.5], ["a", "b"])
    answers += [{**answers[0], "rater": "ben"}, {**answers[0], "rater": "cleo", "preferred": 0.0}]
    again = [{**answers[0], "preferred": 0.0, "repeat": True}]
    words = outcome("base", "tuned", answers)  # of the gain: 2 * (2/3 + 1/2) / 2 - 1
    assert words == outcome("base", "tuned", answers + again)
    assert "cannot be told apart, gain +0.167 (95 %: " in words
    assert "tuned wins 75.0% (95 %: " in words and "of 2 pairs of 2 prompts, ties counted as half (50.0% of" in words
    assert "tuned is better than base" in outcome("base", "tuned", answered([1.0] * 30, range(30)))
    assert "tuned is worse than base" in outcome("base", "tuned", answered([0.0] * 30, range(30)))


def test_one_prompt_has_no_interval_and_no_interval_ends_beyond_100_percent():
    words = outcome("base", "tuned", answered([1.0, 0.5], ["a", "a"]))
    assert "tuned wins 75.0% of 2 pairs of one prompt" in words and "there is no interval" in words and "95 %" not in words
    words = outcome("base", "tuned", answered([1.0] * 39 + [0.0], range(40)))  # Student's interval of the mean would end at 102.6 %
    assert 97.5 < float(re.search(r"tuned wins 97.5% .95 %: [0-9.]+% to ([0-9.]+)%", words)[1]) < 100


def vote(two, *answers, **options):
    """What anna answers to the next pairs, stored and not written, as a killed server leaves it."""
    with open_samples(VoteSettings(two, **options)) as voting:
        for answer in answers:
            item = voting.service.state("anna")["item"]
            voting.service.vote("anna", item["ticket"], answer, 1.0)


def test_what_is_printed_is_what_compare_finds(two, capsys):
    vote(two, *("left", "right", "tie", "left", "left", "right", "left", "left", "left", "tie", "left", "right", "left", "left"))
    capsys.readouterr()
    assert main([*map(str, two), "--export_only", "true"]) == 0
    told = capsys.readouterr().out
    for folder in two:
        put_scores(folder, truth=np.arange(24.0))
    found = compare(CompareSettings(two, out=two[0] / "report.html"))
    people = found["arms"]["wombat"]["by_scorer"]["people"]
    gain, wins = people["gain_over_base"], people["win_rate_vs_base"]
    assert f"gain {gain['mean']:+.3f} (95 %: {gain['ci'][0]:+.3f} to {gain['ci'][1]:+.3f})" in told
    assert f"wombat wins {wins['mean']:.1%} (95 %: {wins['ci'][0]:.1%} to {wins['ci'][1]:.1%}) of {people['n']} pairs" in told
    assert not [note for note in found["notes"] if "vote" in note]


# ---- votes that do not count are told


def left_out(base, arm):
    return votes_left_out(base, read_index(base), arm, read_index(arm))


def test_answers_of_one_instant_are_all_counted(two, monkeypatch):
    from dedpo_diffusion.voting import store

    class Clock:
        @staticmethod
        def now(_):
            return store_time

    store_time = store.datetime.now(store.UTC)
    monkeypatch.setattr(store, "datetime", Clock)
    vote(two, "left", "tie", "right", repeats=0)
    assert left_out(*two)[0].startswith("3 votes in ")
    assert main([*map(str, two), "--repeats", "0", "--export_only", "true"]) == 0 and left_out(*two) == []


def test_votes_that_were_not_written_are_told_with_the_command_that_writes_them(two, capsys):
    assert left_out(*two) == []
    vote(two, "left", "skip", "tie", "right", repeats=0)
    (note,) = left_out(*two)
    kept, command = two[1] / "votes" / "vs-quokka.sqlite", f"dedpo vote {two[0]} {two[1]} --repeats 0 --export_only true"
    assert note == f"3 votes in {kept} do not count, since vs-quokka.parquet was not written with them; write it: `{command}`."
    assert main(note.split("`")[1].split()[2:]) == 0 and left_out(*two) == []
    vote(two, "left", repeats=0)
    assert left_out(*two)[0].startswith("1 vote in ")
    with open_samples(VoteSettings(two, repeats=0)) as voting:
        for _ in range(2):
            voting.service.undo("anna")
    assert "1 vote in" in left_out(*two)[0] and "count, and were undone since" in left_out(*two)[0]
    vote(two, "left", name="second")
    assert "--name second --export_only true" in left_out(*two)[0]
    for folder in two:
        put_scores(folder, truth=np.arange(24.0))
    assert set(left_out(*two)) <= set(compare(CompareSettings(two, out=two[0] / "report.html"))["notes"])
    capsys.readouterr()


@pytest.mark.parametrize("written", [True, False])
def test_votes_on_images_that_were_changed_since_are_told(two, tmp_path, written):
    vote(two, "left", "tie", "right")
    assert not written or main([*map(str, two), "--export_only", "true"]) == 0
    other = make_samples(tmp_path / "other")
    assert left_out(other, two[1]) == []  # another base: quiet
    Image.new("RGB", (8, 8)).save(two[0] / read_index(two[0])[0]["file"])
    (note,) = left_out(*two)
    assert note.startswith("3 votes in ") and "are of other images than" in note and "vote again, with another --name" in note
    assert votes_of(*two) is None


@pytest.mark.parametrize("change", [{"seed": 7}, {"prompt": "another"}, {"file_base": "001-quokka.png"}])
def test_votes_on_another_prompt_seed_or_pair_are_refused(two, change):
    vote(two, "left", "tie", "right")
    assert main([*map(str, two), "--export_only", "true"]) == 0
    path = two[1] / "votes" / "vs-quokka.parquet"
    table = pq.read_table(path)
    rows = table.to_pylist()
    row = next(row for row in rows if row["file_base"] != "001-quokka.png")
    row.update(change)
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), path)
    with pytest.raises(UserError, match=r"cannot be read as votes on .* \(row \d+ .*another --name"):
        votes_of(*two)


def test_prompts_exchanged_in_an_index_take_no_votes_along(two):
    vote(two, *["left"] * 21, repeats=0)
    assert main([*map(str, two), "--repeats", "0", "--export_only", "true"]) == 0
    for folder in two:  # the same prompts and seeds, the same files, paired otherwise
        reindex(folder, lambda rows, by: [by[100].update(seed=101), by[101].update(seed=100)])
    with pytest.raises(UserError, match=r"of seed 10\d, and the index has 10\d"):
        votes_of(*two)


# ---- what is refused


def reindex(folder, change):
    rows = pq.read_table(folder / "index.parquet").to_pylist()
    change(rows, {row["seed"]: row for row in rows})
    pq.write_table(pa.Table.from_pylist(rows), folder / "index.parquet")


def shrink(folder):
    file = folder / read_index(folder)[0]["file"]
    Image.open(file).resize((4, 6)).save(file)


def occupy(folder):
    (folder / "votes").mkdir()
    (folder / "votes" / "vs-quokka.parquet").write_bytes(b"")


def spoil(folder):
    file = folder / read_index(folder)[0]["file"]
    file.write_bytes(file.read_bytes()[:60])


BREAK = {
    "other seed": (lambda arm: reindex(arm, lambda rows, by: by[105].update(seed=7)), "'prompt 2' with seed 105, and "),
    "other prompt": (lambda arm: reindex(arm, lambda rows, by: by[105].update(prompt="x")), "'prompt 2' with seed 105, and "),
    "further image": (lambda arm: reindex(arm, lambda rows, by: rows.remove(by[100])), "'prompt 0' with seed 100, and "),
    "twice": (lambda arm: reindex(arm, lambda rows, by: by[101].update(seed=100)), "prompt 'prompt 0' with seed 100"),
    "size": (shrink, "has 4 x 6 pixels, "),
    "no image": (spoil, "cannot be decoded"),
    "foreign file": (occupy, "made by another voting"),
}


@pytest.mark.parametrize("case", BREAK)
def test_folders_that_cannot_be_voted_on_are_told(tmp_path, capsys, case):
    base, arm = (make_samples(tmp_path / name, prompts=4) for name in ("quokka", "wombat"))
    change, words = BREAK[case]
    change(arm)
    assert main([str(base), str(arm)]) == 2
    told = capsys.readouterr().err
    assert words in told and str(arm) in told and not (arm / "votes" / "vs-quokka.sqlite").exists()


def test_the_same_images_and_settings_that_cannot_be_meant_are_told(tmp_path, capsys):
    base, arm = (make_samples(tmp_path / name, prompts=1, same=(0, 1)) for name in ("quokka", "wombat"))
    for options, words in (
        ([base, arm], "there is nothing to vote on"), ([base, base], "there is nothing to vote on"), ([base, arm, arm], "3 folders are"),
        ([base, arm, "--order", "disagreement"], "--order disagreement is for a pair dataset"), ([arm], "dedpo vote BASE"),
        ([base, arm, "--judges", "['clip']"], "--judges is for"), ([base, arm, "--name", "../x"], "cannot name a file"),
        ([base, arm, "--export_only", "true"], "nobody has voted yet"), ([base, tmp_path / "none"], "there is no"),
    ):  # fmt: skip
        assert main(list(map(str, options))) == 2
        assert words in capsys.readouterr().err
    assert not (arm / "votes").exists()
