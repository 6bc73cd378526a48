"""CLIP score, HPSv2.1 and the aesthetic predictor: tiny checkpoints in the real formats against the arithmetic by hand."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import sys
from functools import cache
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from dedpo_diffusion.core.console import UserError
from dedpo_diffusion.judges.bradley_terry import BradleyTerry
from dedpo_diffusion.judges.scorers import load_scorer

SIDE, CONTEXT, WIDTH, LAYERS = 32, 16, 12, (0, 2, 4, 6, 7)
MEAN, STD = np.array([0.48145466, 0.4578275, 0.40821073]), np.array([0.26862954, 0.26130258, 0.27577711])
PROMPTS = ["a cat", "two red boats on a lake", "a", "a cat, painted in oil", "zzz qqq"]


def settings(quick_gelu: bool = False, **others) -> dict:
    vision = {"image_size": SIDE, "layers": 1, "width": 32, "patch_size": 16, "head_width": 16}
    text = {"context_length": CONTEXT, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
    return {"embed_dim": WIDTH, "vision_cfg": vision, "text_cfg": text, "quick_gelu": quick_gelu, **others}


def write_config(folder: Path, quick_gelu: bool = False, **preprocess) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": settings(quick_gelu), "preprocess_cfg": preprocess}))


@cache
def build_model(quick_gelu: bool = False) -> torch.nn.Module:
    """A model with random weights, large enough in every layer for the activation to matter."""
    torch.manual_seed(0)
    model = open_clip.CLIP(**settings(quick_gelu)).eval()
    for name, parameter in model.named_parameters():
        if name != "logit_scale":
            torch.nn.init.normal_(parameter, std=0.2)
    return model


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    return build_model().state_dict()


@pytest.fixture(scope="module")
def folder(tmp_path_factory, weights) -> Path:
    """What open_clip saves for the hub."""
    folder = tmp_path_factory.mktemp("clip") / "model"
    write_config(folder)
    save_file(weights, folder / "open_clip_model.safetensors")
    return folder


@pytest.fixture(scope="module")
def hps(tmp_path_factory, weights) -> Path:
    """A tiny architecture and a checkpoint as HPSv2 publishes it."""
    folder = tmp_path_factory.mktemp("hps") / "model"
    write_config(folder)
    torch.save({"epoch": 3, "state_dict": weights}, folder / "HPS_tiny.pt")
    return folder


def build_head(path: Path, width: int = WIDTH) -> Path:
    torch.manual_seed(1)
    sides = (width, 10, 8, 6, 4, 1)
    shapes = {f"layers.{layer}": pair for layer, pair in zip(LAYERS, zip(sides[1:], sides[:-1], strict=True), strict=True)}
    parts = {f"{name}.weight": torch.randn(pair) for name, pair in shapes.items()}
    torch.save(parts | {f"{name}.bias": torch.randn(pair[0]) for name, pair in shapes.items()}, path)
    return path


@pytest.fixture(scope="module")
def aesthetic(tmp_path_factory, folder) -> Path:
    both = tmp_path_factory.mktemp("aesthetic") / "model"
    shutil.copytree(folder, both)
    build_head(both / "sac+logos+ava1-l14-linearMSE.pth")
    return both


@pytest.fixture
def no_hub(monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


@pytest.fixture
def named(tmp_path, monkeypatch) -> None:
    """open_clip knows the architectures "tiny" and "tiny-quickgelu"."""
    factory = sys.modules["open_clip.factory"]
    monkeypatch.setattr(factory, "_MODEL_CONFIGS", dict(factory._MODEL_CONFIGS))
    monkeypatch.setattr(factory, "_MODEL_CONFIG_PATHS", list(factory._MODEL_CONFIG_PATHS))
    for name, quick_gelu in (("tiny", False), ("tiny-quickgelu", True)):
        (tmp_path / "configs").mkdir(exist_ok=True)
        (tmp_path / "configs" / f"{name}.json").write_text(json.dumps(settings(quick_gelu)))
    open_clip.add_model_config(tmp_path / "configs")


def pictures(*sizes: tuple[int, int]) -> list[Image.Image]:
    """Smooth random pictures, (width, height) each, so that a resized one is not all noise."""
    rng = np.random.default_rng(0)
    small = [Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)) for _ in sizes]
    return [image.resize(size, Image.Resampling.BILINEAR) for image, size in zip(small, sizes, strict=True)]


SIZES = ((32, 32), (64, 48), (40, 90), (33, 31), (100, 20))


def load(spec: str, batch: int = 64, dtype: str = "float32"):
    return load_scorer(spec, device="cpu", batch=batch, dtype=dtype)


ready = cache(load)  # for tests that change nothing in a scorer
tokens_of = cache(lambda: open_clip.SimpleTokenizer(context_length=CONTEXT))


def cropped(image: Image.Image) -> np.ndarray:
    """CLIP's view, (3, SIDE, SIDE): the shorter side to SIDE by Pillow's bicubic filter, the middle cut out."""
    width, height = image.size
    short = min(image.size)
    image = image.resize((int(SIDE * width / short), int(SIDE * height / short)), Image.Resampling.BICUBIC)
    left, top = round((image.width - SIDE) / 2), round((image.height - SIDE) / 2)
    pixels = np.asarray(image.crop((left, top, left + SIDE, top + SIDE)), dtype=np.float64) / 255
    return ((pixels - MEAN) / STD).transpose(2, 0, 1)


def padded(image: Image.Image) -> np.ndarray:
    """HPS's view: every channel resized as real numbers, black around it, normalised last."""
    scale = SIDE / max(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    square = np.zeros((SIDE, SIDE, 3))
    left, top = (SIDE - width) // 2, (SIDE - height) // 2
    for channel, plane in enumerate(np.moveaxis(np.asarray(image, dtype=np.float32) / 255, 2, 0)):
        resized = Image.fromarray(plane).resize((width, height), Image.Resampling.BICUBIC)
        square[top : top + height, left : left + width, channel] = np.asarray(resized)
    return ((square - MEAN) / STD).transpose(2, 0, 1)


@torch.no_grad()
def vectors(prompt: str, view: np.ndarray, quick_gelu: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """The unit vectors of one image's pixels and one prompt, float64 from the towers on."""
    model, tokens = build_model(quick_gelu), tokens_of()([prompt])
    seen = model.encode_image(torch.tensor(view, dtype=torch.float32)[None])[0].double().numpy()
    read = model.encode_text(tokens)[0].double().numpy()
    return seen / np.linalg.norm(seen), read / np.linalg.norm(read)


def cosines(view, images=None, quick_gelu: bool = False) -> np.ndarray:
    images = pictures(*SIZES) if images is None else images
    return np.array([np.dot(*vectors(p, view(i), quick_gelu)) for p, i in zip(PROMPTS, images, strict=False)])


def head_by_hand(path: Path, seen: np.ndarray) -> float:
    parts = torch.load(path, weights_only=True)
    for layer in LAYERS:
        seen = parts[f"layers.{layer}.weight"].double().numpy() @ seen + parts[f"layers.{layer}.bias"].double().numpy()
    return float(seen[0])


def test_clip_score_is_a_hundred_cosines_of_the_cropped_image(folder):
    """Tolerance: float32 towers in other batch shapes leave about 1e-7 on a cosine."""
    found = ready(f"clip={folder}").score(PROMPTS, pictures(*SIZES))
    assert found.shape == (5,) and found.dtype == np.float64
    np.testing.assert_allclose(found / 100, cosines(cropped), atol=1e-6, rtol=0)
    assert np.ptp(found) > 1  # the test would see mixed-up rows


def test_hps_is_the_cosine_of_the_whole_image_on_a_black_square(hps):
    found = ready(f"hps={hps}").score(PROMPTS, pictures(*SIZES))
    np.testing.assert_allclose(found, cosines(padded), atol=1e-6, rtol=0)
    assert np.ptp(found) > 0.01


def test_the_aesthetic_score_is_the_head_on_the_unit_vector(aesthetic):
    found = ready(f"aesthetic={aesthetic}").score(PROMPTS, pictures(*SIZES))
    head = aesthetic / "sac+logos+ava1-l14-linearMSE.pth"
    wanted = [head_by_hand(head, vectors("a", cropped(image))[0]) for image in pictures(*SIZES)]
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    assert np.ptp(found) > 0.01
    np.testing.assert_array_equal(ready(f"aesthetic={aesthetic}").score(["other"] * 5, pictures(*SIZES)), found)


def specs(folder: Path, hps: Path, aesthetic: Path) -> list[tuple[str, float]]:
    """Every scorer, and the size of a float32 error in its scores."""
    return [(f"clip={folder}", 1e-4), (f"hps={hps}", 1e-6), (f"aesthetic={aesthetic}", 1e-4)]


def test_a_score_depends_on_its_own_pair_alone(folder, hps, aesthetic):
    order, images = [3, 1, 4, 0, 2], pictures(*SIZES)
    for spec, near in specs(folder, hps, aesthetic):
        together = ready(spec).score(PROMPTS, images)
        np.testing.assert_allclose(ready(spec, batch=1).score(PROMPTS, images), together, atol=near)
        shuffled = ready(spec, batch=2).score([PROMPTS[k] for k in order], [images[k] for k in order])
        np.testing.assert_allclose(shuffled, together[order], atol=near)
        assert ready(spec).score([], []).shape == (0,)


def test_the_sides_of_a_picture_count_for_hps_and_not_for_clip(folder, hps):
    """CLIP's crop of 96 x 48 is columns 24 to 72; its filter reaches 4 pixels beyond. HPS sees the whole."""
    image = pictures((96, 48))[0]
    framed = Image.new("RGB", image.size)
    framed.paste(image.crop((20, 0, 76, 48)), (20, 0))
    clip, whole = (ready(spec).score(["a cat"] * 2, [image, framed]) for spec in (f"clip={folder}", f"hps={hps}"))
    assert clip[0] == clip[1]
    assert abs(whole[0] - whole[1]) > 1e-3
    corner = ready(f"hps={hps}").pixels(image)[:, 0, 0]
    np.testing.assert_allclose(corner, -MEAN / STD, rtol=1e-6)  # black, normalised like the rest


@pytest.mark.parametrize("size", [(500, 2), (2, 500), (1, 1), (32, 7)])
def test_hps_takes_every_shape(hps, size):
    pixels = ready(f"hps={hps}").pixels(pictures(size)[0])
    assert pixels.shape == (3, SIDE, SIDE) and torch.isfinite(pixels).all()


def test_grey_transparent_and_indexed_pictures_are_turned_into_rgb(folder, hps, aesthetic):
    image = pictures((50, 40))[0]
    others = [image.convert("L"), image.convert("P"), image.convert("RGBA")]
    for spec, _ in specs(folder, hps, aesthetic):
        scorer = ready(spec)
        np.testing.assert_array_equal(scorer.score(["a"] * 3, others), scorer.score(["a"] * 3, [o.convert("RGB") for o in others]))


def test_what_occurs_often_is_embedded_once(folder, aesthetic):
    a, b, c = pictures(*SIZES[:3])
    for spec, texts in ((f"clip={folder}", [1, 1]), (f"aesthetic={aesthetic}", [])):
        scorer, seen, read = load(spec, batch=2), [], []
        scorer.model.visual.register_forward_hook(lambda module, inputs, output, seen=seen: seen.append(len(inputs[0])))
        scorer.model.token_embedding.register_forward_hook(lambda module, inputs, output, read=read: read.append(len(inputs[0])))
        found = scorer.score(["x", "y", "x", "x", "z"], [a, b, a, c, a])
        assert seen == [2, 1] and read == ([2, 1] if texts else [])
        assert found[0] == found[2]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_towers_of_low_precision_keep_the_scores_near(folder, hps, aesthetic, dtype):
    """Unit vectors are off by about 2^-8 (bfloat16) or 2^-11; CLIP's factor of 100 and the head are applied in float32."""
    for (spec, _), size in zip(specs(folder, hps, aesthetic), (100, 1, 100), strict=True):
        low, full = ready(spec, dtype=dtype), ready(spec)
        assert {p.dtype for p in low.model.parameters()} == {getattr(torch, dtype)}
        found, wanted = low.score(PROMPTS, pictures(*SIZES)), full.score(PROMPTS, pictures(*SIZES))
        np.testing.assert_allclose(found, wanted, atol=size * (0.01 if dtype == "bfloat16" else 0.0015))
        assert not np.array_equal(found, wanted)
        assert not np.array_equal(found, torch.from_numpy(found).to(getattr(torch, dtype)).double())  # the score is not rounded
        assert low.version == f"{full.version}-{dtype}" and "float" not in full.version


def test_a_projection_twice_as_large_changes_no_score(folder, hps, aesthetic, tmp_path):
    for spec, near in specs(folder, hps, aesthetic):
        one, other = ready(spec), load(spec)
        other.model.visual.proj.data.mul_(2)
        other.model.text_projection.data.mul_(3)
        np.testing.assert_allclose(other.score(PROMPTS, pictures(*SIZES)), one.score(PROMPTS, pictures(*SIZES)), atol=near)


def test_quick_gelu_follows_the_name_the_tag_and_the_folder(tmp_path, folder, weights, named, monkeypatch):
    """The same weights with either activation, found by every way to name them."""
    images, file = pictures(*SIZES), folder / "open_clip_model.safetensors"
    plain, quick = 100 * cosines(cropped), 100 * cosines(cropped, quick_gelu=True)
    assert np.abs(plain - quick).max() > 0.1
    tags = {"slow": {"file": str(file), "quick_gelu": False}, "fast": {"file": str(file), "quick_gelu": True}}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "tiny", tags)
    write_config(tmp_path / "quick", quick_gelu=True)
    shutil.copy(file, tmp_path / "quick")
    torch.save(weights, tmp_path / "plain.pt")
    expected = {
        f"tiny:{file}": plain,
        f"tiny:{tmp_path / 'plain.pt'}": plain,
        f"tiny-quickgelu:{file}": quick,
        "tiny:slow": plain,
        "tiny:fast": quick,
        str(folder): plain,
        str(tmp_path / "quick"): quick,
    }
    versions = {}
    for location, wanted in expected.items():
        scorer = load(f"clip={location}")
        np.testing.assert_allclose(scorer.score(PROMPTS, images), wanted, atol=1e-4, err_msg=location)
        versions[location] = scorer.version
    assert versions["tiny:slow"] != versions["tiny:fast"]
    assert versions[str(folder)] != versions[str(tmp_path / "quick")]


def test_a_tag_brings_its_own_pixel_statistics(folder, named, monkeypatch):
    tag = {"file": str(folder / "open_clip_model.safetensors"), "mean": (0.5,) * 3, "std": (0.25,) * 3, "resize_mode": "squash"}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "tiny", {"own": tag})
    image = pictures((64, 48))[0]
    wanted = (np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BICUBIC)) / 255 - 0.5) / 0.25
    np.testing.assert_allclose(load("clip=tiny:own").pixels(image), wanted.transpose(2, 0, 1), atol=1e-5)


