"""Stable Diffusion as one file: the tensor names of the original code, which most user interfaces read.

`to_single_file` renames a model in the layout of diffusers, `family` says what a file holds. The names are those of
CompVis/latent-diffusion (`ldm.modules.diffusionmodules`), Stability-AI/generative-models and open_clip (`open_clip.transformer`);
`diffusers.loaders.single_file_utils` is the way back. A file has weights alone: its readers know the activations, head counts, the VAE's
scaling factor and the noise schedule by the family, and some take noise for the prediction unless they are told otherwise.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from dedpo_diffusion.core.console import UserError

PICKLED = {".ckpt", ".bin", ".pt", ".pth", ".pkl", ".pickle"}
CONVERT = (  # tensors alone are read, and each gets memory of its own, which safetensors wants
    """python -c "import sys, torch, safetensors.torch as s; d = torch.load(sys.argv[1], map_location='cpu', weights_only=True); """
    """s.save_file({k: v.clone().contiguous() for k, v in d.get('state_dict', d).items() if torch.is_tensor(v)}, sys.argv[2])\""""
)
UNET, VAE = "model.diffusion_model.", "first_stage_model."
_FIRST_LAYER = UNET + "input_blocks.0.0.weight"
CLIP = {"sd1": "cond_stage_model.transformer.text_model.", "sdxl": "conditioner.embedders.0.transformer.text_model."}
OPEN_CLIP = {"sd2": "cond_stage_model.model.", "sdxl": "conditioner.embedders.1.model."}
SD2_LAYERS = 23  # of the 24 of OpenCLIP ViT-H/14; Stable Diffusion 2 takes the output of the penultimate, and readers leave the last out

UNET_RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0", "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}  # fmt: skip
UNET_ENDS = {
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2", "conv_in": "input_blocks.0.0",
    "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2", "conv_norm_out": "out.0", "conv_out": "out.2",
}  # fmt: skip
_TRANSFORMER = re.compile(  # a spatial transformer's tensors, which have the same names in both layouts
    r"(?:norm|proj_in|proj_out|transformer_blocks\.\d+\.(?:norm[123]|attn[12]\.to_out\.0|ff\.net\.0\.proj|ff\.net\.2))\.(?:weight|bias)"
    r"|transformer_blocks\.\d+\.attn[12]\.to_[qkv]\.weight"
)
_VAE_RESNET = {"norm1": "norm1", "conv1": "conv1", "norm2": "norm2", "conv2": "conv2", "conv_shortcut": "nin_shortcut"}
_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
_CLIP_ENDS = {
    "embeddings.token_embedding.weight": "token_embedding.weight", "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.weight": "ln_final.weight", "final_layer_norm.bias": "ln_final.bias",
}  # fmt: skip
_CLIP_LAYER = re.compile(r"encoder\.layers\.(\d+)\.(self_attn\.[qkv]_proj|self_attn\.out_proj|layer_norm[12]|mlp\.fc[12])\.(weight|bias)")
_RESBLOCK = {
    "self_attn.out_proj": "attn.out_proj", "layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
}  # fmt: skip


