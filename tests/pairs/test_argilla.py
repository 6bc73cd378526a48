"""Argilla, there and back: through its own client where it is installed, and by the layout of its files."""

from __future__ import annotations

import json
from uuid import UUID

import pytest

from dedpo_diffusion.pairs.dataset import PairReader
from dedpo_diffusion.pairs.decoding import decode_image
from dedpo_diffusion.pipelines import main
from support.annotating import CHOSEN, argilla_client, export, ingest, labels, make_pairs, noted, state, with_answers
from support.pictures import picture

USERS = (str(UUID(int=7)), str(UUID(int=8)))


@pytest.fixture
def pairs(tmp_path):
    return make_pairs(tmp_path / "P")


@pytest.fixture
def rg():
    argilla = pytest.importorskip("argilla")
    with argilla_client(argilla):
        yield argilla


def records_of(out):
    return json.loads((out / "records.json").read_text(encoding="utf-8"))


def left_of(out):
    return {record["metadata"]["pair_id"]: record["metadata"]["left_is"] for record in records_of(out)}


def answered(records, users=USERS):
    """Records as `to_json` writes them when everybody has chosen as CHOSEN says."""
    return [
        record | {"responses": {"choice": [{"value": CHOSEN[k], "user_id": user} for user in users]}, "status": "completed"}
        for k, record in enumerate(records)
    ]


def flat(records, statuses=("submitted", "submitted")):
    """Records as the rows of `to_datasets`."""
    rows = []
    for k, record in enumerate(records):
        said = {"choice.responses": [CHOSEN[k]] * 2, "choice.responses.users": list(USERS), "choice.responses.status": list(statuses)}
        rows.append({"id": record["id"], "status": "completed", "_server_id": "x", **record["fields"], **record["metadata"], **said})
    return rows


def save(path, rows):
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


def refusal(capsys, source, *options):
    assert main(["ingest", "argilla", str(source), "--out", str(source.parent / "refused"), *options]) == 2
    return capsys.readouterr().err


# ---- by the layout of the files


@pytest.mark.parametrize("fields", ["image", "html"])
@pytest.mark.parametrize("layout", ["nested", "flat"])
def test_a_round_trip_keeps_every_pair_side_and_rater(tmp_path, pairs, fields, layout):
    out = export(pairs, "argilla", tmp_path / "out", "--fields", fields)
    rows = answered(records_of(out)) if layout == "nested" else flat(records_of(out))
    counts = ingest(save(tmp_path / "records.json", rows), tmp_path / "Q")
    assert state(tmp_path / "Q") == with_answers(state(pairs), left_of(out), USERS)
    untold = "responses of which the export does not tell whether they were submitted, taken as answers"
    assert noted(counts) == {"answers that say skip": 2} | ({untold: 16} if layout == "nested" else {})
    assert set(left_of(out).values()) == {"image_0", "image_1"}


def test_drafts_and_discarded_responses_are_counted_and_no_answers(tmp_path, pairs):
    out = export(pairs, "argilla", tmp_path / "out", "--human", "null")
    rows = flat(records_of(out), ("draft", "submitted"))
    rows[0]["choice.responses.status"] = ["discarded", "discarded"]
    rows[1]["choice.responses"] = [None, None]
    rows[1]["choice.responses.status"] = ["discarded", None]
    rows[4]["choice.suggestion"], rows[4]["choice.suggestion.score"] = "left", 0.9
    rows[5]["choice.responses.users"] = [USERS[1], USERS[1]]
    rows[5]["choice.responses.status"] = ["submitted", "submitted"]
    rows.append(rows[6] | {"id": "again"})
    counts = ingest(save(tmp_path / "rows.json", rows), tmp_path / "Q")
    assert noted(counts) == {
        "discarded responses, which have no answer": 3,
        "responses without an answer": 1,
        "drafts, which nobody submitted": 6,
        "answers that say skip": 1,
        "suggestions of models, which are no answers": 1,
        "further answers of one person on one pair, all kept": 2,
        "records that came again, read together with the first": 1,
    }
    found = state(tmp_path / "Q")
    assert found.keys() == state(pairs).keys()
    assert {k: len(found[f"own-{k} ü"][3]) for k in range(8)} == {0: 0, 1: 0, 2: 1, 3: 0, 4: 1, 5: 2, 6: 2, 7: 1}


def test_the_folder_that_goes_out_can_come_back(tmp_path, pairs):
    """The layout of `to_disk`: records.json beside hidden settings."""
    out = export(pairs, "argilla", tmp_path / "out")
    assert sorted(p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()) == [
        ".argilla/dataset.json",
        ".argilla/settings.json",
        "records.json",
    ]
    ingest(out, tmp_path / "Q")
    assert state(tmp_path / "Q") == state(pairs)


