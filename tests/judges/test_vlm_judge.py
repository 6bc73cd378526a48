"""The local vision-language judge, on tiny random checkpoints of four architectures in their ordinary file formats."""

from __future__ import annotations

import io
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dedpo_diffusion.core.console import UserError
from dedpo_diffusion.core.records import Pair
from dedpo_diffusion.judges.judge import Question, probability
from dedpo_diffusion.judges.vlm import VisionLanguageJudge
from dedpo_diffusion.labels.files import read_labels
from dedpo_diffusion.pairs.dataset import PairWriter
from dedpo_diffusion.pipelines import main
from dedpo_diffusion.settings import VlmSettings

QWEN = ["<|endoftext|>", "<|im_end|>", "<|im_start|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
CELLS = [f"<row_{row + 1}_col_{column + 1}>" for row in range(6) for column in range(6)]
IDEFICS = ["<pad>", "<end_of_utterance>", "<s>", "<image>", "<fake_token_around_image>", "<global-img>", *CELLS]
QWEN_CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{% for part in message.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PLAIN_CHAT = (  # with a blank before the answer, which a tokenizer may draw into it
    "{% for message in messages %}USER: {% for part in message.content %}"
    "{% if part.type == 'image' %}<image>\n{% else %}{{ part.text }}{% endif %}"
    "{% endfor %} {% endfor %}{% if add_generation_prompt %}ASSISTANT: {% endif %}"
)
ARCHITECTURES = ("qwen2.5-vl", "qwen3-vl", "idefics3", "llava")


# ---- the checkpoints


def build_tokenizer(special: list[str], words: tuple[str, ...] = ("Ġ1", "Ġ2"), gone: str = ""):
    """Byte-level BPE of the 256 bytes but `gone`, and of the two answers with a blank before them; it begins texts with <s>, if known."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    letters = [letter for letter in sorted(pre_tokenizers.ByteLevel.alphabet()) if letter not in gone]
    vocabulary = {text: number for number, text in enumerate([*letters, *words])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[(word[0], word[1]) for word in words]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    start = "<s>" if "<s>" in special else None
    if start:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=special[0], eos_token=special[1], bos_token=start)


def small(**more) -> dict:
    return {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, **more}


def eye(patch: int, **more) -> dict:
    small = {"hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 32, "temporal_patch_size": 2}
    return {"patch_size": patch, "spatial_merge_size": 2, **small, **more}


def qwen(tokenizer, third: bool, tied: bool):
    """Qwen2.5-VL or Qwen3-VL: patches of images of any size, packed; positions in three dimensions."""
    import transformers as t

    names = {"image_token_id": 5, "video_token_id": 6, "vision_start_token_id": 3, "vision_end_token_id": 4}
    names = {key: tokenizer.convert_tokens_to_ids(QWEN[place]) for key, place in names.items()}
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
    text = small(vocab_size=len(tokenizer), num_key_value_heads=1, max_position_embeddings=4096, rope_parameters=rope)
    text |= {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    if third:
        vision = eye(16, depth=2, num_position_embeddings=16, deepstack_visual_indexes=[0])
        model = t.Qwen3VLForConditionalGeneration(t.Qwen3VLConfig(text_config={**text, "head_dim": 16}, vision_config=vision, **names))
        images = t.Qwen2VLImageProcessor(min_pixels=32 * 32, max_pixels=96 * 96, patch_size=16)
        return model, t.Qwen3VLProcessor(images, tokenizer, t.Qwen3VLVideoProcessor(), chat_template=QWEN_CHAT)
    vision = eye(14, depth=2, window_size=56, fullatt_block_indexes=[1])
    text["tie_word_embeddings"] = tied
    config = t.Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=tied, **names)
    images = t.Qwen2VLImageProcessor(min_pixels=28 * 28, max_pixels=84 * 84)
    processor = t.Qwen2_5_VLProcessor(images, tokenizer, t.Qwen2VLVideoProcessor(), chat_template=QWEN_CHAT)
    return t.Qwen2_5_VLForConditionalGeneration(config), processor


def idefics(tokenizer):
    """Idefics3: an image is cut into tiles, and the images of a batch are padded to one shape and number."""
    import transformers as t

    text = small(model_type="llama", vocab_size=len(tokenizer), max_position_embeddings=4096)
    vision = {**small(image_size=32, patch_size=8), "num_hidden_layers": 1}
    image = tokenizer.convert_tokens_to_ids("<image>")
    ends = {"pad_token_id": tokenizer.pad_token_id}
    config = t.Idefics3Config(text_config={**text, **ends}, vision_config=vision, scale_factor=2, image_token_id=image, **ends)
    images = t.Idefics3ImageProcessor(size={"longest_edge": 64}, max_image_size={"longest_edge": 32})
    return t.Idefics3ForConditionalGeneration(config), t.Idefics3Processor(
        images, tokenizer, image_seq_len=4, chat_template="{{ bos_token }}" + PLAIN_CHAT
    )


def llava(tokenizer):
    """LLaVA on GPT-2, whose positions are learned one by one: padding on the left would shift them if nobody told the model."""
    import transformers as t

    image = tokenizer.convert_tokens_to_ids("<image>")
    text = {"model_type": "gpt2", "vocab_size": len(tokenizer), "n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 1024}
    text |= {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "tie_word_embeddings": False}
    vision = small(model_type="clip_vision_model", image_size=32, patch_size=8)
    config = t.LlavaConfig(text_config=text, vision_config=vision, image_token_id=image, tie_word_embeddings=False)
    images = t.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    shape = {"patch_size": 8, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    return t.LlavaForConditionalGeneration(config), t.LlavaProcessor(images, tokenizer, chat_template=PLAIN_CHAT, **shape)


def build(
    folder: Path, architecture: str = "qwen2.5-vl", *, seed: int = 0, tied: bool = False, dtype=torch.float32, tokenizer=None
) -> Path:
    """A checkpoint with random weights, large enough for the images to matter."""
    if architecture.startswith("qwen"):
        model, processor = qwen(tokenizer or build_tokenizer(QWEN), architecture == "qwen3-vl", tied)
    else:
        special = IDEFICS if architecture == "idefics3" else IDEFICS[:4]
        model, processor = {"idefics3": idefics, "llava": llava}[architecture](build_tokenizer(special))
    torch.manual_seed(seed)
    for weight in model.parameters():
        if weight.ndim > 1:
            weight.data.normal_(0, 0.3)
    model.to(dtype).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def folders(tmp_path_factory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("vlm")
    return {name: build(place / name, name) for name in ARCHITECTURES}


@pytest.fixture(scope="session")
def ask_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("question") / "short.txt"
    path.write_text("Prompt: {prompt}\nBetter: 1 or 2?\n")
    return path


@pytest.fixture
def load(folders, ask_file):
    """Load the judge of an architecture, or of a folder."""

    def make(place: str | Path = "qwen2.5-vl", *, batch: int = 8, dtype: str = "float32", temperature: float | None = None, **asked):
        settings = VlmSettings(**{"prompt": ask_file, "min_validity": 0.0, **asked})
        folder = folders.get(str(place), place)
        return VisionLanguageJudge(str(folder), settings, device="cpu", batch=batch, dtype=dtype, temperature=temperature)

    return make


PROMPTS = ["a cat", "a large red circle on a white background, seen from above", "", "two dogs"]
SIZES = [((40, 60), (56, 56)), ((100, 30), (64, 64)), ((28, 28), (90, 70)), ((33, 47), (61, 35))]


def picture(rng: np.random.Generator, size: tuple[int, int]) -> Image.Image:
    """Smooth enough to survive any resizing."""
    return Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)).resize(size, Image.Resampling.BILINEAR)


def encode(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def questions() -> list[Question]:
    rng = np.random.default_rng(0)
    return [Question(f"p{k}", prompt, *(picture(rng, size) for size in SIZES[k])) for k, prompt in enumerate(PROMPTS)]


def columns() -> list[list]:
    """Prompts, images 0 and images 1, as `prefer` takes them."""
    return [[getattr(question, name) for question in questions()] for name in ("prompt", "image_0", "image_1")]


def plant(judge: VisionLanguageJudge, change) -> None:
    """Let `change` have the logits (rows, places, vocabulary) of every forward pass of the model."""

    def hook(module, inputs, output):
        output.logits = change(output.logits.clone())
        return output

    judge.model.register_forward_hook(hook)


def lean(judge: VisionLanguageJudge, bias: float):
    def change(logits):
        logits[..., judge.first] += bias
        logits[..., judge.second] -= bias
        return logits

    return change


# ---- the arithmetic


@torch.no_grad()
def by_hand(folder: Path, question: Question) -> tuple[list[float], list[float], int]:
    """Scores, validities and the number of tokens of one pair, one sequence at a time, without padding."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    text = f"Prompt: {question.prompt}\nBetter: 1 or 2?"
    scores, validities, tokens = [], [], 0
    for images in ((question.image_0, question.image_1), (question.image_1, question.image_0)):
        content = [*({"type": "image", "image": image} for image in images), {"type": "text", "text": text}]
        options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
        inputs = processor.apply_chat_template([{"role": "user", "content": content}], **options)
        shares = model(**inputs).logits[0, -1].double().log_softmax(-1).exp()
        one, two = (shares[processor.tokenizer.convert_tokens_to_ids([digit, f"Ġ{digit}"])].sum() for digit in "12")
        scores.append(float(one.log() - two.log()))
        validities.append(float(one + two))
        tokens += inputs["input_ids"].shape[1]
    return scores, validities, tokens


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_answers_are_the_log_odds_of_the_last_place(load, folders, architecture):
    """Tolerance: float32 through other batch shapes, on log-odds of size 1 to 10."""
    found = load(architecture).answer(questions())
    expected = [by_hand(folders[architecture], question) for question in questions()]
    assert found.missing == [""] * 4 and found.scores.dtype == np.float64
    np.testing.assert_allclose(found.scores, [scores for scores, _, _ in expected], atol=2e-5)
    np.testing.assert_allclose(found.extra["validity"], [min(shares) for _, shares, _ in expected], rtol=1e-4)
    assert found.extra["prompt_tokens"] == [tokens for _, _, tokens in expected]
    assert np.abs(found.scores[:, 0] - found.scores[:, 1]).min() > 1e-4  # the test would see images that went astray


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_batch_1_equals_batch_n(load, architecture):
    judge = load(architecture)
    together = judge.answer(questions()).scores
    for judge.batch in (1, 3):
        np.testing.assert_allclose(judge.answer(questions()).scores, together, atol=1e-5)
    assert judge.answer([]).scores.shape == (0, 2)


def test_swapping_the_images_turns_the_label_around(load):
    judge = load()
    there, back = judge.answer(questions()), judge.answer([Question(q.pair_id, q.prompt, q.image_1, q.image_0) for q in questions()])
    np.testing.assert_allclose(probability(there.scores, 2.0), 1 - probability(back.scores, 2.0), atol=1e-6)
    np.testing.assert_allclose(there.scores, back.scores[:, ::-1], atol=1e-5)
    assert there.extra["order_consistent"] == back.extra["order_consistent"]


@pytest.mark.parametrize("bias", [0.7, -3.0])
def test_a_planted_lean_to_one_place_cancels(load, bias):
    plain, leaning = load(), load()
    plant(leaning, lean(leaning, bias))
    before, after = plain.answer(questions()), leaning.answer(questions())
    np.testing.assert_allclose(after.scores - before.scores, 2 * bias, atol=1e-5)  # it is there
    np.testing.assert_allclose(leaning.prefer(*columns()), plain.prefer(*columns()), atol=1e-6)
    assert np.ptp(plain.prefer(*columns())) > 0.01


def test_the_default_temperature_makes_the_mean_of_both_orders(load):
    judge, scores = load(), load().answer(questions()).scores
    np.testing.assert_allclose(judge.prefer(*columns()), 1 / (1 + np.exp(-(scores[:, 0] - scores[:, 1]) / 2)), atol=1e-12)
    assert (judge.temperature, judge.name, judge.parallel, load(temperature=3.0).temperature) == (2.0, "vlm", 8, 3.0)


def test_a_template_that_tells_the_day_is_told_the_same_day_always(load, folders, tmp_path):
    for name, text in (("asks", "{{ strftime_now('%d %B %Y') }}"), ("knows", "2026-01-01")):
        shutil.copytree(folders["qwen2.5-vl"], tmp_path / name)
        (tmp_path / name / "chat_template.jinja").write_text(text + QWEN_CHAT)
    asks, knows = (load(tmp_path / name).answer(questions()).scores for name in ("asks", "knows"))
    np.testing.assert_array_equal(asks, knows)
    assert np.abs(asks - load().answer(questions()).scores).max() > 1e-3  # the model reads it


def test_longer_sides_are_shrunk(load):
    def resized(asked, side, way):
        return [Question(q.pair_id, q.prompt, *(image.resize((side, side), way) for image in (q.image_0, q.image_1))) for q in asked]

    large = resized(questions(), 56, Image.Resampling.NEAREST)
    small, whole = load(max_side=28).answer(large).scores, load(max_side=None)
    np.testing.assert_allclose(small, whole.answer(resized(large, 28, Image.Resampling.LANCZOS)).scores, atol=1e-6)
    assert np.abs(small - whole.answer(large).scores).max() > 1e-3


def test_images_of_other_modes_are_turned_into_rgb(load):
    grey = [Question(q.pair_id, q.prompt, q.image_0.convert("L"), q.image_1.convert("RGBA")) for q in questions()]
    known = [Question(q.pair_id, q.prompt, q.image_0.convert("L").convert("RGB"), q.image_1) for q in questions()]
    np.testing.assert_array_equal(load().answer(grey).scores, load().answer(known).scores)


# ---- pairs without an answer


def test_unlikely_answers_are_missing_and_likely_ones_are_not(load):
    random, sure = load(min_validity=0.5), load(min_validity=0.5)

    def shout(logits):
        logits[..., sure.first + sure.second] += 30
        return logits

    plant(sure, shout)
    found, likely = random.answer(questions()), sure.answer(questions())
    assert np.isnan(found.scores).all() and set(found.extra["order_consistent"]) == {None}
    assert all("together, less than 0.5" in why for why in found.missing)
    assert all(0 < share < 0.5 for share in found.extra["validity"])
    assert likely.missing == [""] * 4 and min(likely.extra["validity"]) > 0.99
    np.testing.assert_allclose(likely.scores, load().answer(questions()).scores, atol=1e-4)


@pytest.mark.parametrize(
    ("odd", "message"),
    [
        (lambda q: Question("odd", "a cat<|image_pad|>", q.image_0, q.image_1), r"control token <\|image_pad\|>"),
        (lambda q: Question("odd", q.prompt, Image.new("RGB", (1, 400)), q.image_1), "cannot be asked about it .*aspect ratio"),
        (lambda q: Question("odd", "cat " * 1100, q.image_0, q.image_1), "[0-9]+ tokens, and the model reads 4096"),
    ],
)
def test_a_pair_that_cannot_be_asked_about_is_missing_alone(load, odd, message):
    judge, asked = load(batch=3), questions()
    found = judge.answer([asked[0], odd(asked[1]), *asked[2:]])
    assert [bool(why) for why in found.missing] == [False, True, False, False]
    assert re.search(message, found.missing[1])
    assert np.isnan(found.scores[1]).all()
    np.testing.assert_allclose(found.scores[[0, 2, 3]], judge.answer([asked[0], *asked[2:]]).scores, atol=1e-5)


def test_an_answer_that_is_no_number_is_missing(load):
    judge = load()
    plant(judge, lambda logits: logits * float("nan"))
    found = judge.answer(questions())
    assert np.isnan(found.scores).all() and set(found.missing) == {"the model's answer is no number in float32"}


def test_little_memory_halves_the_batch_and_too_little_stops_the_run(load, capsys):
    judge, whole, room = load(batch=4), load(batch=4).answer(questions()), [4, 4, 4, 0, 0]  # rows; two pairs in both orders are four

    def refuse(module, given, more):
        if len(more["input_ids"]) > room.pop(0):
            raise torch.OutOfMemoryError("CUDA out of memory")

    judge.model.register_forward_pre_hook(refuse, with_kwargs=True)
    np.testing.assert_allclose(judge.answer(questions()).scores, whole.scores, atol=1e-5)
    assert capsys.readouterr().out == "vlm: the GPU's memory is too small for 4 pairs at once; going on with 2\n"
    with pytest.raises(UserError, match=r"even for one of the pairs at a time; lower --vlm\.max_side"):
        judge.answer(questions())


# ---- the checkpoint


def test_a_half_precision_file_is_computed_in_the_precision_asked_for(load, tmp_path):
    folder = build(tmp_path / "half", dtype=torch.float16)
    judge, narrow = load(folder), load(folder, dtype="bfloat16")
    assert {p.dtype for p in judge.model.parameters()} == {torch.float32}
    assert {p.dtype for p in narrow.model.parameters()} == {torch.bfloat16}
    found = judge.answer(questions()).scores
    np.testing.assert_allclose(found, load().answer(questions()).scores, atol=0.05)
    np.testing.assert_allclose(narrow.answer(questions()).scores, found, atol=0.5)


def test_tied_weights_need_not_be_in_the_file_twice(load, tmp_path):
    from safetensors.torch import load_file

    folder = build(tmp_path / "tied", tied=True)
    assert not [name for name in load_file(folder / "model.safetensors") if "lm_head" in name]
    judge = load(folder)
    assert torch.equal(judge.model.lm_head.weight, judge.model.get_input_embeddings().weight)


def test_the_version_tells_apart_whatever_changes_a_label(load, folders, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text("{prompt}: 1 or 2?")
    shutil.copytree(folders["qwen2.5-vl"], tmp_path / "chat")
    (tmp_path / "chat" / "chat_template.jinja").write_text("Hello. " + QWEN_CHAT)
    seeds = build(tmp_path / "seed", seed=1)
    judges = [
        load(), load(prompt=None), load(prompt=other), load(max_side=None), load(min_validity=0.1), load(dtype="bfloat16"),
        load(temperature=3.0), load(tmp_path / "chat"), load(seeds),
    ]  # fmt: skip
    assert len({judge.version for judge in judges}) == len(judges)
    assert load(batch=1).version == load().version  # the precision of float32 is all that a batch may change


def edit(folder: Path, name: str, **changes) -> None:
    config = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps({**config, **changes}))


def change_weights(folder: Path, change) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: shutil.rmtree(folder), "no such folder"),
        (lambda folder: (folder / "config.json").unlink(), "no readable config.json"),
        (lambda folder: edit(folder, "config.json", model_type="clip"), "of type 'clip', which this transformers does not know"),
        (lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"), "holds no weights"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"none"), "cannot be loaded"),
        (lambda folder: change_weights(folder, lambda weights: weights.pop("lm_head.weight")), "lack lm_head.weight"),
        (lambda folder: (folder / "chat_template.jinja").unlink(), "no chat template"),
        (lambda folder: (folder / "chat_template.jinja").write_text("{{ messages }}"), "cannot be asked about two images"),
        (lambda folder: (folder / "tokenizer.json").write_text("{}"), "processor in .* cannot be loaded"),
        (lambda folder: (folder / "processor_config.json").unlink(), "save the processor beside the model"),
    ],
)  # fmt: skip
def test_folders_that_are_no_judge(load, folders, tmp_path, damage, message):
    shutil.copytree(folders["qwen2.5-vl"], tmp_path / "bad")
    damage(tmp_path / "bad")
    with pytest.raises(UserError, match=message) as caught:
        load(tmp_path / "bad")
    assert "\n" not in str(caught.value)


