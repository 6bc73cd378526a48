"""Single files: what diffusers reads back is what was written, under the names that the original code has."""

from __future__ import annotations

import pickle
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from dedpo_diffusion.core.console import UserError
from dedpo_diffusion.models import tiny
from dedpo_diffusion.models.loading import own_memory, resolve_model
from dedpo_diffusion.models.single_file import family, to_single_file

FAMILY = {"sd15": "sd1", "sd21": "sd2", "sdxl": "sdxl"}


def parts(pipe):
    return {
        name: getattr(pipe, name) for name in ("unet", "vae", "text_encoder", "text_encoder_2") if getattr(pipe, name, None) is not None
    }


def pipeline_class(kind):
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

    return StableDiffusionXLPipeline if kind == "sdxl" else StableDiffusionPipeline


@pytest.fixture(scope="module", params=tiny.KINDS)
def model(request, tmp_path_factory):
    """A kind, its folder, and a pipeline of that form whose every number is another one: no two tensors can be mistaken for each other."""
    kind = request.param
    folder = tiny.build(tmp_path_factory.mktemp(kind) / "model", kind)
    pipe = own_memory(pipeline_class(kind).from_pretrained(folder))
    generator = torch.Generator().manual_seed(1)
    for part in parts(pipe).values():
        for parameter in part.parameters():
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    return SimpleNamespace(kind=kind, folder=folder, pipe=pipe)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_diffusers_reads_back_every_bit(model, tmp_path, dtype):
    written = {name: {key: value.to(dtype) for key, value in part.state_dict().items()} for name, part in parts(model.pipe).items()}
    pipe = pipeline_class(model.kind).from_pretrained(model.folder, dtype=dtype)
    for name, part in parts(pipe).items():
        part.load_state_dict(written[name])
    file = tmp_path / "model.safetensors"
    save_file(to_single_file(**parts(pipe)), file)
    assert {value.dtype for value in load_file(file).values()} == {dtype}
    assert family(file) == FAMILY[model.kind]

    read = pipeline_class(model.kind).from_single_file(str(file), config=str(model.folder), local_files_only=True, dtype=dtype)
    assert set(parts(read)) == set(written)
    for name, part in parts(read).items():
        state = part.state_dict()
        assert set(state) == set(written[name])
        assert not [key for key, value in state.items() if value.dtype != dtype or not torch.equal(value, written[name][key])], name


@torch.no_grad()
def test_the_unet_read_back_computes_the_same(model, tmp_path):
    file = tmp_path / "model.safetensors"
    save_file(to_single_file(**parts(model.pipe)), file)
    read = own_memory(
        pipeline_class(model.kind).from_single_file(str(file), config=str(model.folder), local_files_only=True, dtype=torch.float32)
    )
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(2, 4, 8, 8, generator=generator)
    text = torch.randn(2, 5, model.pipe.unet.config.cross_attention_dim, generator=generator)
    added = None
    if model.kind == "sdxl":
        added = {"text_embeds": torch.randn(2, 32, generator=generator), "time_ids": torch.tensor([[64.0, 64, 0, 0, 64, 64]] * 2)}
    ours, theirs = (unet(x, torch.tensor([3, 900]), text, added_cond_kwargs=added).sample for unet in (model.pipe.unet, read.unet))
    assert torch.isfinite(ours).all()
    assert torch.equal(ours, theirs)


def test_no_number_is_left_out_or_written_twice(model):
    tensors = to_single_file(**parts(model.pipe))
    original = [value for part in parts(model.pipe).values() for value in part.state_dict().values()]
    assert all(value.is_contiguous() for value in tensors.values())
    every = [torch.cat([value.flatten() for value in values]).sort().values for values in (tensors.values(), original)]
    assert torch.equal(*every)


REAL_UNETS = {
    "sd15": {"cross_attention_dim": 768, "attention_head_dim": 8},
    "sd21": {"cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20], "use_linear_projection": True},
    "sdxl": {
        "cross_attention_dim": 2048, "attention_head_dim": [5, 10, 20], "use_linear_projection": True,
        "block_out_channels": (320, 640, 1280), "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), "transformer_layers_per_block": [1, 2, 10],
        "addition_embed_type": "text_time", "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
    },
}  # fmt: skip
CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
OPEN_CLIP_H = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23, "num_attention_heads": 16, "hidden_act": "gelu"}
OPEN_CLIP_G = {
    "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20, "hidden_act": "gelu",
    "projection_dim": 1280,
}  # fmt: skip


