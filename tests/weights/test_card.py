"""A model card says what was recorded, and nothing else: numbers are the results', texts stay texts, the user's files stay."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from PIL import Image
from safetensors.torch import load_file, save_file

from dedpo_diffusion.core.console import UserError
from dedpo_diffusion.core.files import file_digest
from dedpo_diffusion.pipelines import export, train
from dedpo_diffusion.weights.card import add_card
from dedpo_diffusion.weights.card_text import Exported, code, interval, model_card, plain, table
from dedpo_diffusion.weights.header import read_header
from dedpo_diffusion.weights.run_folder import read_settings
from support.training import arguments

MARKDOWN = MarkdownIt("commonmark").enable("table")
LORA = Exported("tuned.safetensors", "lora", "diffusers", "sd1", "4 layers", "f" * 64)
NASTY = "a | b `c` ``d`` <script>x</script> **e** [f](g) $h$ _i_ #j\n## k"


def spread(mean, low, high, **more):
    return {"mean": mean, "ci": [low, high], **more}


def scored(gain, wins, n, **p):
    return {"gain_over_base": spread(*gain, **p), "win_rate_vs_base": spread(*wins), "n": n}


def results(*arms, nasty=""):
    """As `dedpo compare` writes them, for two scorers and people."""
    by_scorer = {
        "pickscore": scored((0.12345, 0.051, 0.196), (0.61, 0.52, 0.7), 40, p=0.001, p_holm=0.002),
        "clip": scored((2.5, 2.25, 2.75), (0.9, 0.8, 0.95), 40, p=0.0, p_holm=0.0),
        "people": scored((0.2, -0.1, 0.5), (0.6, 0.45, 0.75), 12),
    }
    category = {"n_prompts": 3, "n_images": 6} | scored((0.1, 0.0, 0.2), (0.5, 0.4, 0.6), 6)
    people = {
        "answers": 30,
        "pairs": 12,
        "raters": ["ann", "bob"],
        "agreement": {"raw": {"value": 0.625}},
        "with_scorers": {"clip": spread(0.7, 0.5, 0.9, n=11)},
    }
    arm = {
        "by_scorer": by_scorer,
        "categories": {f"Animals{nasty}": {"pickscore": category}},
        "spread": {"clip": {"version": "1", "diversity": None, "diversity_minus_base": None, "drift": spread(0.31, 0.3, 0.32)}},
        "people": people,
        "warnings": [f"clip rises{nasty} and the others do not."],
    }
    roles = {"pickscore": "held_out", "clip": "made_labels", "people": "held_out"}
    about = {"version": "1", "kind": "scorer"}
    scorers = {name: {**about, "role": role, "held_out": role == "held_out"} for name, role in roles.items()}
    scorers["people"]["kind"] = "people"
    return {
        "schema": 2, "verdict": f"On pickscore{nasty}, tuned is better than base.", "notes": [], "primary": "pickscore", "base": "base",
        "n_images": 40, "n_prompts": 20, "resamples": 1000, "seed": 0, "scorers": scorers,
        "arms": {"base": {"by_scorer": {}}} | {name: arm for name in arms or ("tuned",)}, "differences": {},
    }  # fmt: skip


TRAINED = {
    "model": "owner/base-model",
    "data": {"pairs": "/home/someone/pairs", "targets": "tuned"},
    "weights": "lora",
    "lora": {"rank": 4, "alpha": 2.0},
    "objective": {"kind": "sigmoid", "beta": 2000.0, "balance": "output"},
    "optim": {"steps": 100, "batch": 4, "learning_rate": 1e-4},
    "step": 90,
}
TARGETS = {
    "method": "tuned",
    "n": 400,
    "n_human": 100,
    "power": 0.64,
    "effective_human_labels": {"value": 144.2, "ci": [118.0, 179.0]},
    "judges": [{"name": "clip", "agreement": {"value": 0.82, "ci": [0.73, 0.88], "n": 100}, "power": 0.64}],
    "sentences": ["These 100 human and 300 judge labels are worth about 144 human labels (95 %: 118 to 179)."],
    "warnings": [{"kind": "x", "text": "Warning: something is odd."}],
    "label_files": {"human": {"file": "labels/human.parquet", "sha256": "e" * 64}},
}


def rows_of(text):
    """The cells of all tables of a card, as their text, row by row."""
    rows, cells = [], None
    for token in MARKDOWN.parse(text.split("---\n", 2)[2]):
        if token.type == "tr_open":
            cells = []
        elif token.type == "tr_close":
            rows.append(cells)
            cells = None
        elif token.type == "inline" and cells is not None:
            cells.append("".join(child.content for child in token.children if child.type in ("text", "code_inline", "text_special")))
    return rows


# ---- the text


def test_the_head_is_what_the_hub_reads():
    text = model_card(TRAINED, LORA, targets=TARGETS, results=results(), arm="tuned")
    data = huggingface_hub.ModelCard(text).data
    assert (data.base_model, data.library_name, data.pipeline_tag, data.license) == ("owner/base-model", "diffusers", "text-to-image", None)
    assert set(data.tags) == {"text-to-image", "diffusers", "lora", "dedpo", "diffusion-dpo", "stable-diffusion", "template:sd-lora"}
    assert text.split("\n")[1].startswith("# license:")  # left to the author, who cannot miss it
    whole = model_card(TRAINED | {"model": "/data/base.safetensors"}, Exported("m", "folder", family="sdxl"))
    data = huggingface_hub.ModelCard(whole).data
    assert data.base_model is None and {"full", "stable-diffusion-xl"} <= set(data.tags) and "template:sd-lora" not in data.tags
    assert "diffusion-dpo" not in huggingface_hub.ModelCard(model_card(TRAINED | {"objective": {"kind": "sft"}}, LORA)).data.tags


def test_numbers_are_those_of_the_results():
    found = results()
    text = model_card(TRAINED, LORA, results=found, arm="tuned")
    for row in (
        ["pickscore (verdict)", "held out", "+0.123 (+0.051 to +0.196), p = 0.002", "61.0 % (52.0 to 70.0)", "40"],
        ["clip", "made the labels", "+2.50 (+2.25 to +2.75), p < 0.001", "90.0 % (80.0 to 95.0)", "40"],
        ["people", "held out", "+0.20 (-0.10 to +0.50)", "60 % (45 to 75)", "12"],
        ["Animals", "3", "+0.10 (+0.00 to +0.20)", "50 % (40 to 60)"],
        ["clip", "one seed a prompt", "one seed a prompt", "0.310 (0.300 to 0.320)"],
    ):
        assert row in rows_of(text)
    assert "30 answers on 12 pairs, given blind by 2 people" in text and "are equal in 62% of cases" in text
    assert "`clip` sides with them in 70 % (50 to 90) of 11" in text
    assert "ann" not in text.split("## Results")[1].split()  # nobody is named
    assert f"> {found['verdict']}" in text and "- clip rises and the others do not." in text
    assert "`pickscore` and `people` took no part" in text and "of `clip` were trained on" not in text  # without a label report


@given(mean=st.floats(-100, 100), half=st.floats(1e-6, 50), percent=st.booleans())
@settings(deadline=None, max_examples=60)
def test_a_rounded_interval_keeps_two_digits_of_its_width(mean, half, percent):
    words = interval({"mean": mean, "ci": [mean - half, mean + half]}, percent=percent)
    factor = 100 if percent else 1
    shown = re.findall(r"[-+]?\d+(?:\.\d+)?", words)
    for value, told in zip((mean, mean - half, mean + half), shown, strict=True):
        unit = 10.0 ** -len(told.partition(".")[2])
        assert unit <= max(0.1 * factor * half, 1e-8) * 1.001 or unit == 1
        assert abs(factor * value - float(told)) <= 0.501 * unit


@given(
    text=st.text(st.characters(exclude_categories=("Cc", "Cs")), max_size=40)
    | st.sampled_from([NASTY, "- a", "1. b", "===", "---", "`", "a`", "\\|", "&amp;", "http://x|y"])
)
@settings(deadline=None, max_examples=80)
def test_texts_stay_texts(text):
    line = " ".join(text.split())
    shown = "\n".join(table(["what", "value"], [[plain(text), code(text, cell=True)]]))
    [head, cells] = rows_of(f"---\n---\n{shown}")
    assert head == ["what", "value"]
    assert [cells[0].strip(), cells[1].strip()] == [line, line.strip()]
    [*_, inline, _] = MARKDOWN.parse(f"> {plain(text)} end")[1:-1] if line else [None, MARKDOWN.parse("end")[1], None]
    assert {child.type for child in inline.children} <= {"text", "text_special"}
    [paragraph] = [token for token in MARKDOWN.parse(f"see {code(text)}") if token.type == "inline"]
    assert [child.content.strip() for child in paragraph.children if child.type == "code_inline"] == [line]


def test_a_card_of_nasty_names_has_no_markup_of_theirs():
    mild = Exported("a.safetensors", "lora", "kohya", "sd1")
    nasty_trained = TRAINED | {"model": "/x/base ` | b.safetensors", "data": {"pairs": "/x/a|b`c", "targets": NASTY}}
    nasty_targets = TARGETS | {"sentences": [NASTY], "warnings": [{"text": NASTY}], "judges": [TARGETS["judges"][0] | {"name": NASTY}]}
    text = model_card(
        nasty_trained,
        Exported("a`b|<c>.safetensors", "lora", "kohya", "sd1"),
        targets=nasty_targets,
        results=results(nasty=NASTY),
        arm="tuned",
    )
    tokens = MARKDOWN.parse(text.split("---\n", 2)[2])
    inner = [child.type for token in tokens for child in token.children or []]
    assert not any(kind.startswith("html") for kind in [*inner, *(token.type for token in tokens)])
    usual = MARKDOWN.parse(model_card(TRAINED, mild, targets=TARGETS, results=results(), arm="tuned").split("---\n", 2)[2])
    assert [token.tag for token in tokens if token.type == "heading_open"] == [token.tag for token in usual if token.type == "heading_open"]
    widths = {len(row) for row in rows_of(text)}
    assert widths == {2, 4, 5}
    line = " ".join(NASTY.split())
    assert ["targets", line] in rows_of(text)
    assert huggingface_hub.ModelCard(text).data.pipeline_tag == "text-to-image"


def test_what_is_not_known_is_not_said():
    text = model_card({}, Exported("x.safetensors", "lora", "diffusers"))
    assert not re.search(r"\b(None|nan|null|\{\})\b", text)
    assert "## Labels" not in text and "## Results" not in text and "## Data" not in text
    assert "was not measured" in text
    old = results()  # of an earlier version: no roles, no categories, no people
    old["scorers"] = {name: {"version": "1", "held_out": name == "pickscore"} for name in ("pickscore", "clip")}
    old["arms"]["tuned"] = {"by_scorer": {name: old["arms"]["tuned"]["by_scorer"][name] for name in ("pickscore", "clip")}}
    text = model_card(TRAINED, LORA, results=old, arm="tuned")
    assert "not known to be held out" in text and "No person judged these images" in text


def test_no_path_of_the_machine_is_told():
    for model in ("/home/someone/models/base", "../models/base.safetensors"):
        text = model_card(TRAINED | {"model": model, "out": "/home/someone/runs/x"}, LORA, targets=TARGETS)
        assert "someone" not in text and "../" not in text


def test_how_other_programs_load_it():
    raw = model_card(TRAINED, LORA)
    assert "dedpo export tuned.safetensors --format kohya --out tuned-kohya.safetensors" in raw and "models/loras" not in raw
    beside = model_card(TRAINED, Exported("tuned.safetensors", "lora", "diffusers", "sd1", kohya=["tuned-kohya.safetensors"]))
    assert "ComfyUI reads `tuned-kohya.safetensors`" in beside and "<lora:tuned-kohya:1>" in beside
    assert "from_single_file('x.safetensors')" in model_card(TRAINED, Exported("x.safetensors", "checkpoint", family="sdxl"))


def test_what_was_done_to_what_was_trained():
    made = {"strength": 0.7, "added": [{"file": "b.safetensors", "sha256": "d" * 64, "strength": 0.5}], "rank": 4, "relative_error": 0.0123}
    text = model_card(TRAINED, Exported("tuned.safetensors", "lora", "kohya", "sd1", made=made))
    assert "times 0.7" in text and "`b.safetensors`" in text and "at strength 0.5" in text and "rank 4, which leaves out 1.2% of" in text


# ---- the file


@pytest.fixture(scope="module")
def trained(tiny_model, tiny_pairs, tmp_path_factory):
    """A run on its own copy of the pairs, and the LoRA exported from it."""
    root = tmp_path_factory.mktemp("card")
    pairs = shutil.copytree(tiny_pairs, root / "pairs")
    (pairs / "targets" / "soft.json").write_text(json.dumps(TARGETS))
    assert train.main(arguments(tiny_model, pairs, root / "run", optim__steps=2, checkpoint_every=1, lora__rank=2, lora__alpha=1)) == 0
    assert export.main([str(root / "run"), "--out", str(root / "tuned.safetensors")]) == 0
    return root


@pytest.fixture
def place(trained, tmp_path):
    """A folder with the exported LoRA alone."""
    shutil.copy(trained / "tuned.safetensors", tmp_path)
    return tmp_path


def write_results(folder: Path, found, **samples) -> Path:
    """results.json, and for each arm a sample folder of the LoRA named."""
    folder.mkdir(exist_ok=True)
    for name, lora in samples.items():
        (folder / "samples" / name).mkdir(parents=True)
        (folder / "samples" / name / "settings.yaml").write_text(yaml.safe_dump({"model": "base", "lora": str(lora) if lora else None}))
        (folder / "samples" / name / "identity.json").write_text(
            json.dumps({"lora": file_digest(lora) if lora and lora.is_file() else "0"})
        )
    (folder / "results.json").write_text(json.dumps(found))
    return folder / "results.json"


def test_the_card_of_a_run(trained, place, tiny_model):
    file = write_results(place / "report", results())
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(file.parent / "contact_sheet.png")
    path = add_card(place / "tuned.safetensors", trained / "run", results=file)
    text = path.read_text(encoding="utf-8")
    assert path == place / "README.md"
    rows = rows_of(text)
    assert ["tuned.safetensors", file_digest(place / "tuned.safetensors")] in rows
    identity = json.loads((trained / "run" / "identity.json").read_text())
    assert ["base model", identity["base_model"]] in rows and ["targets", identity["targets"]] in rows
    assert (
        ["step", "2 of 2"] in rows
        and ["human labels", "100 of 400 pairs"] in rows
        and ["worth in human labels (95 %)", "144 (118 to 179)"] in rows
    )
    assert "rank 2" in text and "Warning: something is odd." in text
    [sheet] = place.glob("*.png")
    assert f"]({sheet.name})" in text and file_digest(sheet) == file_digest(file.parent / "contact_sheet.png")
    assert add_card(place / "tuned.safetensors", trained / "run", results=file).read_text(encoding="utf-8") == text  # deterministic

    script = text.split("```python\n")[1].split("```")[0].replace("'model'", repr(str(tiny_model)))
    scope: dict = {}
    with contextlib.chdir(place):
        exec(script, scope)  # what it says works
    assert scope["image"].size == (16, 16) and scope["pipe"].get_list_adapters()["unet"]


def test_the_command_writes_the_card_too(trained, tmp_path, capsys):
    command = [str(trained / "run"), "--out", str(tmp_path / "tuned.safetensors"), "--format", "kohya"]
    assert export.main([*command, "--results", str(write_results(tmp_path / "report", results()))]) == 0
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "this model is `tuned`" in text and "fill in its license" in capsys.readouterr().out
    for more, words in (
        (["--arm", "tuned"], "give both"),
        (["--results", str(tmp_path / "none.json")], "no such file"),
        (["--results", str(write_results(tmp_path / "two", results("naive", "tuned")))], "the model itself is written"),
    ):
        assert export.main([*command, *more]) == 2 and words in " ".join(capsys.readouterr().err.split())
    other = [str(tmp_path / "tuned.safetensors"), "--out", str(tmp_path / "again.safetensors"), "--card", "true"]
    assert export.main(other) == 2 and "written from a run folder" in capsys.readouterr().err


def test_cards_of_whole_models(trained, place, tiny_model, folders):
    assert export.main([str(trained / "run"), "--out", str(place / "whole"), "--format", "merged"]) == 0
    path = add_card(place / "whole", trained / "run")
    assert path == place / "whole" / "README.md" and "A whole model as a diffusers folder" in path.read_text()
    assert "step | `2 of 2`" in path.read_text()
    with pytest.raises(UserError, match="no card is written for"):
        add_card(tiny_model / "vae", trained / "run")


def test_nothing_of_the_users_is_overwritten(trained, place):
    out, run = place / "tuned.safetensors", trained / "run"
    first = add_card(out, run)
    other = shutil.copy(out, place / "other.safetensors")
    assert add_card(Path(other), run) == place / "other.md"  # README.md is of another model
    assert add_card(out, run) == first
    edited = first.read_text().replace("# license: the author", "license: mit  # the author")
    first.write_text(edited)
    assert add_card(out, run) == place / "tuned.md"
    assert first.read_text() == edited
    (place / "tuned.md").write_text("mine")
    with pytest.raises(UserError, match=r"README.md and .*tuned.md are yours"):
        add_card(out, run)
    assert (place / "tuned.md").read_text() == "mine"


def resaved(source: Path, path: Path) -> Path:
    """The same LoRA under the same settings, in other bytes."""
    header = read_header(source)
    save_file(load_file(source), path, metadata=header.metadata | {"modelspec.title": "x"})
    return path


def test_which_arm_it_is(trained, place):
    out, run = place / "tuned.safetensors", trained / "run"
    foreign = place / "foreign.safetensors"
    save_file(load_file(out), foreign, metadata={"dedpo_settings": json.dumps(read_settings(run) | {"step": 1})})
    same = resaved(out, place / "same.safetensors")
    two = results("naive", "tuned")
    told = write_results(place / "a", two, base=None, naive=foreign, tuned=out)
    assert "this model is `tuned`" in add_card(out, run, results=told).read_text()
    through = add_card(out, run, results=write_results(place / "b", two, naive=same, tuned=foreign)).read_text()
    assert "this model is `naive`" in through and "another file of the same LoRA" in through
    assert "this model is `tuned`" in add_card(out, run, results=write_results(place / "c", results())).read_text()  # the only one
    for name, found, samples in (
        ("d", two, {}),
        ("e", two, {"naive": out, "tuned": out}),
        ("f", results(), {"tuned": foreign}),
        ("g", two, {"naive": foreign, "tuned": foreign}),
    ):
        file = write_results(place / name, found, **samples)
        with pytest.raises(UserError, match=r"remains unclear .* name it with --arm"):
            add_card(out, run, results=file)
        assert "this model is `tuned`" in add_card(out, run, results=file, arm="tuned").read_text()
    for wrong in ("base", "nonsense"):
        with pytest.raises(UserError, match="no arm of"):
            add_card(out, run, results=told, arm=wrong)
    with pytest.raises(UserError, match="--results"):
        add_card(out, run, arm="tuned")


def test_what_is_refused(trained, place, capsys):
    out, run = place / "tuned.safetensors", trained / "run"
    save_file(load_file(out), place / "x.safetensors", metadata={"dedpo_settings": json.dumps(read_settings(run) | {"seed": 7})})
    with pytest.raises(UserError, match=r"not exported from .*seed"):
        add_card(place / "x.safetensors", run)
    for name, text in (("a.json", "{"), ("b.json", "{}"), ("c.json", "[]")):
        (place / name).write_text(text)
        with pytest.raises(UserError, match=r"results.json"):
            add_card(out, run, results=place / name)
    broken = results()
    del broken["arms"]["tuned"]["by_scorer"]["clip"]["win_rate_vs_base"]
    with pytest.raises(UserError, match=r"win_rate_vs_base.*dedpo compare"):
        add_card(out, run, results=write_results(place / "r", broken))
    assert not list(place.glob("*.md"))
    targets = trained / "pairs" / "targets" / "soft.parquet"
    before = targets.read_bytes()
    targets.write_bytes(before + b" ")
    try:
        assert "## Labels" not in add_card(out, run).read_text()  # those it trained on are gone
    finally:
        targets.write_bytes(before)
    assert "changed since the run" in capsys.readouterr().out


def test_a_share_of_the_visits_is_told_where_a_run_had_one():
    told = model_card(TRAINED, LORA, identity={"label_share": "0.4812"}, targets=TARGETS)
    assert "| visits to pairs that people labelled | 48% |" in told
    assert "visits to pairs" not in model_card(TRAINED, LORA, identity={}, targets=TARGETS)