def test_every_openai_tag_gets_quick_gelu(monkeypatch):
    """Both names of the default model; nothing is downloaded."""
    from dedpo_diffusion.judges.scorers.clip import DEFAULT, find_source

    monkeypatch.setattr(open_clip, "download_pretrained", lambda settings: "file")
    for location, wanted in ((DEFAULT, True), ("ViT-B-32-quickgelu:openai", True), ("ViT-L-14:openai", True), ("ViT-B/32:openai", True)):
        assert find_source("clip", location).options["force_quick_gelu"] is wanted
    assert find_source("clip", "ViT-B-32:laion2b_s34b_b79k").options["force_quick_gelu"] is False


def test_versions_name_the_weights_and_change_with_the_settings(folder, hps, aesthetic, tmp_path):
    digest = hashlib.sha256((folder / "open_clip_model.safetensors").read_bytes()).hexdigest()[:12]
    head = hashlib.sha256((aesthetic / "sac+logos+ava1-l14-linearMSE.pth").read_bytes()).hexdigest()[:12]
    clip, taste = ready(f"clip={folder}").version, ready(f"aesthetic={aesthetic}").version
    assert clip.startswith(f"clip-{digest}-") and clip.endswith("-100cos")
    assert taste.startswith(f"aesthetic-{digest}-") and taste.endswith(f"-{head}-linear")
    checkpoint = hashlib.sha256((hps / "HPS_tiny.pt").read_bytes()).hexdigest()[:12]
    assert ready(f"hps={hps}").version.startswith(f"hps-{checkpoint}-")
    shutil.copytree(folder, tmp_path / "other")
    write_config(tmp_path / "other", mean=[0.5, 0.5, 0.5])
    assert ready(f"clip={tmp_path / 'other'}").version != clip