def test_a_hub_id_without_a_hub(load, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="nobody/nothing is no folder here and is not available from the hub"):
        load("nobody/nothing")


def test_tokenizers_that_do_not_fit(load, folders, tmp_path):
    for name, tokenizer, message in (
        ("none", build_tokenizer(QWEN, words=(), gone="2"), "no single token for the answer '2'"),
        ("large", build_tokenizer([*QWEN, *CELLS]), "tokenizer of 301 tokens, and the model has 265"),
    ):
        shutil.copytree(folders["qwen2.5-vl"], tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        (tmp_path / name / "chat_template.jinja").write_text(QWEN_CHAT)
        with pytest.raises(UserError, match=message):
            load(tmp_path / name)


def test_weights_that_the_model_has_no_place_for_are_counted(load, folders, tmp_path, capsys):
    shutil.copytree(folders["qwen2.5-vl"], tmp_path / "more")
    change_weights(tmp_path / "more", lambda weights: weights.update(stray=torch.zeros(1)))
    load(tmp_path / "more")
    assert "1 weights in" in (said := capsys.readouterr().out) and "(first: stray)" in said


def test_a_missing_package_is_named(load, folders, tmp_path, monkeypatch):
    from transformers import SmolVLMVideoProcessor
    from transformers.models.smolvlm import processing_smolvlm

    monkeypatch.setattr(processing_smolvlm, "num2words", None)
    shutil.copytree(folders["idefics3"], tmp_path / "smol")
    SmolVLMVideoProcessor().save_pretrained(tmp_path / "smol")
    edit(tmp_path / "smol", "processor_config.json", processor_class="SmolVLMProcessor")
    with pytest.raises(UserError, match=r"num2words.*pip install -e '.\[vlm\]'"):
        load(tmp_path / "smol")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch": 0}, "batch is 0"),
        ({"dtype": "int8"}, "dtype is 'int8'"),
        ({"min_validity": 1.5}, "min_validity is 1.5"),
        ({"min_validity": float("nan")}, "min_validity is nan"),
        ({"max_side": 0}, "max_side is 0"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"prompt": Path("no-such-file.txt")}, "no-such-file.txt cannot be read"),
    ],
)
def test_settings_that_make_no_sense(load, options, message):
    with pytest.raises(UserError, match=message):
        load(**options)