def real_parts(kind):
    """The released architecture of this kind, without memory for its weights."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    with torch.device("meta"):
        found = {
            "unet": UNet2DConditionModel(sample_size=64, **REAL_UNETS[kind]),
            "vae": AutoencoderKL(
                down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=2,
                block_out_channels=(128, 256, 512, 512), latent_channels=4,
            ),
            "text_encoder": CLIPTextModel(CLIPTextConfig(**(OPEN_CLIP_H if kind == "sd21" else CLIP_L))),
        }  # fmt: skip
        if kind == "sdxl":
            found["text_encoder_2"] = CLIPTextModelWithProjection(CLIPTextConfig(**OPEN_CLIP_G))
    return found


@pytest.fixture(scope="module")
def real():
    return {kind: to_single_file(**real_parts(kind)) for kind in tiny.KINDS}


# of the released models: tensors and numbers under each prefix
SIZES = {
    "sd15": {
        "model.diffusion_model.": (686, 859_520_964), "first_stage_model.": (248, 83_653_863),
        "cond_stage_model.transformer.text_model.": (196, 123_060_480),
    },
    "sd21": {
        "model.diffusion_model.": (686, 865_910_724), "first_stage_model.": (248, 83_653_863),
        "cond_stage_model.model.": (280, 340_387_840),
    },
    "sdxl": {
        "model.diffusion_model.": (1680, 2_567_463_684), "first_stage_model.": (248, 83_653_863),
        "conditioner.embedders.0.transformer.text_model.": (196, 123_060_480), "conditioner.embedders.1.model.": (389, 694_659_840),
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_sizes_of_the_released_models(real, kind):
    counted = {prefix: [value.numel() for key, value in real[kind].items() if key.startswith(prefix)] for prefix in SIZES[kind]}
    assert {prefix: (len(sizes), sum(sizes)) for prefix, sizes in counted.items()} == SIZES[kind]
    assert sum(len(sizes) for sizes in counted.values()) == len(real[kind])


U, V = "model.diffusion_model.", "first_stage_model."
EVERY_VAE = {
    V + "encoder.conv_in.weight": (128, 3, 3, 3),
    V + "encoder.down.1.block.0.nin_shortcut.weight": (256, 128, 1, 1),
    V + "encoder.down.2.downsample.conv.weight": (512, 512, 3, 3),
    V + "encoder.mid.attn_1.q.weight": (512, 512, 1, 1),
    V + "encoder.mid.attn_1.norm.weight": (512,),
    V + "encoder.norm_out.bias": (512,),
    V + "quant_conv.weight": (8, 8, 1, 1),
    V + "post_quant_conv.weight": (4, 4, 1, 1),
    V + "decoder.mid.block_2.conv2.weight": (512, 512, 3, 3),
    V + "decoder.mid.attn_1.proj_out.weight": (512, 512, 1, 1),
    V + "decoder.up.0.block.0.nin_shortcut.weight": (128, 256, 1, 1),
    V + "decoder.up.0.block.2.conv1.weight": (128, 128, 3, 3),
    V + "decoder.up.3.upsample.conv.weight": (512, 512, 3, 3),
    V + "decoder.conv_out.weight": (3, 128, 3, 3),
}
KNOWN = {
    "sd15": {
        U + "input_blocks.0.0.weight": (320, 4, 3, 3),
        U + "input_blocks.1.0.in_layers.2.weight": (320, 320, 3, 3),
        U + "input_blocks.1.1.proj_in.weight": (320, 320, 1, 1),
        U + "input_blocks.3.0.op.weight": (320, 320, 3, 3),
        U + "input_blocks.4.0.skip_connection.weight": (640, 320, 1, 1),
        U + "input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight": (640, 768),
        U + "input_blocks.9.0.op.bias": (1280,),
        U + "input_blocks.11.0.emb_layers.1.weight": (1280, 1280),
        U + "middle_block.0.out_layers.3.weight": (1280, 1280, 3, 3),
        U + "middle_block.1.transformer_blocks.0.ff.net.0.proj.weight": (10240, 1280),
        U + "middle_block.2.in_layers.0.weight": (1280,),
        U + "output_blocks.2.1.conv.weight": (1280, 1280, 3, 3),
        U + "output_blocks.3.1.transformer_blocks.0.attn1.to_out.0.bias": (1280,),
        U + "output_blocks.5.2.conv.weight": (1280, 1280, 3, 3),
        U + "output_blocks.8.2.conv.bias": (640,),
        U + "output_blocks.11.0.skip_connection.weight": (320, 640, 1, 1),
        U + "output_blocks.11.1.proj_out.weight": (320, 320, 1, 1),
        U + "time_embed.0.weight": (1280, 320),
        U + "time_embed.2.bias": (1280,),
        U + "out.0.weight": (320,),
        U + "out.2.weight": (4, 320, 3, 3),
        "cond_stage_model.transformer.text_model.embeddings.position_embedding.weight": (77, 768),
        "cond_stage_model.transformer.text_model.encoder.layers.11.mlp.fc1.weight": (3072, 768),
        "cond_stage_model.transformer.text_model.encoder.layers.0.self_attn.q_proj.bias": (768,),
        "cond_stage_model.transformer.text_model.final_layer_norm.weight": (768,),
    },
    "sd21": {
        U + "input_blocks.1.1.proj_in.weight": (320, 320),
        U + "input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight": (320, 1024),
        "cond_stage_model.model.token_embedding.weight": (49408, 1024),
        "cond_stage_model.model.positional_embedding": (77, 1024),
        "cond_stage_model.model.transformer.resblocks.0.attn.in_proj_weight": (3072, 1024),
        "cond_stage_model.model.transformer.resblocks.22.attn.out_proj.bias": (1024,),
        "cond_stage_model.model.transformer.resblocks.22.ln_2.weight": (1024,),
        "cond_stage_model.model.ln_final.bias": (1024,),
    },
    "sdxl": {
        U + "label_emb.0.0.weight": (1280, 2816),
        U + "label_emb.0.2.bias": (1280,),
        U + "input_blocks.2.0.out_layers.0.weight": (320,),
        U + "input_blocks.4.1.transformer_blocks.1.attn2.to_v.weight": (640, 2048),
        U + "input_blocks.6.0.op.weight": (640, 640, 3, 3),
        U + "input_blocks.8.1.transformer_blocks.9.norm3.weight": (1280,),
        U + "middle_block.1.transformer_blocks.9.attn1.to_q.weight": (1280, 1280),
        U + "output_blocks.2.2.conv.weight": (1280, 1280, 3, 3),
        U + "output_blocks.5.2.conv.weight": (640, 640, 3, 3),
        U + "output_blocks.8.0.skip_connection.weight": (320, 640, 1, 1),
        "conditioner.embedders.0.transformer.text_model.embeddings.position_embedding.weight": (77, 768),
        "conditioner.embedders.1.model.positional_embedding": (77, 1280),
        "conditioner.embedders.1.model.text_projection": (1280, 1280),
        "conditioner.embedders.1.model.transformer.resblocks.9.mlp.c_proj.bias": (1280,),
        "conditioner.embedders.1.model.transformer.resblocks.31.mlp.c_fc.weight": (5120, 1280),
        "conditioner.embedders.1.model.transformer.resblocks.31.attn.in_proj_bias": (3840,),
    },
}


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_names_and_shapes_of_the_released_models(real, kind):
    expected = KNOWN[kind] | EVERY_VAE
    assert {key: tuple(real[kind][key].shape) if key in real[kind] else None for key in expected} == expected


def test_the_names_of_transformers_with_and_without_text_model(real):
    class Wrapped(nn.Module):
        def __init__(self, bare):
            super().__init__()
            self.config, self.text_model = bare.config, getattr(bare, "text_model", bare)

    for kind in ("sd15", "sd21"):
        found = real_parts(kind)
        both = [to_single_file(**found | {"text_encoder": encoder}) for encoder in (Wrapped(found["text_encoder"]), found["text_encoder"])]
        assert list(both[0]) == list(both[1]) == list(real[kind])


def refuse(message, **found):
    with pytest.raises(UserError, match=message) as caught:
        to_single_file(**found)
    return str(caught.value)


def test_a_tensor_without_a_place_is_named():
    for part, name in (("unet", "conv_in.extra"), ("vae", "encoder.quirk"), ("text_encoder", "encoder.layers.0.gate")):
        found = real_parts("sd15")
        found[part].register_buffer(name.replace(".", "_"), torch.zeros(3))
        refuse(rf"^{part}: .*{name.replace('.', '_')}; keep the diffusers folder", **found)
    found = real_parts("sd15")
    found["unet"].mid_block.attentions[0].transformer_blocks[0].attn1.norm_q = nn.LayerNorm(4)
    message = refuse("no place", **found)
    assert "mid_block.attentions.0.transformer_blocks.0.attn1.norm_q.weight" in message
    assert "mid_block.attentions.0.transformer_blocks.0.attn1.norm_q.bias" in message


def test_an_adapter_is_merged_first(tmp_path):
    from peft import LoraConfig

    pipe = pipeline_class("sd15").from_pretrained(tiny.build(tmp_path / "model", "sd15"))
    plain = {key: value.clone() for key, value in to_single_file(**parts(pipe)).items()}
    pipe.unet.add_adapter(LoraConfig(target_modules=["to_q"], init_lora_weights=False))
    message = refuse("merge the adapter first", **parts(pipe))
    assert "to_q.lora_A.default.weight" in message and re.search(r"and \d+ more", message)
    pipe.unet.fuse_lora()
    pipe.unet.unload_lora()
    merged = to_single_file(**parts(pipe))
    assert {key for key in plain if not torch.equal(plain[key], merged[key])} == {key for key in plain if key.endswith("to_q.weight")}


def test_parts_that_make_no_model():
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    sd15, sd21, sdxl = (real_parts(kind) for kind in tiny.KINDS)
    first, second = sdxl["text_encoder"], sdxl["text_encoder_2"]
    refuse("with 2 text encoders", **sd15 | {"text_encoder_2": second})
    refuse("text_time with 1 text encoder", **sdxl | {"text_encoder_2": None})
    refuse("^text_encoder: hidden_act gelu, but .* quick_gelu", **sdxl | {"text_encoder": second, "text_encoder_2": first})
    refuse("^text_encoder_2: hidden_act quick_gelu, but .* with gelu", **sdxl | {"text_encoder_2": first})
    with torch.device("meta"):
        refuse("text_encoder: .* text_projection.weight", **sd15 | {"text_encoder": CLIPTextModelWithProjection(CLIPTextConfig(**CLIP_L))})
        whole = CLIPTextModel(CLIPTextConfig(**OPEN_CLIP_H | {"num_hidden_layers": 24}))
        refuse(r"text_encoder: .*encoder\.layers\.23\.", **sd21 | {"text_encoder": whole})
        unet = UNet2DConditionModel(mid_block_type="UNetMidBlock2D", **REAL_UNETS["sd15"])
        refuse("mid_block_type UNetMidBlock2D ", **sd15 | {"unet": unet})
        classes = UNet2DConditionModel(num_class_embeds=10, **REAL_UNETS["sd15"])
        refuse("unet: .* class_embedding.weight", **sd15 | {"unet": classes})


def write(path, keys, channels=4):
    """A file with these names; the UNet's first layer takes `channels`."""
    save_file({key: torch.zeros(8, channels, 3, 3) if key.endswith("input_blocks.0.0.weight") else torch.zeros(1) for key in keys}, path)
    return path