def test_every_scorer_makes_a_judge(folder, hps, aesthetic):
    """At its own temperature: 1 of 100 cosines, 0.01 of a cosine, 1 point."""
    images = pictures(*SIZES)
    for (spec, _), temperature in zip(specs(folder, hps, aesthetic), (1.0, 0.01, 1.0), strict=True):
        scorer = ready(spec)
        found = BradleyTerry(scorer).prefer(PROMPTS[:2], images[:2], images[2:4])
        scores = scorer.score([*PROMPTS[:2]] * 2, images[:4])
        np.testing.assert_allclose(found, 1 / (1 + np.exp((scores[2:] - scores[:2]) / temperature)), rtol=1e-5)
        assert scorer.name == spec.partition("=")[0]


def test_longer_prompts_are_cut_and_that_is_said_once(folder, hps, aesthetic, capsys):
    fits, long, image = "cat " * (CONTEXT - 2), "cat " * (CONTEXT - 1), pictures((32, 32)) * 2
    for spec, _ in specs(folder, hps, aesthetic):
        scorer = load(spec)
        scorer.score([fits, "!" * 8], image)
        assert capsys.readouterr().out == ""
        found = scorer.score([long, long + "dog"], image)
        assert found[0] == pytest.approx(found[1], abs=1e-4)
        scorer.score([long, "a"], image)
        assert capsys.readouterr().out.count("reads 16 tokens and not the end") == (0 if "aesthetic" in spec else 1)


