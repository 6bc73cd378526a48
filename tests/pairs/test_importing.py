"""What becomes of a source's comparisons: policies, sides, duplicates, votes, counts, and going on after an interruption."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dedpo_diffusion.core.console import UserError
from dedpo_diffusion.labels.files import label_names, label_origin, read_labels, read_votes, vote_names
from dedpo_diffusion.pairs.dataset import PairReader
from dedpo_diffusion.pairs.formats.comparison import Answer, Comparison, counted, image_source, number, text
from dedpo_diffusion.pairs.formats.importing import Journal, Ledger, count_lines, take_in
from dedpo_diffusion.settings import IngestSettings
from support.pictures import picture

PICTURES = [picture(seed) for seed in range(40)]
COUNTED = ("kept", "duplicates_merged", "identical_dropped", "unlabelled_dropped", "ties_dropped", "unreadable_dropped")


class Rows:
    """A source in memory: each row is a list of comparisons, as a ranking's row is."""

    columns, fingerprint = ("everything",), "1"

    def __init__(self, rows):
        self.list, self.count = rows, len(rows)

    def rows(self, start=0):
        for k, row in enumerate(self.list[start:], start):
            yield f"file row {k}", {"entries": row}, None


def chosen(rows, *, winner_first=False, last=None):
    """A format over `rows` that breaks down like a killed process when row `last` is asked for."""

    def entries(row, where, folder, settings):
        if last is not None and where == f"file row {last}":
            raise KeyboardInterrupt
        return [Comparison(where, **entry) for entry in row["entries"]]

    return SimpleNamespace(name="mine", module=SimpleNamespace(WINNER_FIRST=winner_first, entries=entries), source=Rows(rows))


def compare(first, second, *answers, prompt="a cross", **more):
    """One comparison of two of the pictures."""
    images = tuple(PICTURES[image] if isinstance(image, int) else image for image in (first, second))
    return {"prompt": prompt, "images": images, "answers": tuple(answers), **more}


def take(folder, rows, *, options=None, winner_first=False, last=None):
    """Import rows (each a comparison or a list of them) and return the ledger."""
    rows = [row if isinstance(row, list) else [row] for row in rows]
    choices = IngestSettings("mine", "memory", folder, **{"workers": 2} | (options or {}))
    journal = Journal(folder, {"of": "this test"})
    ledger = journal.read(journal.shards())
    if not journal.shards():
        journal.begin()
    done = []
    take_in(chosen(rows, winner_first=winner_first, last=last), choices, folder, journal, ledger, done.append)
    assert sum(done) <= len(rows)
    return ledger


def labels_of(folder):
    labels = read_labels(folder, "human")
    return dict(zip(labels.pair_id, labels.label_0.tolist(), strict=True))


WIN, LOSS, TIE = Answer(1.0), Answer(0.0), Answer(0.5)


# ---- counting


def test_what_is_kept_arrives_with_its_images_labels_and_source(tmp_path):
    rows = [compare(0, 1, WIN, key="a", source={"model": "m"}), compare(2, 3, LOSS), compare(4, 5, TIE, prompt="a ring"), compare(6, 7)]
    ledger = take(tmp_path, rows)
    pairs = list(PairReader(tmp_path).iter_pairs())
    assert [pair.pair_id for pair in pairs] == ["mine-a", "mine-1", "mine-2", "mine-3"]
    assert (pairs[2].prompt, pairs[2].image_0, pairs[2].image_1) == ("a ring", PICTURES[4], PICTURES[5])
    assert pairs[0].source == {"model": "m", "swapped": False}
    assert labels_of(tmp_path) == {"mine-a": 1.0, "mine-1": 0.0, "mine-2": 0.5}
    assert label_origin(tmp_path, "human") == "dedpo ingest" and vote_names(tmp_path) == []
    counts = ledger.counts
    assert (counts["comparisons"], counts["kept"], counts["labelled"], counts["ties"], counts["unlabelled"]) == (4, 4, 3, 1, 1)
    assert "pairs kept: 4, 3 of them with a human label from 3 votes, 0 with votes for both sides" in list(count_lines(counts))


ENTRY = st.builds(
    lambda first, second, labels, prompt, same: compare(first, second, *map(Answer, labels), prompt=prompt, same=same),
    st.sampled_from([0, 1, 2, b"no image", None]),
    st.sampled_from([0, 1, 2, b"no image"]),
    st.lists(st.sampled_from([0.0, 0.5, 1.0, 0.3]), max_size=3),
    st.sampled_from(["a cross", "a ring"]),
    st.sampled_from([False, False, False, True]),
)


