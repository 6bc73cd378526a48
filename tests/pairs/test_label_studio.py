"""Label Studio, there and back: through its own package where it is installed, and by its documented files."""

from __future__ import annotations

import base64
import json
import shutil
from urllib.parse import unquote
from xml.etree import ElementTree

import pytest

from dedpo_diffusion.pairs.dataset import PairReader
from dedpo_diffusion.pipelines import main
from support.annotating import CHOSEN, export, ingest, label_studio_task, labels, make_pairs, noted, state, with_answers
from support.pictures import picture

PEOPLE = (10, {"id": 11, "email": "cid@example.org", "first_name": "", "last_name": ""})
NAMES = ("10", "cid@example.org")


@pytest.fixture
def pairs(tmp_path):
    return make_pairs(tmp_path / "P")


def tasks_of(out):
    return json.loads((out / "tasks.json").read_text(encoding="utf-8"))


def save(path, tasks):
    path.write_text(json.dumps(tasks, ensure_ascii=False), encoding="utf-8")
    return path


def annotated(out, people=PEOPLE):
    """The tasks as Label Studio gives them back when everybody has chosen as CHOSEN says."""
    return [label_studio_task(k, task, people, CHOSEN[k]) for k, task in enumerate(tasks_of(out))]


def left_of(out):
    return {task["data"]["pair_id"]: task["data"]["left_is"] for task in tasks_of(out)}


def refusal(capsys, source, *options):
    assert main(["ingest", "labelstudio", str(source), "--out", str(source.parent / "refused"), *options]) == 2
    return capsys.readouterr().err


# ---- what goes out


@pytest.mark.parametrize("images", ["files", "data"])
def test_the_task_shows_the_side_that_it_remembers(tmp_path, pairs, images):
    out = export(pairs, "labelstudio", tmp_path / "out", "--images", images)
    for task, pair in zip(tasks_of(out), PairReader(pairs).iter_pairs(), strict=True):
        data = task["data"]
        if images == "files":
            shown = [(out / unquote(data[side].removeprefix("/data/local-files/?d="))).read_bytes() for side in ("left", "right")]
        else:
            shown = [base64.b64decode(data[side].removeprefix("data:image/png;base64,")) for side in ("left", "right")]
        assert shown == ([pair.image_0, pair.image_1] if data["left_is"] == "image_0" else [pair.image_1, pair.image_0])
        assert data["prompt"] == pair.prompt and data["pair_id"] == pair.pair_id
    assert set(left_of(out).values()) == {"image_0", "image_1"}
    assert (out / "images").is_dir() == (images == "files")


def test_no_name_of_a_file_tells_which_image_is_which(tmp_path, pairs):
    out = export(pairs, "labelstudio", tmp_path / "out")
    assert sorted(path.name for path in (out / "images").iterdir()) == sorted(
        f"{k:06d}-{s}.png" for k in range(8) for s in ("left", "right")
    )


def test_the_configuration_refers_to_what_tasks_hold(tmp_path, pairs):
    out = export(pairs, "labelstudio", tmp_path / "out")
    tree = ElementTree.parse(out / "config.xml").getroot()
    used = {tag.get("value") for tag in tree.iter() if (tag.get("value") or "").startswith("$")}
    assert used == {"$prompt", "$left", "$right"} and {name[1:] for name in used} <= tasks_of(out)[0]["data"].keys()
    (choices,) = tree.iter("Choices")
    assert {choice.get("value") for choice in choices} == {"left", "right", "tie", "skip"}


def test_label_studios_own_package_accepts_configuration_tasks_and_answers(tmp_path, pairs):
    interface = pytest.importorskip("label_studio_sdk.label_interface")
    for images in ("files", "data"):
        out = export(pairs, "labelstudio", tmp_path / images, "--images", images)
        label = interface.LabelInterface((out / "config.xml").read_text(encoding="utf-8"))
        label.validate()
        assert set(label.get_control("choice").labels) == {"left", "right", "tie", "skip"}
        for task in annotated(out):
            assert label.validate_task({"data": task["data"]})
            assert all(label.validate_annotation({"result": one["result"]}) for one in task["annotations"])


# ---- the way back