def to_single_file(unet: Any, vae: Any, text_encoder: Any, text_encoder_2: Any = None) -> dict[str, Tensor]:
    """The tensors of a Stable Diffusion model under the names of the original code.

    The family follows from the text encoders, because a reader chooses the encoder's activation by where it finds it: two are an SDXL; one
    is an SD1.x if its activation is quick_gelu (CLIP), an SD2.x if it is gelu (OpenCLIP). An SD2.x file made so has the 23 layers of the
    encoder that diffusers keeps; the 24th and the projection, which an SD2.x does not compute its embedding with, are not in it.

    Args:
        unet: UNet2DConditionModel, with any adapter merged.
        vae: AutoencoderKL.
        text_encoder: CLIPTextModel.
        text_encoder_2: CLIPTextModelWithProjection, of SDXL.

    Returns:
        Contiguous tensors of unchanged dtype, device and values, ready for `safetensors.torch.save_file`. Those whose form is the same
        share memory with the modules. The VAE's attention weights are (O, I, 1, 1), OpenCLIP's `in_proj` is q, k and v stacked, (3 D, D)
        and (3 D,), and its `text_projection` is transposed, (D, P).

    Raises:
        UserError: a tensor without a place in the original layout, or parts that make no SD1.x, SD2.x or SDXL.
    """
    if unet.config.mid_block_type != "UNetMidBlock2DCrossAttn":
        raise UserError(f"unet: mid_block_type {unet.config.mid_block_type} has no place in a single file; keep the diffusers folder")
    if (unet.config.addition_embed_type == "text_time") != (text_encoder_2 is not None):
        raise UserError(
            f"unet: addition_embed_type {unet.config.addition_embed_type} with {1 if text_encoder_2 is None else 2} text encoders; "
            "SDXL has text_time and two, SD1.x and SD2.x have none and one: give the parts of one model"
        )
    tensors = _renamed(unet, "unet", _unet_names(unet.config)) | _renamed(vae, "vae", _vae_names(vae.config))
    for key, value in tensors.items():
        if key.startswith(VAE) and ".attn_1." in key and value.ndim == 2:
            tensors[key] = value[:, :, None, None]
    if text_encoder_2 is None and text_encoder.config.hidden_act == "gelu":
        return tensors | _open_clip(text_encoder, "text_encoder", OPEN_CLIP["sd2"], layers=SD2_LAYERS)
    _require_activation(text_encoder, "text_encoder", "quick_gelu")
    if text_encoder_2 is None:
        return tensors | _renamed(text_encoder, "text_encoder", _clip_names(CLIP["sd1"]))
    _require_activation(text_encoder_2, "text_encoder_2", "gelu")
    tensors |= _renamed(text_encoder, "text_encoder", _clip_names(CLIP["sdxl"]))
    return tensors | _open_clip(text_encoder_2, "text_encoder_2", OPEN_CLIP["sdxl"], projected=True)


def _require_activation(encoder: Any, what: str, expected: str) -> None:
    if encoder.config.hidden_act != expected:
        raise UserError(
            f"{what}: hidden_act {encoder.config.hidden_act}, but readers of a single file compute it with {expected}; "
            "keep the diffusers folder"
        )


def _renamed(module: nn.Module, what: str, name: Callable[[str], str | None]) -> dict[str, Tensor]:
    """The module's tensors under their new names; UserError tells those for which `name` has none."""
    tensors: dict[str, Tensor] = {}
    lost = []
    for key, value in module.state_dict().items():
        new = name(key)
        if new is None or new in tensors:
            lost.append(key)
        else:
            tensors[new] = value.contiguous()
    if lost:
        remedy = "merge the adapter first" if any("lora_" in key for key in lost) else "keep the diffusers folder"
        listed = ", ".join(lost[:5]) + (f" and {len(lost) - 5} more" if len(lost) > 5 else "")
        raise UserError(f"{what}: no place in the original layout for {listed}; {remedy}")
    return tensors


def _layer_name(key: str, layers: dict[str, str], prefix: str) -> str | None:
    """The new name of a layer's weight or bias, if the layer has a place."""
    layer, _, kind = key.rpartition(".")
    return f"{prefix}{layers[layer]}.{kind}" if layer in layers and kind in ("weight", "bias") else None


def _unet_names(config: Any) -> Callable[[str], str | None]:
    """New names of a UNet's tensors.

    The original code numbers all layers of the way down in one row, and those of the way up in another; each holds a resnet, behind it a
    transformer where the block has them, and last the upsampler, if it is there. A downsampler is an entry of its own.
    """
    units: dict[str, str] = {"mid_block.resnets.0": "middle_block.0", "mid_block.resnets.1": "middle_block.2"}
    transformers = {"mid_block.attentions.0": "middle_block.1"}
    layers = dict(UNET_ENDS)
    down, up, per_block = config.down_block_types, config.up_block_types, config.layers_per_block
    depths = [per_block] * len(down) if isinstance(per_block, int) else list(per_block)
    n = 0
    for b, kind in enumerate(down):
        for j in range(depths[b]):
            n += 1
            units[f"down_blocks.{b}.resnets.{j}"] = f"input_blocks.{n}.0"
            if kind == "CrossAttnDownBlock2D":
                transformers[f"down_blocks.{b}.attentions.{j}"] = f"input_blocks.{n}.1"
        if b + 1 < len(down):
            n += 1
            layers[f"down_blocks.{b}.downsamplers.0.conv"] = f"input_blocks.{n}.0.op"
    n = -1
    for b, kind in enumerate(up):
        for j in range(depths[-1 - b] + 1):
            n += 1
            units[f"up_blocks.{b}.resnets.{j}"] = f"output_blocks.{n}.0"
            if kind == "CrossAttnUpBlock2D":
                transformers[f"up_blocks.{b}.attentions.{j}"] = f"output_blocks.{n}.1"
        if b + 1 < len(up):
            layers[f"up_blocks.{b}.upsamplers.0.conv"] = f"output_blocks.{n}.{2 if kind == 'CrossAttnUpBlock2D' else 1}.conv"
    layers |= {f"{old}.{part}": f"{new}.{place}" for old, new in units.items() for part, place in UNET_RESNET.items()}

    def name(key: str) -> str | None:
        unit, attentions, rest = key.partition(".attentions.")
        index, _, tensor = rest.partition(".")
        place = transformers.get(unit + attentions + index)
        if place is not None and _TRANSFORMER.fullmatch(tensor):
            return f"{UNET}{place}.{tensor}"
        return _layer_name(key, layers, UNET)

    return name