FIRST, DECODER, LABEL = U + "input_blocks.0.0.weight", V + "decoder.conv_in.weight", U + "label_emb.0.0.weight"
CLIP = "cond_stage_model.transformer.text_model.final_layer_norm.bias"
OPEN_CLIP = "cond_stage_model.model.ln_final.bias"
XL_CLIP, XL_OPEN_CLIP = CLIP.replace("cond_stage_model", "conditioner.embedders.0"), "conditioner.embedders.1.model.ln_final.bias"
REFUSED = [
    ("lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight", "a LoRA; give the checkpoint"),
    ("unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight", "a LoRA"),
    (f"{FIRST} {DECODER} {LABEL} conditioner.embedders.0.model.ln_final.bias", "an SDXL refiner; give the SDXL base"),
    (f"{U}joint_blocks.0.context_block.adaLN_modulation.1.bias", "a Stable Diffusion 3"),
    ("double_blocks.0.img_attn.norm.key_norm.scale", "a Flux"),
    (f"{FIRST} {DECODER} {CLIP} control_model.time_embed.0.weight", "a ControlNet"),
    ("emb_params", "a textual inversion"),
    ("down_blocks.0.motion_modules.0.norm.bias", "an AnimateDiff"),
    ("edm_mean", "a Playground v2.5"),
    ("encoder.mid.attn_1.q.weight decoder.conv_in.weight", "a VAE alone"),
    ("conv_in.weight down_blocks.0.resnets.0.conv1.weight", "a part of a diffusers folder; give the folder"),
    ("text_model.encoder.layers.0.mlp.fc1.bias", "a part of a diffusers folder"),
    (f"{FIRST} {DECODER} cond_stage_model.transformer.embeddings.token_embedding.weight", "an early name for its text encoder"),
    (f"{FIRST} {DECODER}", "lacks the text encoder;"),
    (f"{FIRST} {CLIP}", "lacks the VAE;"),
    (f"{FIRST}", "lacks the VAE and the text encoder;"),
    (f"{DECODER} {OPEN_CLIP}", "lacks the UNet;"),
    (f"{FIRST} {DECODER} {LABEL} {XL_CLIP}", "lacks the text encoder;"),
    (f"{FIRST} {DECODER} {CLIP} {OPEN_CLIP}", "text encoders of sd1 and sd2"),
    (f"{FIRST} {DECODER} {OPEN_CLIP} {LABEL}", "a class or image embedding"),
    (f"{FIRST} {DECODER} {XL_CLIP} {XL_OPEN_CLIP}", "lacks the size conditioning"),
    (f"{U}head.modulation weight", "not those of a Stable Diffusion checkpoint"),
]