@pytest.mark.parametrize("images", ["files", "data"])
@pytest.mark.parametrize("seed", ["0", "7"])
def test_a_round_trip_keeps_every_pair_side_and_rater(tmp_path, pairs, images, seed):
    out = export(pairs, "labelstudio", tmp_path / "out", "--images", images, "--seed", seed)
    source = save(tmp_path / "export.json", annotated(out))
    counts = ingest(source, tmp_path / "Q", *(["--images", str(out)] if images == "files" else []))
    assert state(tmp_path / "Q") == with_answers(state(pairs), left_of(out), NAMES)
    assert noted(counts) == {"answers that say skip": 2}
    assert counts["kept"] == 8 and counts["comparisons"] == 8


def test_the_shuffle_is_undone_whatever_its_seed(tmp_path):
    """Everybody who always prefers image 0 says so on the side where it stands; all labels are 1, whatever the seed."""
    pairs = make_pairs(tmp_path / "P", answers=False)
    for seed in ("1", "2", "3"):
        out = export(pairs, "labelstudio", tmp_path / seed, "--seed", seed, "--images", "data")
        side = {"image_0": "left", "image_1": "right"}
        tasks = [label_studio_task(k, t, (1,), side[t["data"]["left_is"]]) for k, t in enumerate(tasks_of(out))]
        ingest(save(tmp_path / f"{seed}.json", tasks), tmp_path / f"Q{seed}")
        assert set(labels(tmp_path / f"Q{seed}").values()) == {1.0}


@pytest.mark.slow
def test_json_min_of_label_studios_own_converter(tmp_path, pairs):
    """A row of JSON-MIN is an annotation; skipped tasks are not in it, and tasks without annotations are."""
    converter = pytest.importorskip("label_studio_sdk.converter")
    out = export(pairs, "labelstudio", tmp_path / "out")
    tasks = annotated(out)
    tasks[7]["annotations"] = []
    source = save(tmp_path / "export.json", tasks)
    converter.Converter(str(out / "config.xml"), str(tmp_path)).convert_to_json_min(str(source), str(tmp_path / "min"), is_dir=False)
    rows = json.loads((tmp_path / "min" / "result.json").read_text(encoding="utf-8"))
    assert len(rows) == 15 and rows[0]["choice"] == "left"
    counts = ingest(tmp_path / "min" / "result.json", tmp_path / "Q", "--images", str(out))
    expected = with_answers(state(pairs), left_of(out), NAMES)
    expected["own-7 ü"] = state(pairs)["own-7 ü"]
    assert state(tmp_path / "Q") == expected and noted(counts) == {"answers that say skip": 2}


def test_json_and_json_min_give_the_same(tmp_path, pairs):
    """JSON-MIN as the documentation shows it: the data, the answer by name, annotator and annotation_id."""
    out = export(pairs, "labelstudio", tmp_path / "out", "--images", "data")
    rows = [
        task["data"] | {"id": task["id"], "choice": CHOSEN[k], "annotator": who, "annotation_id": 2 * k + i, "lead_time": 1.0}
        for k, task in enumerate(annotated(out))
        for i, who in enumerate(NAMES)
    ]
    ingest(save(tmp_path / "min.json", rows), tmp_path / "Q")
    ingest(save(tmp_path / "all.json", annotated(out)), tmp_path / "R")
    assert state(tmp_path / "Q") == state(tmp_path / "R")


def test_json_min_of_ones_own_project(tmp_path, capsys):
    row = {"caption": "a fox", "image_1": "a.png", "image_2": "b.png", "id": 5, "pick": "image_2", "annotator": 4, "annotation_id": 9}
    said = refusal(capsys, save(tmp_path / "export.json", [row]))
    assert "row 0: which value is the answer cannot be told from caption, image_1, image_2, pick; say it with --columns" in said
    pair, answers, _ = own(tmp_path, row, "--columns", '{"answer": "pick"}')
    assert answers == [(0.0, 1, "4")] and pair.pair_id == "labelstudio-5"
    pairwise = row | {"pick": [{"type": "Pairwise", "selected": "left"}]}
    (tmp_path / "again").mkdir()
    assert own(tmp_path / "again", pairwise)[1] == [(1.0, 1, "4")]