def _vae_names(config: Any) -> Callable[[str], str | None]:
    """New names of an autoencoder's tensors; the original code counts the decoder's blocks from the last to the first."""
    layers = {"quant_conv": "quant_conv", "post_quant_conv": "post_quant_conv"}
    units: dict[str, str] = {}
    for half in ("encoder", "decoder"):
        layers |= {
            f"{half}.{old}": f"{half}.{new}"
            for old, new in (("conv_in", "conv_in"), ("conv_norm_out", "norm_out"), ("conv_out", "conv_out"))
        }
        layers |= {f"{half}.mid_block.attentions.0.{old}": f"{half}.mid.attn_1.{new}" for old, new in _VAE_ATTENTION.items()}
        units |= {f"{half}.mid_block.resnets.{j}": f"{half}.mid.block_{j + 1}" for j in (0, 1)}
    for b in range(len(config.down_block_types)):
        units |= {f"encoder.down_blocks.{b}.resnets.{j}": f"encoder.down.{b}.block.{j}" for j in range(config.layers_per_block)}
        layers[f"encoder.down_blocks.{b}.downsamplers.0.conv"] = f"encoder.down.{b}.downsample.conv"
    for b in range(len(config.up_block_types)):
        place = f"decoder.up.{len(config.up_block_types) - 1 - b}"
        units |= {f"decoder.up_blocks.{b}.resnets.{j}": f"{place}.block.{j}" for j in range(config.layers_per_block + 1)}
        layers[f"decoder.up_blocks.{b}.upsamplers.0.conv"] = f"{place}.upsample.conv"
    layers |= {f"{old}.{part}": f"{new}.{place}" for old, new in units.items() for part, place in _VAE_RESNET.items()}
    return lambda key: _layer_name(key, layers, VAE)


def _clip_names(prefix: str) -> Callable[[str], str | None]:
    """New names of a CLIP text encoder's tensors; transformers leaves `text_model.` out of some classes' names since 5.6."""

    def name(key: str) -> str | None:
        bare = key.removeprefix("text_model.")
        return prefix + bare if bare in _CLIP_ENDS or _CLIP_LAYER.fullmatch(bare) else None

    return name


def _open_clip(encoder: nn.Module, what: str, prefix: str, *, layers: int | None = None, projected: bool = False) -> dict[str, Tensor]:
    """The text encoder in the form of open_clip; readers know no layer from number `layers` on."""

    def name(key: str) -> str | None:
        bare = key.removeprefix("text_model.")
        if bare == "text_projection.weight" and projected:
            return prefix + "text_projection"
        if bare in _CLIP_ENDS:
            return prefix + _CLIP_ENDS[bare]
        match = _CLIP_LAYER.fullmatch(bare)
        if match is None or (layers is not None and int(match[1]) >= layers):
            return None
        block = f"{prefix}transformer.resblocks.{match[1]}."
        if match[2] in _RESBLOCK:
            return f"{block}{_RESBLOCK[match[2]]}.{match[3]}"
        return f"{block}attn.in_proj_{match[3]}.{match[2].removeprefix('self_attn.')[0]}"  # one of three, stacked below

    tensors = _renamed(encoder, what, name)
    for first in [key for key in tensors if key.endswith((".in_proj_weight.q", ".in_proj_bias.q"))]:
        stem = first.removesuffix(".q")
        tensors[stem] = torch.cat([tensors.pop(f"{stem}.{part}") for part in "qkv"])
    if projected:
        tensors[prefix + "text_projection"] = tensors[prefix + "text_projection"].T.contiguous()
    return tensors


