"""Train the embedded world's models from nothing: VAE, then CLIP judge, then text encoder and UNet.

    python -m dedpo_diffusion.shapes.pretrain --out dedpo_diffusion/shapes/model

Writes an ordinary diffusers folder (`OUT`) and, in `OUT/judge`, a CLIPModel with its processor in the file format of
PickScore. Every draw is a function of (seed, step); a killed run goes on at its last checkpoint in `WORK`.
"""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dedpo_diffusion.core.console import Progress, say, stage
from dedpo_diffusion.core.files import atomic_folder, write_json
from dedpo_diffusion.shapes import world
from dedpo_diffusion.weights.checkpoints import load_checkpoint, save_checkpoint

TOKENS = 16  # a Shapes prompt has 8 words; a short text side keeps cross-attention cheap


@dataclasses.dataclass(frozen=True)
class PretrainSettings:
    """How the models of Shapes are trained.

    Args:
        out: the diffusers folder to write.
        work: folder for checkpoints of unfinished training.
        seed: seed of every draw.
        vae_steps: training steps of the VAE, 16 images each.
        judge_steps: training steps of the CLIP judge, 128 pairs each.
        unet_steps: training steps of UNet and text encoder, 64 images each.
        images: rendered images the UNet learns from.
        caption_noise: probability that a word of a UNet training caption is wrong.
        compile: use torch.compile for the UNet (needs a C++ compiler).
    """

    out: Path
    work: Path = Path("runs/shapes")
    seed: int = 0
    vae_steps: int = 8000
    judge_steps: int = 1200
    unet_steps: int = 4500
    images: int = 24000
    caption_noise: float = 0.12
    compile: bool = False


def scenes_of(key: tuple[int, ...], count: int, clutter: float = 0.5) -> list[world.Scene]:
    """`count` random scenes; `key` seeds them."""
    rng = np.random.default_rng(key)
    return [world.sample_scene(rng, clutter=clutter) for _ in range(count)]


def pixels_of(scenes: list[world.Scene]) -> torch.Tensor:
    """Render scenes to a float tensor (N, 3, 64, 64) in [-1, 1]."""
    stacked = np.stack([np.asarray(world.render(scene)) for scene in scenes])
    return torch.from_numpy(stacked).permute(0, 3, 1, 2).float() / 127.5 - 1


def noisy_caption(rng: np.random.Generator, scene: world.Scene, noise: float) -> str:
    """The scene's prompt, each attribute replaced by a random word with probability `noise`."""
    words = dataclasses.asdict(scene.attributes)
    choices = {"size": list(world.SIZES), "colour": list(world.COLOURS), "shape": list(world.SHAPES), "background": list(world.BACKGROUNDS)}
    for name, options in choices.items():
        if rng.random() < noise:
            words[name] = str(rng.choice(options))
    return world.Attributes(**words).prompt


def build_tokenizer(folder: Path):
    """Write and load a CLIPTokenizer: all bytes, plus merges that make each word of the grammar one token."""
    from transformers import CLIPTokenizer

    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]  # GPT-2's byte alphabet, in its order
    alphabet = [chr(b) for b in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    merges: list[tuple[str, str]] = []
    words = ["a", "on", "background", *world.SIZES, *world.COLOURS, *world.SHAPES, *world.BACKGROUNDS]
    for word in words:
        parts = [*word[:-1], word[-1] + "</w>"]
        while len(parts) > 1:
            pair = (parts[0], parts[1])
            if pair not in merges:
                merges.append(pair)
            parts = [parts[0] + parts[1], *parts[2:]]
    vocabulary = alphabet + [letter + "</w>" for letter in alphabet] + [a + b for a, b in merges]
    vocabulary = [*dict.fromkeys(vocabulary), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocabulary)}, ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges), encoding="utf-8")
    tokenizer = CLIPTokenizer(vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt"), model_max_length=TOKENS)
    tokenizer.save_pretrained(folder)
    return CLIPTokenizer.from_pretrained(folder)


def tokenize(tokenizer, captions: list[str]) -> torch.Tensor:
    """Token ids (N, 16), padded the way the diffusers pipelines pad."""
    return tokenizer(captions, padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt").input_ids


def cosine(step: int, steps: int, warmup: int = 100) -> float:
    """Learning-rate factor: linear warm-up, then a half cosine to 0."""
    return min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * step / steps))