# ---- oddities, counted and not dropped


def test_oddities_are_counted_and_every_pair_stays(tmp_path, pairs, capsys):
    out = export(pairs, "labelstudio", tmp_path / "out", "--images", "data", "--human", "null")
    tasks = annotated(out, (10,))
    tasks[0]["annotations"][0]["was_cancelled"] = True  # skipped
    tasks[0]["annotations"][0]["result"] = []
    tasks[1]["annotations"], tasks[1]["drafts"] = [], [{"id": 1, "user": "ann@example.org", "result": tasks[2]["annotations"][0]["result"]}]
    tasks[4]["annotations"].append(tasks[4]["annotations"][0] | {"id": 77})  # the same person again
    tasks[5]["annotations"].append(dict(tasks[5]["annotations"][0]))  # the same annotation twice
    tasks[6]["annotations"][0]["result"] = []
    tasks[7]["predictions"] = [{"model_version": "m", "result": []}]
    tasks.append(label_studio_task(99, {"data": tasks[2]["data"]}, (12,), "left"))  # imported twice
    counts = ingest(save(tmp_path / "export.json", tasks), tmp_path / "Q")
    assert noted(counts) == {
        "skipped tasks, which have no answer": 1,
        "drafts, which nobody submitted": 1,
        "answers that say skip": 1,
        "further answers of one person on one pair, all kept": 1,
        "annotations that came twice, taken once": 1,
        "annotations without an answer": 1,
        "predictions of models, which are no answers": 1,
        "tasks that came again, read together with the first": 1,
    }
    found = state(tmp_path / "Q")
    assert found.keys() == state(pairs).keys()
    assert {k: len(found[f"own-{k} ü"][3]) for k in range(8)} == {0: 0, 1: 0, 2: 2, 3: 0, 4: 2, 5: 1, 6: 0, 7: 1}
    assert counts["unlabelled"] == 4 and counts["unlabelled_dropped"] == 0
    said = capsys.readouterr().out
    assert "\ndrafts, which nobody submitted: 1\n" in said and "\nskipped tasks, which have no answer: 1\n" in said


def test_answers_that_came_along_count_once_when_a_task_was_imported_twice(tmp_path, pairs):
    out = export(pairs, "labelstudio", tmp_path / "out", "--images", "data")
    tasks = annotated(out, ()) + [task | {"id": task["id"] + 100} for task in annotated(out, ())]
    counts = ingest(save(tmp_path / "export.json", tasks), tmp_path / "Q")
    assert state(tmp_path / "Q") == state(pairs) and noted(counts) == {"tasks that came again, read together with the first": 8}


def test_a_task_imported_twice_with_sides_the_other_way_round(tmp_path):
    pairs = make_pairs(tmp_path / "P", answers=False)
    outs = [export(pairs, "labelstudio", tmp_path / seed, "--images", "data", "--seed", seed) for seed in ("0", "1", "2")]
    assert len({tuple(left_of(out).values()) for out in outs}) == 3
    side = {"image_0": "left", "image_1": "right"}
    tasks = [
        label_studio_task(100 * n + k, task, (f"r{n}",), side[task["data"]["left_is"]])
        for n, out in enumerate(outs)
        for k, task in enumerate(tasks_of(out))
    ]
    ingest(save(tmp_path / "export.json", tasks), tmp_path / "Q")
    assert all(said == [(1.0, 1, f"r{n}") for n in range(3)] for *_, said in state(tmp_path / "Q").values())