@pytest.mark.parametrize(("keys", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_other_files_are_told_by_name(tmp_path, keys, message):
    file = write(tmp_path / "other.safetensors", keys.split())
    with pytest.raises(UserError) as caught:
        family(file)
    assert str(caught.value).startswith(f"{file}: ")
    assert all(part in str(caught.value) for part in message.split("; "))


@pytest.mark.parametrize("rest", [[CLIP], [OPEN_CLIP], [XL_CLIP, XL_OPEN_CLIP, LABEL]])
@pytest.mark.parametrize(("channels", "what"), [(9, "an inpainting model"), (8, "InstructPix2Pix"), (5, "depth"), (3, "none of the base")])
def test_other_input_channels(tmp_path, rest, channels, what):
    keys = [FIRST, DECODER, *rest]
    assert family(write(tmp_path / "base.safetensors", keys)) in FAMILY.values()
    with pytest.raises(UserError, match=f"takes {channels} input channels instead of 4, .*{what}"):
        family(write(tmp_path / "other.safetensors", keys, channels))


@pytest.mark.slow
def test_the_command_that_a_pickled_file_is_answered_with_converts_it(tmp_path):
    """Shared and transposed tensors, which safetensors refuses, and what is no tensor."""
    weight = torch.randn(3, 4)
    held = {"a": weight, "same": weight, "turned": weight.t()}
    file = tmp_path / "my model.ckpt"
    torch.save({"state_dict": {**held, "epoch": 3}, "step": 1}, file)
    with pytest.raises(UserError, match="node Save Checkpoint") as caught:
        resolve_model(str(file))
    command = str(caught.value).split("or run: ")[1].replace("python -c", f"{sys.executable} -c", 1)
    subprocess.run(command, shell=True, check=True)
    found = load_file(tmp_path / "my model.safetensors")
    assert found.keys() == held.keys() and all(torch.equal(found[name], held[name]) for name in held)


def test_files_that_cannot_be_read(tmp_path):
    whole = write(tmp_path / "whole.safetensors", [FIRST, DECODER, CLIP])
    data = whole.read_bytes()
    torch.save({"a": torch.zeros(1)}, tmp_path / "zip")
    broken = {
        "cut": (data[:-1], "cut short"), "cut-in-header": (data[:50], "cut short"), "empty": (b"", "an empty file"),
        "page": (b"<html><body>not found</body></html>", "a web page"),
        "pickle": (pickle.dumps({"a": 1}), "a pickled checkpoint"), "archive": ((tmp_path / "zip").read_bytes(), "a pickled checkpoint"),
        "pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4265146304\n", "git lfs pull"),
    }  # fmt: skip
    for name, (content, message) in broken.items():
        file = tmp_path / f"{name}.safetensors"
        file.write_bytes(content)
        with pytest.raises(UserError, match=f"{name}.safetensors: .*{message}"):
            family(file)
    for path, message in ((tmp_path, "a folder"), (Path("nowhere.safetensors"), "no such file")):
        with pytest.raises(UserError, match=f"{path}: {message}"):
            family(path)