def test_open_clips_notices_stay_off_the_screen(folder, hps, capsys):
    before, disabled = list(logging.root.handlers), logging.root.manager.disable
    load(f"clip={folder}"), load(f"hps={hps}")
    out, err = capsys.readouterr()
    assert (out, err) == ("", "")
    assert logging.root.handlers == before and logging.root.manager.disable == disabled


def refused(spec: str) -> str:
    with pytest.raises(UserError) as refusal:
        load(spec)
    text = str(refusal.value)
    assert "\n" not in text and len(text) < 900
    return text


class Boom:
    def __reduce__(self):
        return (Path.touch, (Path("unpickled"),))


def test_nothing_is_unpickled(hps, aesthetic, named, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(hps, tmp_path / "hps")
    torch.save({"state_dict": Boom()}, tmp_path / "hps" / "HPS_tiny.pt")
    torch.save(Boom(), tmp_path / "head.pth")
    for spec in ("hps=hps", "aesthetic=head.pth", "clip=tiny:head.pth"):
        assert "nothing is unpickled here" in refused(spec)
    assert not Path("unpickled").exists()


def without(key: str):
    def damage(weights: dict) -> dict:
        return {name: value for name, value in weights.items() if name != key}

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without("visual.proj"), 'Missing key.* "visual.proj"'),
        (lambda weights: weights | {"visual.more": torch.zeros(1)}, 'Unexpected key.* "visual.more"'),
        (lambda weights: weights | {"visual.proj": torch.zeros(32, 5)}, "size mismatch for visual.proj"),
        (lambda weights: {}, "cannot be loaded as a model"),
    ],
)
def test_checkpoints_of_other_models(hps, folder, weights, tmp_path, damage, message):
    shutil.copytree(hps, tmp_path / "hps")
    torch.save({"state_dict": damage(weights)}, tmp_path / "hps" / "HPS_tiny.pt")
    shutil.copytree(folder, tmp_path / "clip")
    save_file(damage(weights), tmp_path / "clip" / "open_clip_model.safetensors")
    for name in ("hps", "clip"):
        with pytest.raises(UserError, match=message):
            load(f"{name}={tmp_path / name}")