@pytest.mark.parametrize(
    "path",
    [
        "/data/upload/3/1a2b3c4d-{name}",
        "http://localhost:8080/data/upload/3/1a2b3c4d-{name}",
        "/data/local-files/?d=srv/pictures/{name}",
        "/label-studio/data/local-files/?d=srv/pictures/{name}",
        "data/local-files/?d=srv/pictures/{name}",
        "/home/somebody/pictures/{name}",
    ],
)
@pytest.mark.parametrize("kept", ["{name}", "pictures/{name}"])
def test_served_and_absolute_paths_are_found_below_images_and_counted(tmp_path, pairs, path, kept):
    if "upload" in path and "/" in kept:
        kept = "3/1a2b3c4d-{name}"  # a copy of Label Studio's media/upload
    out = export(pairs, "labelstudio", tmp_path / "out", "--human", "null")
    tasks = annotated(out, (10,))
    for task in tasks:
        for side in ("left", "right"):
            name = f"{task['id'] - 1:06d}-{side}.png"
            task["data"][side] = path.format(name=name)
            target = tmp_path / "media" / kept.format(name=name)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(out / "images" / name, target)
    counts = ingest(save(tmp_path / "export.json", tasks), tmp_path / "Q", "--images", str(tmp_path / "media"))
    before = {name: (*rest, []) for name, (*rest, _) in state(pairs).items()}
    assert state(tmp_path / "Q") == with_answers(before, left_of(out), ("10",))
    found = noted(counts)
    assert found.pop("images with an absolute path or an upload's, looked for in the folder of images") == 16
    assert found.pop("of these, images found under their name without the tool's prefix", 0) == (
        16 if "upload" in path and kept == "{name}" else 0
    )


def test_a_served_path_that_is_not_there_or_leaves_the_folder_is_named(tmp_path, pairs, capsys):
    out = export(pairs, "labelstudio", tmp_path / "out")
    tasks = annotated(out)
    tasks[3]["data"]["left"] = "/data/upload/3/1a2b3c4d-gone.png"
    said = refusal(capsys, save(tmp_path / "export.json", tasks), "--images", str(out))
    assert "export.json row 3, image" in said and "upload/3/1a2b3c4d-gone.png) cannot be read (No such file or directory)" in said
    counts = ingest(tmp_path / "export.json", tmp_path / "Q", "--images", str(out), "--unreadable", "skip")
    assert counts["kept"] == 7 and counts["unreadable_dropped"] == 1
    tasks[3]["data"]["left"] = "/data/local-files/?d=../../secret.png"
    assert "leaves" in refusal(capsys, save(tmp_path / "export.json", tasks), "--images", str(out))


# ---- tasks of anybody's own


def own_task(**changes):
    result = {"from_name": "pick", "to_name": "a", "type": "choices", "value": {"choices": ["Image 1"]}}
    task = {"id": 5, "data": {"caption": "a fox", "image_1": "a.png", "image_2": "b.png", "batch": 3}, "drafts": [], "predictions": []}
    return task | {"annotations": [{"id": 1, "completed_by": 4, "result": [result], "was_cancelled": False}]} | changes


def own(tmp_path, task, *options):
    for k, name in enumerate(("a.png", "b.png")):
        (tmp_path / name).write_bytes(picture(k))
    counts = ingest(save(tmp_path / "export.json", [task]), tmp_path / "Q", *options, format="labelstudio" if options else "auto")
    (pair,) = PairReader(tmp_path / "Q").iter_pairs()
    return pair, state(tmp_path / "Q")[pair.pair_id][3], counts


def test_a_project_of_ones_own(tmp_path):
    pair, said, _ = own(tmp_path, own_task())
    assert (pair.pair_id, pair.prompt, pair.image_0) == ("labelstudio-5", "a fox", picture(0)) and said == [(1.0, 1, "4")]
    assert pair.source == {"task": "5", "batch": 3, "swapped": False}


def test_the_pairwise_control(tmp_path):
    task = own_task()
    task["annotations"][0]["result"] = [{"from_name": "pw", "to_name": "a,b", "type": "pairwise", "value": {"selected": "right"}}]
    assert own(tmp_path, task)[1] == [(0.0, 1, "4")]


def test_completions_of_old_versions(tmp_path):
    task = own_task()
    task["completions"] = [*task.pop("annotations"), {"id": 2, "result": [], "skipped": True}]
    assert own(tmp_path, task)[1] == [(1.0, 1, "4")]


