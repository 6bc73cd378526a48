"""How the VAE of a sampling pipeline decodes: in a precision that it bears, and in a memory that there is."""

from __future__ import annotations

from typing import Any

import torch

from dedpo_diffusion.core.console import say
from dedpo_diffusion.models.memory import free_memory, is_out_of_memory

TILES = 2  # along each side of an image of the model's own size


def guard_decoding(pipe: Any) -> Any:
    """Have a pipeline's VAE decode with care, and return the pipeline.

    * In float32 where the model is in float16, in which some VAEs overflow, SDXL's among them.
    * On a GPU one image after the other: the memory of decoding then does not grow with the batch.
    * In tiles once the memory is too small for a whole image, which is said; `is_tiled` tells.
    """
    vae = pipe.vae
    if vae.dtype == torch.float16:
        vae.to(dtype=torch.float32)
    if pipe.device.type == "cuda":
        vae.enable_slicing()
    decode = vae.decode

    def guarded(latents: torch.Tensor, *given: Any, **more: Any) -> Any:
        while True:
            try:
                return decode(latents.to(vae.dtype), *given, **more)
            except RuntimeError as error:
                if not is_out_of_memory(error) or not _spare_memory(vae, len(latents)):
                    raise
            free_memory()

    vae.decode = guarded
    return pipe


def _spare_memory(vae: Any, images: int) -> bool:
    """Let a VAE do with less memory; False if there is nothing left to try."""
    if images > 1 and not vae.use_slicing:
        vae.enable_slicing()
    elif not vae.use_tiling:
        vae.enable_tiling()
        # as they come, tiles are as large as a whole image of the model's own size
        vae.tile_sample_min_size //= TILES
        vae.tile_latent_min_size //= TILES
        say("the GPU's memory is too small to decode a whole image: decoding in tiles, which may leave faint seams")
    else:
        return False
    return True


def is_tiled(pipe: Any) -> bool:
    """Whether images are decoded in tiles by now."""
    return bool(pipe.vae.use_tiling)