def test_folders_that_hold_too_little_or_too_much(folder, hps, aesthetic, tmp_path):
    write_config(tmp_path / "empty")
    for name in ("clip", "hps"):
        assert f"{name}: {tmp_path / 'empty'} holds no weights (.safetensors, .bin, .pt, .pth)" in refused(f"{name}={tmp_path / 'empty'}")
    assert "holds no head (head*, aesthetic* or *linearMSE*)" in refused(f"aesthetic={folder}")
    shutil.copytree(aesthetic, tmp_path / "heads")
    build_head(tmp_path / "heads" / "head.pth")
    assert "holds 2 files (head.pth, sac+logos+ava1-l14-linearMSE.pth)" in refused(f"aesthetic={tmp_path / 'heads'}")
    shutil.copytree(hps, tmp_path / "hps")
    shutil.copy(folder / "open_clip_model.safetensors", tmp_path / "hps")
    assert "holds 2 files (HPS_tiny.pt, open_clip_model.safetensors)" in refused(f"hps={tmp_path / 'hps'}")
    (tmp_path / "bare").mkdir()
    shutil.copy(folder / "open_clip_model.safetensors", tmp_path / "bare")
    assert "holds no open_clip_config.json" in refused(f"clip={tmp_path / 'bare'}")
    (tmp_path / "hps" / "open_clip_config.json").write_text("{")
    assert "cannot be loaded as a model local-dir:" in refused(f"clip={tmp_path / 'hps'}")