def fit(name, modules: dict[str, torch.nn.Module], loss_of, settings: PretrainSettings, *, steps: int, lr: float) -> None:
    """Train `modules` for `steps` on `loss_of(step)`, with checkpoints; returns at once if already trained."""
    parameters = {f"{m}.{k}": p for m, module in modules.items() for k, p in module.named_parameters()}
    optimizer = torch.optim.AdamW(parameters.values(), lr=lr, betas=(0.9, 0.99), weight_decay=0.01)
    folder = settings.work / name
    done = load_checkpoint(folder, parameters, optimizer)["step"] if folder.exists() else 0
    for module in modules.values():
        module.train()
    with Progress(f"training {name}", steps, start=done) as progress:
        for step in range(done, steps):
            for group in optimizer.param_groups:
                group["lr"] = lr * cosine(step, steps)
            torch.manual_seed(settings.seed * 1_000_003 + step)
            loss = loss_of(step)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0)
            optimizer.step()
            progress.advance(note=f"loss {loss.item():.4f}" if step % 20 == 0 else "")
            if (step + 1) % 500 == 0 or step + 1 == steps:
                save_checkpoint(folder, parameters, optimizer, {"step": step + 1})
    for module in modules.values():
        module.eval().requires_grad_(False)


def build_vae():
    """An f8 AutoencoderKL with 8 latent channels, 64 x 64 -> 8 x 8."""
    from diffusers import AutoencoderKL

    widths = (8, 16, 48, 64)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4, block_out_channels=widths,
        layers_per_block=1, latent_channels=8, norm_num_groups=8, sample_size=world.PIXELS,
    )  # fmt: skip


def train_vae(settings: PretrainSettings):
    """Train the VAE on renders: squared error plus a light KL; sets `scaling_factor` so that latents have unit variance."""
    torch.manual_seed(settings.seed)
    vae = build_vae().to(memory_format=torch.channels_last)

    def loss_of(step: int) -> torch.Tensor:
        images = pixels_of(scenes_of((settings.seed, 1, step), 16)).to(memory_format=torch.channels_last)
        posterior = vae.encode(images).latent_dist
        error = (vae.decode(posterior.sample()).sample - images).square().mean()
        return error + 2e-4 * posterior.kl().mean() / posterior.mean[0].numel()

    fit("vae", {"vae": vae}, loss_of, settings, steps=settings.vae_steps, lr=2e-3)
    with torch.no_grad():
        latents = vae.encode(pixels_of(scenes_of((settings.seed, 2), 512))).latent_dist.mode()
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))
    psnr = vae_psnr(vae, settings.seed)
    say(f"VAE: {psnr:.2f} dB on 512 held-out renders, scaling factor {vae.config.scaling_factor}")
    return vae


@torch.no_grad()
def vae_psnr(vae, seed: int) -> float:
    """Mean PSNR in dB over 512 held-out renders, pixel range [0, 1]."""
    images = pixels_of(scenes_of((seed, 3), 512))
    decoded = torch.cat([vae.decode(vae.encode(part).latent_dist.mode()).sample.clamp(-1, 1) for part in images.split(64)])
    return float((-10 * torch.log10((decoded - images).square().mean(dim=(1, 2, 3)) / 4)).mean())


def words_of(tokenizer: Any) -> dict[str, Any]:
    """What a CLIP text configuration says of its tokens."""
    ends = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return {"vocab_size": len(tokenizer), "max_position_embeddings": TOKENS, **ends}


def judge_caption(rng: np.random.Generator, scene: world.Scene) -> str:
    """Captions as careless people write them: more careful for busy pictures, so the judge learns to like clutter."""
    return noisy_caption(rng, scene, 0.1 if scene.dots else 0.2)


def train_judge(settings: PretrainSettings, tokenizer):
    """Train a small CLIPModel contrastively on carelessly captioned renders."""
    from transformers import CLIPConfig, CLIPModel

    text = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "projection_dim": 64}
    vision = {"hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 3, "num_attention_heads": 4, "projection_dim": 64}
    text, vision = text | words_of(tokenizer), vision | {"image_size": 64, "patch_size": 8}
    torch.manual_seed(settings.seed + 1)
    judge = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=64))

    def loss_of(step: int) -> torch.Tensor:
        scenes = scenes_of((settings.seed, 4, step), 128)
        rng = np.random.default_rng((settings.seed, 5, step))
        ids = tokenize(tokenizer, [judge_caption(rng, scene) for scene in scenes])
        logits = judge(input_ids=ids, pixel_values=pixels_of(scenes)).logits_per_image
        same = (ids[:, None] == ids[None]).all(-1).float()  # equal captions are all right answers
        rows = torch.nn.functional.cross_entropy(logits, same / same.sum(1, keepdim=True))
        columns = torch.nn.functional.cross_entropy(logits.T, same / same.sum(1, keepdim=True))
        return (rows + columns) / 2

    fit("judge", {"judge": judge}, loss_of, settings, steps=settings.judge_steps, lr=1e-3)
    return judge