_UNQUANTISED = "give the same model in float16, bfloat16 or float32"
_FOREIGN = (  # what a file's names show it to be, and what to give instead
    (
        r"(^|\.)lora_(unet|te\d?|transformer)_|[._]lora[._]|\.hada_w|\.lokr_w|\.oft_",
        "a LoRA",
        "give the checkpoint of the model it belongs to",
    ),
    (r"^(string_to_param|emb_params)|^clip_[lg]$", "a textual inversion", "give a checkpoint"),
    (r"^control_model\.|^controlnet_|input_hint_block\.", "a ControlNet", "give a checkpoint of the model alone"),
    (r"motion_modules\.", "an AnimateDiff motion module", "give a checkpoint of the image model"),
    (r"(^|\.)joint_blocks\.", "a Stable Diffusion 3", "give an SD1.x, SD2.x or SDXL"),
    (r"(^|\.)double_blocks\.", "a Flux or one of its kin", "give an SD1.x, SD2.x or SDXL"),
    (r"^conditioner\.embedders\.0\.model\.", "an SDXL refiner", "give the SDXL base model"),
    (r"^(encoder|decoder)\.mid\.", "a VAE alone", "give the checkpoint of a whole model"),
    (r"^edm_(mean|std)$", "a Playground v2.5, which has its own preconditioning", "give an SD1.x, SD2.x or SDXL"),
    (r"^edm_vpred\.", "an EDM model of v-prediction, whose noise levels follow no schedule of betas", "give an SD1.x, SD2.x or SDXL"),
    (
        r"(^|\.)(scaled_fp8|scale_weight|scale_input|weight_scale(_2)?|input_scale|comfy_quant|absmax|nested_absmax|quant_map"
        r"|nested_quant_map|quant_state(\..+)?|SCB|weight_format|qweight|qzeros)$",
        "a quantised checkpoint, whose weights mean nothing without their scales",
        _UNQUANTISED,
    ),
    (
        r"^(unet\.)?(down_blocks|mid_block|up_blocks)\.|^(encoder|decoder)\.mid_block\.|^(text_model\.)?(encoder\.layers|embeddings)\.",
        "a part of a diffusers folder",
        "give the folder that has the model_index.json",
    ),
    (
        r"^cond_stage_model\.transformer\.embeddings\.",
        "an SD1.x with an early name for its text encoder",
        "convert it to a diffusers folder",
    ),
)
_OTHER_INPUTS = {5: "a depth-to-image model", 7: "an upscaler", 8: "an InstructPix2Pix", 9: "an inpainting model"}


def family(path: Path) -> str:
    """Which model a .safetensors file in the original layout holds, by its names and the shape of its first layer; no weight is read.

    Args:
        path: the file.

    Returns:
        "sd1", "sd2" or "sdxl".

    Raises:
        UserError: it cannot be read, it holds another kind of model, or a part of one is not in it.
    """
    keys, channels = _read_names(path)
    other = foreign(keys)
    if other is not None:
        raise UserError(f"{path}: it seems to be {other[0]} (it has the tensor {_shown_by(keys)}); {other[1]}")
    kinds = [
        kind
        for kind in ("sd1", "sd2", "sdxl")
        if all(_holds(keys, side[kind]) for side in (CLIP, OPEN_CLIP) if kind in side)
    ]  # fmt: skip
    missing = [what for what, start in (("UNet", _FIRST_LAYER), ("VAE", VAE)) if not _holds(keys, start)]
    if len(kinds) != 1 or missing:
        missing += [] if kinds else ["text encoder"]
        if len(missing) == 3:
            raise UserError(f"{path}: its tensors' names are not those of a Stable Diffusion checkpoint; give an SD1.x, SD2.x or SDXL")
        trouble = f"it lacks the {' and the '.join(missing)}" if missing else f"it has the text encoders of {' and '.join(kinds)}"
        raise UserError(f"{path}: {trouble}; give a checkpoint with the UNet, the VAE and the text encoders of one model")
    if channels != 4:
        seems = f"it seems to be {_OTHER_INPUTS[channels]}" if channels in _OTHER_INPUTS else "it is none of the base models"
        raise UserError(f"{path}: its UNet takes {channels} input channels instead of 4, so {seems}; give the base model")
    _refuse_whole_numbers(path)
    if _holds(keys, UNET + "label_emb.") != (kinds == ["sdxl"]):
        fault = "lacks the size conditioning of SDXL" if kinds == ["sdxl"] else "has a class or image embedding, as unCLIP and upscalers do"
        raise UserError(f"{path}: its UNet {fault}; give the base model")
    return kinds[0]