def test_other_files_beside_open_clips_own_do_not_matter(folder, weights, tmp_path):
    """A hub repository often holds the same model in another program's format too."""
    shutil.copytree(folder, tmp_path / "both")
    save_file({"other": torch.zeros(1)}, tmp_path / "both" / "model.safetensors")
    assert ready(f"clip={tmp_path / 'both'}").version == ready(f"clip={folder}").version


def change(path: Path, edit) -> Path:
    torch.save(edit(torch.load(path, weights_only=True)), path)
    return path


def test_heads_that_are_none(aesthetic, tmp_path):
    def head(edit) -> str:
        return f"aesthetic={change(build_head(tmp_path / 'head.pth'), edit)}"

    assert "it lacks layers.4.bias" in refused(head(without("layers.4.bias")))
    assert "it also holds layers.1.weight" in refused(head(lambda parts: parts | {"layers.1.weight": torch.zeros(1)}))
    assert "do not fit together" in refused(head(lambda parts: parts | {"layers.7.weight": torch.zeros(1, 5)}))
    assert "it lacks layers.0.weight" in refused(head(lambda parts: [1, 2]))
    (tmp_path / "head.safetensors").write_bytes(b"none")
    assert "cannot be read" in refused(f"aesthetic={tmp_path / 'head.safetensors'}")
    shutil.copytree(aesthetic, tmp_path / "wide")
    build_head(tmp_path / "wide" / "sac+logos+ava1-l14-linearMSE.pth", width=20)
    assert f"takes 20 numbers an image, and the CLIP model gives {WIDTH}" in refused(f"aesthetic={tmp_path / 'wide'}")


def test_a_head_in_safetensors_is_the_same_head(aesthetic, tmp_path):
    shutil.copytree(aesthetic, tmp_path / "safe")
    old = tmp_path / "safe" / "sac+logos+ava1-l14-linearMSE.pth"
    save_file(torch.load(old, weights_only=True), tmp_path / "safe" / "aesthetic.safetensors")
    old.unlink()
    images = pictures(*SIZES)
    one, other = (ready(f"aesthetic={folder}").score(PROMPTS, images) for folder in (aesthetic, tmp_path / "safe"))
    np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("clip=no/such/folder", "no/such/folder is no folder here, and no/such/folder is no model of open_clip"),
        ("clip=ViT-B-32", "nothing is neither a file here nor a tag of ViT-B-32 (tags: openai, "),
        ("clip=ViT-B-32:opeani", "opeani is neither a file here nor a tag of ViT-B-32 (tags: openai, "),
        ("clip=ViT-B-32:/no/file:here.pt", "/no/file:here.pt is neither a file here"),
        ("clip", "clip: ViT-B-32:openai is not available from the hub ("),
        ("clip=hf-hub:nobody/nothing", "clip: hf-hub:nobody/nothing is not available from the hub ("),
        ("hps", "hps: HPS_v2.1_compressed.pt of xswu/HPSv2 is not available from the hub ("),
        ("hps=missing.pt", "hps: missing.pt is neither a file nor a folder here; give hps=FILE"),
        ("aesthetic", "aesthetic needs the weights of its head; give aesthetic=FILE"),
        ("aesthetic=missing.pth", "aesthetic: missing.pth is neither a file nor a folder here"),
    ],
)
def test_locations_with_nothing_there(spec, message, no_hub):
    assert message in refused(spec)


def test_a_head_alone_needs_the_clip_model_from_the_hub(tmp_path, no_hub):
    text = refused(f"aesthetic={build_head(tmp_path / 'head.pth')}")
    assert text.startswith("aesthetic: ViT-L-14:openai is not available from the hub (") and text.endswith("); give aesthetic=FOLDER")


def test_without_open_clip_one_line_says_what_to_install(monkeypatch, folder, aesthetic, hps):
    monkeypatch.setitem(sys.modules, "open_clip", None)
    for spec, _ in specs(folder, hps, aesthetic):
        assert refused(spec).startswith(f"{spec.partition('=')[0]} needs the package open_clip (")
        assert refused(spec).endswith("; pip install open_clip_torch")


def test_a_checkpoint_path_may_hold_colons(folder, named, tmp_path):
    path = tmp_path / "a:b" / "tiny:1.safetensors"
    path.parent.mkdir()
    save_file(load_file(folder / "open_clip_model.safetensors"), path)
    np.testing.assert_allclose(load(f"clip=tiny:{path}").score(PROMPTS, pictures(*SIZES)), 100 * cosines(cropped), atol=1e-4)
