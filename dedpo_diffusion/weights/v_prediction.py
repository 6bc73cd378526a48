"""Which programs find out that a single file predicts v: its marks are the tensors `v_pred` and, of zero terminal SNR, `ztsnr`.

Measured with the programs' own loaders, see docs/loading.md: ComfyUI, Forge and SD.Next look for the marks in an SDXL, SD.Next alone in an
SD1.x. Of an SD2.x, ComfyUI and InvokeAI go by weights and names.
"""

from __future__ import annotations

from dedpo_diffusion.weights.compatibility import A1111, COMFY, DIFFUSERS

_AS_NOISE = "yes, but it takes its prediction for noise unless it is told"
_SEEN: dict[str, str] = {
    "sd1": "SD.Next alone looks for the mark of an SD1.x; ComfyUI, Forge, A1111, InvokeAI, diffusers' from_single_file take it for noise",
    "sd2": "ComfyUI, InvokeAI and diffusers' from_single_file know it for an SD2.x, A1111 tries the UNet; Forge takes it for noise",
    "sdxl": "ComfyUI, Forge and SD.Next look for the mark; A1111, InvokeAI and diffusers' from_single_file do not and take it for noise",
}
REMEDY = (
    "tell them: in ComfyUI by the node ModelSamplingDiscrete, in A1111 and Forge by a .yaml beside the file; for diffusers give "
    "--format merged, whose scheduler says so"
)


def who_sees(family: str, zero_snr: bool) -> str:
    """What programs make of a v-predicting file, and what to do, as one sentence."""
    zero = "; its zero terminal SNR is lost in ComfyUI" if zero_snr and family == "sd2" else ""
    return f"it predicts v: {_SEEN[family]}{zero}. Where it is taken for noise, {REMEDY}"


def readers(family: str, *, predicts_v: bool) -> dict[str, str]:
    """What `dedpo inspect` says of the programs that read a single file."""
    noise = _AS_NOISE if predicts_v else ""
    return {
        DIFFUSERS: "yes, with from_single_file" + (noise.removeprefix("yes") if family != "sd2" else ""),
        COMFY: noise if noise and family == "sd1" else "yes",
        A1111: noise if noise and family != "sd2" else "yes",
    }