@given(
    rows=st.lists(st.lists(ENTRY, max_size=3), min_size=1, max_size=8),
    choices=st.fixed_dictionaries(
        {
            "ties": st.sampled_from(["keep", "drop"]),
            "unlabelled": st.sampled_from(["keep", "drop"]),
            "identical": st.sampled_from(["keep", "drop"]),
            "duplicates": st.sampled_from(["merge", "keep"]),
        }
    ),
    winner_first=st.booleans(),
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_comparison_ends_in_exactly_one_count(tmp_path_factory, rows, choices, winner_first):
    folder = tmp_path_factory.mktemp("data")
    rows = [*rows, [compare(8, 9, WIN)]]  # one pair that is kept whatever the policies
    entries = [entry for row in rows for entry in row]
    counts = take(folder, rows, options={**choices, "unreadable": "skip"}, winner_first=winner_first).counts
    assert counts["comparisons"] == len(entries) == sum(counts[name] for name in COUNTED)
    assert counts["empty_rows"] == sum(not row for row in rows)
    assert counts["kept"] == len(PairReader(folder))
    answers = sum(len(entry["answers"]) for entry in entries)
    assert counts["votes"] <= answers
    if not any(counts[name] for name in COUNTED[2:]):
        assert counts["votes"] == answers - counts["tie_answers_dropped"]


@pytest.mark.parametrize(
    ("choice", "kept", "count"),
    [
        ({"ties": "drop"}, ["mine-0", "mine-2", "mine-4"], "ties_dropped"),
        ({"unlabelled": "drop"}, ["mine-0", "mine-1", "mine-4"], "unlabelled_dropped"),
        ({"identical": "keep"}, ["mine-0", "mine-1", "mine-2", "mine-3", "mine-4"], None),
    ],
)
def test_every_policy_is_obeyed_and_counted(tmp_path, choice, kept, count):
    rows = [compare(0, 1, WIN), compare(2, 3, TIE), compare(4, 5), compare(6, 6, WIN), compare(8, 9, WIN, TIE)]
    ledger = take(tmp_path, rows, options=choice)
    assert PairReader(tmp_path).ids() == kept
    assert count is None or ledger.counts[count] == 1
    assert labels_of(tmp_path)["mine-4"] == (1.0 if choice.get("ties") == "drop" else 0.75)  # a tie among other answers


def test_a_source_that_says_same_is_believed(tmp_path):
    ledger = take(tmp_path, [compare(0, 1, WIN, same=True), compare(2, 3, WIN)])
    assert ledger.counts["identical_dropped"] == 1 and PairReader(tmp_path).ids() == ["mine-1"]


# ---- votes and duplicates


def test_votes_become_one_label_and_stay_beside_it(tmp_path):
    rows = [compare(0, 1, Answer(1.0, "ann"), Answer(0.0, "bob"), Answer(1.0, "eve")), compare(2, 3, *counted(7, 1)), compare(4, 5, WIN)]
    ledger = take(tmp_path, rows)
    assert labels_of(tmp_path) == pytest.approx({"mine-0": 2 / 3, "mine-1": 7 / 8, "mine-2": 1.0})
    assert read_labels(tmp_path, "human").extra["votes"] == [3, 8, 1]
    votes = read_votes(tmp_path, "human")
    assert votes.rater == ["ann", "bob", "eve", None, None, None] and votes.votes.tolist() == [1, 1, 1, 7, 1, 1]
    assert (ledger.counts["votes"], ledger.counts["conflicting"]) == (12, 2)


def test_the_same_images_on_either_side_are_one_pair_whose_answers_agree(tmp_path):
    rows = [compare(0, 1, WIN), compare(1, 0, LOSS), compare(0, 1, LOSS), compare(0, 1, WIN, prompt="a ring")]
    ledger = take(tmp_path, rows)
    assert labels_of(tmp_path) == pytest.approx({"mine-0": 2 / 3, "mine-3": 1.0})
    assert (ledger.counts["duplicates_merged"], ledger.counts["conflicting"]) == (2, 1)
    assert any("2 merged into the first pair" in line for line in count_lines(ledger.counts))


def test_the_first_few_dropped_rows_are_named(tmp_path):
    rows = [compare(0, 1, WIN), *(compare(k, k, WIN) for k in range(7)), compare(1, 0, LOSS), compare(2, 3, WIN)]
    ledger = take(tmp_path, rows)
    same = [f"file row {k}" for k in range(1, 6)]
    assert ledger.dropped == {"identical": same, "duplicates": ["file row 8 (into mine-0)"]}
    lines = list(count_lines(ledger.counts, ledger.dropped))
    start = lines.index("comparisons of one image with itself: 7 (dropped 7)")
    assert lines[start + 1 : start + 7] == [*(f"  {where}" for where in same), "  and 2 more"]


def test_duplicates_can_be_kept_and_a_name_that_comes_again_gets_a_number(tmp_path):
    ledger = take(tmp_path, [compare(0, 1, WIN, key="x"), compare(0, 1, LOSS, key="x")], options={"duplicates": "keep"})
    assert labels_of(tmp_path) == {"mine-x": 1.0, "mine-x-1": 0.0}
    assert (ledger.counts["duplicates_kept"], ledger.counts["renamed"]) == (1, 1)


# ---- sides


def shuffled(folder, seed, order=range(40), winner=WIN):
    rows = [compare(k, (k + 1) % 40, winner, key=str(k)) for k in order]
    return take(folder, rows, options={"seed": seed}, winner_first=True)


def test_where_the_winner_comes_first_sides_are_shuffled_and_labels_follow(tmp_path):
    ledger = shuffled(tmp_path, 0)
    labels, swapped = labels_of(tmp_path), 0
    for pair in PairReader(tmp_path).iter_pairs():
        k = int(pair.pair_id.removeprefix("mine-"))
        winner, loser = PICTURES[k], PICTURES[(k + 1) % 40]
        assert (pair.image_0, pair.image_1) == ((loser, winner) if pair.source["swapped"] else (winner, loser))
        assert labels[pair.pair_id] == (0.0 if pair.source["swapped"] else 1.0)
        swapped += pair.source["swapped"]
    assert 10 <= swapped <= 30 and ledger.counts["sides_swapped"] == swapped


def test_the_shuffle_follows_its_seed_and_not_the_order_of_the_rows(tmp_path):
    def sides(name, *arguments):
        shuffled(tmp_path / name, *arguments)
        return {pair.pair_id: pair.source["swapped"] for pair in PairReader(tmp_path / name).iter_pairs()}

    assert sides("a", 0) == sides("b", 0) == sides("c", 0, range(39, -1, -1)) != sides("d", 1)


def test_a_soft_label_turns_with_its_images(tmp_path):
    shuffled(tmp_path, 0, winner=Answer(0.8))
    assert {round(label, 6) for label in labels_of(tmp_path).values()} == {0.8, 0.2}


def test_duplicates_find_their_side_behind_a_shuffle(tmp_path):
    rows = [compare(k, k + 20, WIN, key=str(k)) for k in range(20)] + [compare(k + 20, k, LOSS) for k in range(20)]
    ledger = take(tmp_path, rows, winner_first=True)
    assert set(labels_of(tmp_path).values()) == {0.0, 1.0}  # every pair's two answers name the same image
    assert (ledger.counts["duplicates_merged"], ledger.counts["conflicting"]) == (20, 0)


# ---- unreadable images and bad answers


@pytest.mark.parametrize("bad", [b"", PICTURES[1][:60], b"<html>", None, Path("nowhere.png")])
def test_an_unreadable_image_stops_with_its_row_or_is_counted(tmp_path, bad):
    rows = [compare(0, 1, WIN), compare(2, bad, WIN), compare(4, 5, WIN)]
    with pytest.raises(UserError, match=r"^file row 1, image 1.*leave its pair out with --unreadable skip$"):
        take(tmp_path / "stopped", rows)
    ledger = take(tmp_path / "skipped", rows, options={"unreadable": "skip"})
    assert PairReader(tmp_path / "skipped").ids() == ["mine-0", "mine-2"] and ledger.counts["unreadable_dropped"] == 1


def test_images_that_do_not_matter_are_not_read(tmp_path):
    rows = [compare(0, 1, WIN), compare(2, None, TIE), compare(None, None)]
    ledger = take(tmp_path, rows, options={"ties": "drop", "unlabelled": "drop"})
    assert (ledger.counts["ties_dropped"], ledger.counts["unlabelled_dropped"], ledger.counts["kept"]) == (1, 1, 1)


def test_files_are_read_when_their_turn_comes(tmp_path):
    (tmp_path / "a.png").write_bytes(PICTURES[0])
    take(tmp_path / "data", [compare(tmp_path / "a.png", 1, WIN)])
    assert PairReader(tmp_path / "data").pair(0).image_0 == PICTURES[0]


@pytest.mark.parametrize(
    ("answer", "words"), [(Answer(1.2), "file row 0: label_0 is 1.2"), (Answer(1.0, votes=0), "file row 0: an answer with 0 votes")]
)
def test_impossible_answers_name_their_row(tmp_path, answer, words):
    with pytest.raises(UserError, match=words):
        take(tmp_path, [compare(0, 1, answer)])


def test_nothing_kept_is_an_error_that_counts(tmp_path):
    with pytest.raises(UserError, match=r"no pair of memory was kept: comparisons read: 1; .*a tie: 1 \(dropped 1\)"):
        take(tmp_path, [compare(0, 1, TIE)], options={"ties": "drop"})
    assert label_names(tmp_path) == []


# ---- going on


def everything(folder):
    pairs = list(PairReader(folder).iter_pairs())
    votes = read_votes(folder, "human")
    return pairs, labels_of(folder), (votes.pair_id, votes.label_0.tolist(), votes.votes.tolist())


@pytest.mark.parametrize("last", range(0, 12, 2))
def test_an_interrupted_import_ends_like_an_uninterrupted_one(tmp_path, last):
    rows = [[compare((3 * k + j) % 40, (5 * k + j + 1) % 40, Answer(float(j % 2), votes=1 + j)) for j in range(k % 4)] for k in range(12)]
    rows[9] = rows[2]  # duplicates across shards
    options = {"shard_pairs": 2, "workers": 1}
    whole = take(tmp_path / "whole", rows, options=options, winner_first=True)
    with pytest.raises(KeyboardInterrupt):
        take(tmp_path / "broken", rows, options=options, winner_first=True, last=last)
    shards = Journal(tmp_path / "broken", {"of": "this test"}).shards()
    stray = tmp_path / "broken" / "pairs" / f"pairs-{shards:05d}.parquet"
    if shards:  # killed between a shard and its line in the journal
        stray.write_bytes((tmp_path / "broken" / "pairs" / "pairs-00000.parquet").read_bytes())
    resumed = take(tmp_path / "broken", rows, options=options, winner_first=True)
    assert everything(tmp_path / "broken") == everything(tmp_path / "whole")
    assert (
        resumed.counts == whole.counts and resumed.dropped == whole.dropped and whole.counts["empty_rows"] == 3 and (last < 8 or shards > 0)
    )


def test_another_sources_journal_is_not_taken_up(tmp_path):
    journal = Journal(tmp_path, {"of": "one"})
    journal.begin()
    journal.write(0, Ledger())
    assert journal.shards() == 1 and Journal(tmp_path, {"of": "another"}).shards() == 0
    assert json.loads((tmp_path / "journal" / "identity.json").read_text()) == {"of": "one"}


@pytest.mark.parametrize("workers", [1, 3, 8])
def test_the_number_of_threads_changes_nothing(tmp_path, workers):
    rows = [compare(k, (k + 7) % 40, Answer(float(k % 2), votes=2)) for k in range(30)]
    take(tmp_path / "a", rows, options={"workers": 1})
    take(tmp_path / "b", rows, options={"workers": workers})
    assert everything(tmp_path / "a") == everything(tmp_path / "b")


# ---- the values of a row


def test_images_come_as_bytes_structs_or_paths_below_their_folder(tmp_path):
    assert image_source(b"x", None, "here") == b"x" and image_source(None, None, "here") is None
    assert image_source({"bytes": b"x", "path": "a.png"}, None, "here") == b"x"
    assert image_source({"bytes": None, "path": "a.png"}, tmp_path, "here") == tmp_path / "a.png"
    assert image_source("b/a.png", tmp_path, "here") == tmp_path / "b" / "a.png"
    for value, words in [
        ("../a.png", "leaves"),
        ("b/../../a.png", "leaves"),
        ("https://example.invalid/a.png", "is an address .*download"),
        (3, "holds int, and must hold an image"),
    ]:
        with pytest.raises(UserError, match=f"^here.*{words}"):
            image_source(value, tmp_path, "here")
    with pytest.raises(UserError, match="give it with --images"):
        image_source("a.png", None, "here")


def test_numbers_and_text_of_a_row():
    assert [number(value, "x") for value in (1, "0.5", b"1", "", None, float("nan"))] == [1.0, 0.5, 1.0, None, None, None]
    with pytest.raises(UserError, match=r"^x is 'one', and must be a number"):
        number("one", "x")
    assert text(b"a", "x") == "a"
    for value, words in ((None, "missing"), (3, "int")):
        with pytest.raises(UserError, match=f"^x is {words}, and must be text"):
            text(value, "x")
