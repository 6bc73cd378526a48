"""The text encoders: what diffusers' own pipelines make of a prompt, the same to the bit in any company, and their adapters."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dedpo_diffusion.models import tiny
from dedpo_diffusion.models.backbone import Backbone
from dedpo_diffusion.models.loading import load_pipeline
from dedpo_diffusion.models.text_encoders import ABSENT, chunks
from dedpo_diffusion.training.validation import at_rest

WORDS = ["a large red circle", "a cross", None, "a small blue square on a white background", "a large cross", "a red circle"]


@pytest.fixture(params=tiny.KINDS)
def model(request, folders):
    return Backbone(str(folders[request.param]), device=torch.device("cpu"))


@pytest.mark.parametrize("rows", [0, 1, 4, 9])
@pytest.mark.parametrize("size", [1, 4, 5])
def test_chunks_are_of_one_size_and_give_back_every_row(rows, size):
    values = torch.arange(2 * rows).view(rows, 2)
    parts = list(chunks(values, size))
    assert all(len(part) == size for part, _ in parts)
    assert torch.equal(torch.cat([part[:count] for part, count in parts] or [values]), values)


def test_a_prompt_is_encoded_to_the_same_bits_in_any_company(model):
    together = model.encode_prompts(WORDS)
    for rows in ([0], [5, 2, 1], [3, 3, 2, 0, 1]):
        some = model.encode_prompts([WORDS[row] for row in rows])
        assert torch.equal(some.text, together.text[rows])
        assert some.pooled is None or torch.equal(some.pooled, together.pooled[rows])


def test_embeddings_are_those_of_the_pipeline(model, folders, request):
    pipe = load_pipeline(str(folders[request.node.callspec.params["model"]]))
    ours = model.encode_prompts([WORDS[0], None])
    given = {"prompt": WORDS[0], "device": "cpu", "num_images_per_prompt": 1, "do_classifier_free_guidance": True}
    text, absent, *pooled = pipe.encode_prompt(**given)
    torch.testing.assert_close(ours.text, torch.cat([text, absent]))
    if model.told_sizes:
        torch.testing.assert_close(ours.pooled, torch.cat(pooled))
        assert not ours.text[1].any() and (model.text.tokens([None]) == ABSENT).all()


def test_an_adapter_changes_what_it_gives_and_leaves_the_plain_prompt_alone(model):
    before, tokens = model.encode_prompts(WORDS), model.text.tokens(WORDS)
    model.add_lora(rank=2, alpha=2, text=True)
    assert torch.equal(model.text(tokens).text, before.text)  # B is 0 at first
    named = {name: value for name, value in model.trainable().items() if name.startswith("text_encoder")}
    assert not any("text_model" in name for name in named) and all(value.dtype == torch.float32 for value in named.values())
    for value in named.values():
        value.data += 0.3
    after = model.encode_prompts(WORDS)
    assert torch.equal(after.text, before.text) and (after.pooled is None or torch.equal(after.pooled, before.pooled))
    moved = model.text(tokens)
    said = torch.tensor([word is not None for word in WORDS])
    assert ((moved.text - before.text).abs().amax(dim=(1, 2)) > 1e-3)[said].all()
    if model.told_sizes:
        assert torch.equal(moved.text[~said], before.text[~said])  # zeros
        assert ((moved.pooled - before.pooled).abs().amax(dim=1) > 1e-3)[said].all()


def test_adapters_are_peft_s_and_alone_are_trained(folders, monkeypatch):
    """Transformers' own adapters ask for a version of peft that may not be out yet."""

    def refuse(min_version):
        raise AssertionError(f"peft {min_version} is asked for")

    monkeypatch.setattr("transformers.integrations.peft.check_peft_version", refuse, raising=False)
    model = Backbone(str(folders["sdxl"]), device=torch.device("cpu"))
    model.add_lora(rank=2, alpha=2, text=True)
    trained = {name for name, value in model.text.named_parameters() if value.requires_grad}
    assert trained == {name for name, _ in model.text.named_parameters() if "lora_" in name} != set()
    with model.reference():
        assert not any(value.requires_grad for value in model.text.parameters())
    assert trained == {name for name, value in model.text.named_parameters() if value.requires_grad}


def test_every_adapted_layer_of_the_encoders_gets_a_gradient(model):
    """Several processes wait for the gradient of every parameter."""
    model.add_lora(rank=2, alpha=2, text=True)
    found = model.text(model.text.tokens(WORDS))
    (found.text.square().sum() + (0 if found.pooled is None else found.pooled.square().sum())).backward()
    for name, value in model.trainable().items():
        if name.startswith("text_encoder") and "lora_B" in name:
            assert value.grad is not None and value.grad.abs().max() > 0, name


@pytest.mark.slow
def test_dropout_reaches_the_policy_alone(folders):
    """Neither the reference, with or without an adapter to begin with, nor what is validated."""
    model = Backbone(str(folders["sdxl"]), device=torch.device("cpu"))
    model.add_lora(rank=2, alpha=2, dropout=0.5, text=True)
    for value in model.trainable().values():
        value.data += 0.2
    tokens = model.text.tokens(WORDS)
    given = replace(model.encode_prompts(WORDS), tokens=tokens, sizes=torch.full((len(WORDS), 2, 6), 64.0))
    noisy, t = torch.randn(len(WORDS), 2, *model.latent_shape(tiny.SIDE)), torch.full((len(WORDS),), 500)

    def twice(**options: bool) -> bool:
        with torch.no_grad():
            return torch.equal(*(model.predict(noisy, t, given, **options) for _ in range(2)))

    assert not twice() and twice(reference=True)
    model.anchor = {name: value.detach().clone() for name, value in model.trainable().items()}
    assert not torch.equal(model.text(tokens).text, model.text(tokens).text)
    assert twice(reference=True)
    with at_rest(model, None):
        assert twice()
    assert not twice()