def test_records_of_ones_own(tmp_path):
    for k, name in enumerate(("a.png", "b.png")):
        (tmp_path / name).write_bytes(picture(k))
    said = {"preference": [{"value": "image_2", "user_id": USERS[0]}], "quality": [{"value": "good", "user_id": USERS[0]}]}
    record = {"id": "r1", "fields": {"text": "a fox", "image_1": "a.png", "image_2": "b.png"}, "metadata": {"seed": 3}, "responses": said}
    ingest(save(tmp_path / "records.json", [record]), tmp_path / "Q")
    (pair,) = PairReader(tmp_path / "Q").iter_pairs()
    assert (pair.pair_id, pair.prompt, pair.source) == ("argilla-r1", "a fox", {"record": "r1", "seed": 3, "swapped": False})
    assert labels(tmp_path / "Q") == {"argilla-r1": 0.0}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"choice.responses": ["purple", "left"]}, "the answer is 'purple', and must be one of left, right, tie, skip"),
        ({"choice.responses.users": ["x"]}, "there are 2 responses, and choice.responses.users has 1 items"),
        ({"choice.responses.status": ["done", "done"]}, "a response has the status 'done', and must be submitted, draft or discarded"),
        ({"choice.responses": "left"}, "choice.responses is str, and must be a list"),
        ({"left_is": "both"}, "left_is is 'both', and must be image_0 or image_1"),
        ({"prompt": None}, "which value is the prompt cannot be told from left, right"),
    ],
)
def test_what_is_no_export_is_named(tmp_path, pairs, capsys, change, words):
    out = export(pairs, "argilla", tmp_path / "out")
    rows = flat(records_of(out))
    rows[2] |= change
    assert f"rows.json row 2: {words}" in refusal(capsys, save(tmp_path / "rows.json", rows)).replace(
        "row 2: choice.responses: ", "row 2: "
    )


# ---- through Argilla's own client


@pytest.mark.parametrize("fields", ["image", "html"])
def test_argillas_client_reads_the_settings_and_writes_the_same(tmp_path, pairs, rg, fields):
    out = export(pairs, "argilla", tmp_path / "out", "--fields", fields)
    settings = rg.Settings.from_json(out / ".argilla" / "settings.json")
    settings.to_json(tmp_path / "settings.json")
    assert rg.Settings.from_json(tmp_path / "settings.json") == settings
    assert [question.name for question in settings.questions] == ["choice"]
    assert set(settings.questions["choice"].labels) == {"left", "right", "tie", "skip"}
    kinds = ["text", "image", "image"] if fields == "image" else ["text", "custom"]
    assert [field.type for field in settings.fields] == kinds
    dataset = rg.Dataset._load_dataset_model(out / ".argilla" / "dataset.json")
    assert dataset.name == "out"


def through_client(rg, out, path, *, users=USERS, status="submitted"):
    """Read records with the client, answer them, and write them by its `to_json` and `to_datasets`."""
    from argilla.records._io import HFDatasetsIO, JsonIO

    settings = rg.Settings.from_json(out / ".argilla" / "settings.json")
    dataset = rg.Dataset(name="pairs", settings=settings)
    records = JsonIO._records_from_json(out / "records.json")
    for k, record in enumerate(records):
        record.dataset = dataset
        sent = record.api_model().model_dump()  # what goes to the server
        assert sent["external_id"] == record.id and sent["metadata"]["pair_id"] == record.id
        assert sent["fields"].keys() == {field.name for field in settings.fields}
        for user in users:
            record.responses.add(rg.Response("choice", CHOSEN[k], user_id=UUID(user), status=status))
    JsonIO.to_json(records, path / "records.json")
    HFDatasetsIO.to_datasets(records, dataset).save_to_disk(str(path / "saved"))
    return path


@pytest.mark.parametrize("fields", ["image", "html"])
def test_a_round_trip_through_argillas_client(tmp_path, pairs, rg, fields):
    out = export(pairs, "argilla", tmp_path / "out", "--fields", fields)
    (tmp_path / "back").mkdir()
    through_client(rg, out, tmp_path / "back")
    expected = with_answers(state(pairs), left_of(out), USERS)
    ingest(tmp_path / "back" / "records.json", tmp_path / "Q")
    assert state(tmp_path / "Q") == expected
    counts = ingest(tmp_path / "back" / "saved", tmp_path / "R")
    assert noted(counts) == {"answers that say skip": 2}
    for pair_id, (prompt, *images, said) in state(tmp_path / "R").items():
        assert (prompt, said) == (expected[pair_id][0], expected[pair_id][3])
        for image, wanted in zip(images, expected[pair_id][1:3], strict=True):  # `datasets` writes PNG files again
            assert decode_image(image, "").tobytes() == decode_image(wanted, "").tobytes()


def test_drafts_of_argillas_client(tmp_path, pairs, rg):
    out = export(pairs, "argilla", tmp_path / "out", "--human", "null")
    (tmp_path / "back").mkdir()
    through_client(rg, out, tmp_path / "back", users=USERS[:1], status="draft")
    counts = ingest(tmp_path / "back" / "saved", tmp_path / "Q")
    assert noted(counts) == {"drafts, which nobody submitted": 8} and counts["kept"] == 8 and counts["labelled"] == 0