def test_a_device_that_is_not_there(folders):
    with pytest.raises(UserError, match="device nowhere cannot be used here"):
        VisionLanguageJudge(str(folders["llava"]), VlmSettings(), device="nowhere")


def test_the_command_labels_with_it(folders, ask_file, tmp_path, load):
    with PairWriter(tmp_path / "pairs") as writer:
        for question in questions():
            writer.add(Pair(question.pair_id, question.prompt, *(encode(image) for image in (question.image_0, question.image_1))))
    options = ["--vlm.prompt", str(ask_file), "--vlm.min_validity", "0", "--device", "cpu", "--vlm.batch", "3"]
    assert main(["label", str(tmp_path / "pairs"), "--with", f"vlm={folders['qwen2.5-vl']}", *options]) == 0
    found, expected = read_labels(tmp_path / "pairs", "vlm"), load(batch=3)
    scores = expected.answer(questions()).scores
    np.testing.assert_array_equal(np.stack([found.extra["score_0"], found.extra["score_1"]], 1), scores)
    np.testing.assert_allclose(found.label_0, probability(scores, 2.0), atol=1e-12)
    assert set(found.extra["judge_version"]) == {expected.version}
    assert found.extra["order_consistent"] == [bool(np.sign(a) == -np.sign(b)) for a, b in scores]