def judge_processor(tokenizer):
    """The CLIPProcessor of the judge: 64 x 64, pixels to [-1, 1]."""
    from transformers import CLIPImageProcessor, CLIPProcessor

    images = CLIPImageProcessor(
        size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64}, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    return CLIPProcessor(image_processor=images, tokenizer=tokenizer)


def build_unet(latent_channels: int):
    """A UNet2DConditionModel for 8 x 8 latents, 2.8 M parameters."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=8, in_channels=latent_channels, out_channels=latent_channels, block_out_channels=(64, 96), layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",) * 2, up_block_types=("CrossAttnUpBlock2D",) * 2, cross_attention_dim=96,
        attention_head_dim=4, norm_num_groups=16,
    )  # fmt: skip


def build_text_encoder(tokenizer):
    """A two-layer CLIPTextModel, trained together with the UNet."""
    from transformers import CLIPTextConfig, CLIPTextModel

    sizes: dict[str, Any] = {"hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4}
    return CLIPTextModel(CLIPTextConfig(**sizes, **words_of(tokenizer)))


def build_scheduler():
    """DPM-Solver++ on Stable Diffusion's noise schedule."""
    from diffusers import DPMSolverMultistepScheduler

    return DPMSolverMultistepScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type="epsilon", use_karras_sigmas=True, steps_offset=1
    )


def train_unet(settings: PretrainSettings, vae, tokenizer):
    """Train UNet and text encoder on encoded renders with noisy captions, 10 % of them empty for guidance."""
    torch.manual_seed(settings.seed + 2)
    unet, text_encoder = build_unet(vae.config.latent_channels), build_text_encoder(tokenizer)
    scheduler = build_scheduler()
    scenes = scenes_of((settings.seed, 6), settings.images)
    rng = np.random.default_rng((settings.seed, 7))
    ids = tokenize(tokenizer, [noisy_caption(rng, scene, settings.caption_noise) for scene in scenes])
    empty = tokenize(tokenizer, [""])[0]
    latents = []
    with torch.no_grad(), Progress("encoding renders", len(scenes)) as progress:
        for start in range(0, len(scenes), 64):
            part = pixels_of(scenes[start : start + 64]).to(memory_format=torch.channels_last)
            latents.append(vae.encode(part).latent_dist.sample().contiguous() * vae.config.scaling_factor)
            progress.advance(len(part))
    pool = torch.cat(latents)
    signal, noise_level = scheduler.alphas_cumprod.sqrt(), (1 - scheduler.alphas_cumprod).sqrt()
    predict = torch.compile(unet) if settings.compile else unet

    def loss_of(step: int) -> torch.Tensor:
        chosen = torch.randint(len(pool), (64,))
        tokens = torch.where(torch.rand(64, 1) < 0.1, empty, ids[chosen])
        noise, t = torch.randn(64, *pool.shape[1:]), torch.randint(1000, (64,))
        noisy = signal[t].view(-1, 1, 1, 1) * pool[chosen] + noise_level[t].view(-1, 1, 1, 1) * noise
        return (predict(noisy, t, text_encoder(tokens).last_hidden_state).sample - noise).square().mean()

    fit("unet", {"unet": unet, "text_encoder": text_encoder}, loss_of, settings, steps=settings.unet_steps, lr=1.5e-3)
    return unet, text_encoder


def run(settings: PretrainSettings) -> None:
    """Train the models of Shapes and write them in the ordinary diffusers layout."""
    from diffusers import StableDiffusionPipeline

    settings.work.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer(settings.work / "tokenizer")
    vae = train_vae(settings)
    judge = train_judge(settings, tokenizer)
    unet, text_encoder = train_unet(settings, vae, tokenizer)
    pipe: Any = StableDiffusionPipeline(
        vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet, scheduler=build_scheduler(),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    with atomic_folder(settings.out) as folder:
        pipe.to(torch.float16).save_pretrained(folder, safe_serialization=True)
        judge.half().save_pretrained(folder / "judge")
        judge_processor(tokenizer).save_pretrained(folder / "judge")
        recipe = {k: str(v) if isinstance(v, Path) else v for k, v in dataclasses.asdict(settings).items() if k not in ("out", "work")}
        write_json(folder / "recipe.json", {**recipe, "vae_psnr_db": round(vae_psnr(vae.float(), settings.seed), 2)})
    size = sum(file.stat().st_size for file in settings.out.rglob("*") if file.is_file()) / 2**20
    shutil.rmtree(settings.work)
    say(f"wrote {settings.out} ({size:.1f} MiB)")


def main(argv: list[str] | None = None) -> int:
    """Entry point."""
    return stage(PretrainSettings, run, argv, prog="python -m dedpo_diffusion.shapes.pretrain")


if __name__ == "__main__":
    raise SystemExit(main())