@pytest.mark.parametrize(
    ("word", "option", "label"),
    [("First one", "says_left", 1.0), ("Zweites", "says_right", 0.0), ("Beide", "says_tie", 0.5), ("Weiter", "says_skip", None)],
)
def test_words_of_ones_own(tmp_path, capsys, word, option, label):
    task = own_task()
    task["annotations"][0]["result"][0]["value"]["choices"] = [word]
    said = refusal(capsys, save(tmp_path / "export.json", [task]))
    assert f"row 0, annotation 1: the answer is '{word}', and must be one of left, right, tie, skip" in said and "says_left" in said
    found = own(tmp_path, task, "--columns", json.dumps({option: word}))[1]
    assert found == ([] if label is None else [(label, 1, "4")])


def test_one_of_several_questions_must_be_chosen(tmp_path, capsys):
    task = own_task()
    task["annotations"][0]["result"].append({"from_name": "colour", "to_name": "a", "type": "choices", "value": {"choices": ["image 2"]}})
    said = refusal(capsys, save(tmp_path / "export.json", [task]))
    assert """there are answers to pick, colour; say which counts with --columns '{"answer": "pick"}'""" in said
    assert own(tmp_path, task, "--columns", '{"answer": "colour"}')[1] == [(0.0, 1, "4")]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data": "x"}, "row 0: data is str, and must be an object"),
        ({"annotations": [17]}, "an annotation is int, and must be an object"),
        ({"annotations": {"a": 1}}, "annotations is dict, and must be a list"),
        ({"data": {"image_1": "a", "image_2": "b"}}, "which value is the prompt cannot be told from image_1, image_2"),
        ({"data": {"prompt": "a", "photo": "b"}}, "which value is the two images cannot be told from prompt, photo"),
        ({"data": {"prompt": "a", "left": "b", "right": "c", "left_is": "both"}}, "left_is is 'both', and must be image_0 or image_1"),
        ({"data": {"prompt": "a", "left": "b", "right": "c", "answers": "x"}}, "answers is 'x', and must be a JSON list"),
    ],
)
def test_what_is_no_export_is_named(tmp_path, capsys, changes, words):
    assert words in refusal(capsys, save(tmp_path / "export.json", [own_task(**changes)]))


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ('{"image_0": "a"}', "--columns is for your own tables, and labelstudio has columns of its own"),
        ('{"left": "image_1"}', "--columns names only one of left and right; name both"),
        ('{"prompt": "gone"}', "--columns says that prompt is 'gone', which is not there"),
    ],
)
def test_columns_that_cannot_be_meant(tmp_path, capsys, columns, words):
    assert words in refusal(capsys, save(tmp_path / "export.json", [own_task()]), "--columns", columns)


def test_two_choices_at_once_are_refused(tmp_path, capsys):
    task = own_task()
    task["annotations"][0]["result"][0]["value"]["choices"] = ["image_1", "image_2"]
    assert "annotation 1 chooses image_1 and image_2; one answer is needed" in refusal(capsys, save(tmp_path / "export.json", [task]))


def test_two_tasks_of_one_name_that_differ_are_refused(tmp_path, pairs, capsys):
    out = export(pairs, "labelstudio", tmp_path / "out", "--images", "data")
    tasks = annotated(out)
    tasks[1]["data"]["pair_id"] = tasks[0]["data"]["pair_id"]
    said = refusal(capsys, save(tmp_path / "export.json", tasks))
    assert "row 1 has the name of a pair in" in said and "row 0, and another prompt" in said


def test_an_interrupted_import_goes_on(tmp_path, pairs):
    """Whole shards stay; the same command takes up the rest, with answers that follow their pair."""
    out = export(pairs, "labelstudio", tmp_path / "out")
    source = save(tmp_path / "export.json", annotated(out) + annotated(out)[:3])
    (out / "images" / "000006-left.png").rename(tmp_path / "away.png")
    words = ["ingest", "labelstudio", str(source), "--images", str(out), "--shard_pairs", "2", "--out", str(tmp_path / "Q")]
    assert main(words) == 2
    (tmp_path / "away.png").rename(out / "images" / "000006-left.png")
    assert main(words) == 0
    ingest(source, tmp_path / "R", "--images", str(out))
    assert state(tmp_path / "Q") == state(tmp_path / "R")
    first, second = (json.loads((tmp_path / name / "ingest.json").read_text(encoding="utf-8"))["counts"] for name in "QR")
    assert first == second