def foreign(keys: Iterable[str]) -> tuple[str, str] | None:
    """What a file with these names holds instead of a checkpoint, as "a LoRA", and what to give instead; None if no name tells."""
    names = list(keys)
    return next(((what, remedy) for pattern, what, remedy in _FOREIGN if any(re.search(pattern, key) for key in names)), None)


def _shown_by(keys: Iterable[str]) -> str:
    """The first name that `foreign` tells by."""
    names = list(keys)
    return next(key for pattern, _, _ in _FOREIGN for key in names if re.search(pattern, key))


def _refuse_whole_numbers(path: Path) -> None:
    """Raises UserError where weights are stored as whole numbers, as some quantised files have them."""
    with opened(path) as file:
        for name in file.keys():  # noqa: SIM118 - it is no dictionary
            kind = file.get_slice(name).get_dtype()
            if name.startswith((UNET, VAE)) and kind.startswith(("I", "U", "F4", "F6")):
                raise UserError(f"{path}: the tensor {name} is stored as {kind}, so it is a quantised checkpoint; {_UNQUANTISED}")


def _holds(keys: Iterable[str], prefix: str) -> bool:
    return any(key.startswith(prefix) for key in keys)


def _read_names(path: Path) -> tuple[list[str], int | None]:
    """All names in the file, and the input channels of the UNet's first layer, None if it is not there."""
    with opened(path) as file:
        keys = list(file.keys())
        shape = file.get_slice(_FIRST_LAYER).get_shape() if _FIRST_LAYER in keys else []
    return keys, shape[1] if len(shape) == 4 else None


@contextmanager
def opened(path: Path, *, wanted: str = "a .safetensors file") -> Iterator[Any]:
    """A .safetensors file, opened for as long as it is read.

    Args:
        path: the file.
        wanted: what to give where there is no file.

    Raises:
        UserError: there is no such file, it cannot be read, or it is no whole .safetensors file.
    """
    if not path.is_file():
        raise UserError(f"{path}: {'a folder' if path.is_dir() else 'no such file or folder'}; give {wanted}")
    try:
        with safe_open(path, "pt") as file:
            yield file
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error}); give a .safetensors file you may read") from error
    except SafetensorError as error:
        raise UserError(f"{path}: {unreadable(path, error)}") from error


def how_to_convert(path: Path) -> str:
    """How a person makes a .safetensors file of a pickled one; the command reads tensors alone and runs none of its code."""
    ending = "-converted.safetensors" if path.suffix == ".safetensors" else ".safetensors"
    files = shlex.join([str(path), str(path.with_name(path.stem + ending))])
    return f"convert it: load and save it in ComfyUI (node Save Checkpoint), or run: {CONVERT} {files}"


def unreadable(path: Path, error: SafetensorError) -> str:
    """What a file that safetensors cannot open is, by its first bytes, and the remedy."""
    with open(path, "rb") as stream:
        start = stream.read(16)
    if not start:
        return "an empty file; download it again"
    if start.startswith((b"PK\x03\x04", b"\x80")):  # torch's archive, or a bare pickle
        return f"a pickled checkpoint, which is not opened because it can run code; {how_to_convert(path)}"
    if start.startswith(b"version https:/"):
        return "a pointer of Git LFS instead of the weights; fetch it with `git lfs pull`"
    if start.lower().lstrip().startswith((b"<!doctype", b"<html")):
        return "a web page instead of the weights; download the file itself, signed in if its page asks for that"
    return f"no safetensors file, or one cut short ({error}); download it again"
