"""The Stable Diffusion backbone: encoders, the UNet with a LoRA or trained as a whole, and the reference."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from dedpo_diffusion.core.console import UserError
from dedpo_diffusion.core.records import Conditioning
from dedpo_diffusion.dpo.noising import ForwardProcess, check_betas, image_errors
from dedpo_diffusion.models.loading import load_pipeline
from dedpo_diffusion.models.sharded_tensors import reshard
from dedpo_diffusion.models.text_encoders import ATTENTION as TEXT_ATTENTION
from dedpo_diffusion.models.text_encoders import TextEncoders, chunks
from dedpo_diffusion.pairs.pixels import bucket_shapes

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")  # the UNet's attention projections, the customary LoRA targets
GRAPHS = 64  # compiled for one block at most
SMALL = 256 * 256  # pixels up to which images are encoded by SMALL_AT_ONCE, beyond by LARGE_AT_ONCE
SMALL_AT_ONCE, LARGE_AT_ONCE = 8, 2
TIMES = 6  # numbers that SDXL's base is told of an image's size; its refiner is told others


class Backbone:
    """A Stable Diffusion model (1.x, 2.x, XL) as the preference step sees it.

    Attributes:
        unet: the UNet, with its adapter once `add_lora` was called.
        text: its text encoders.
        network: the module that holds all that is trained.
        policy: what `predict` calls: `network`, or what accelerate made of it.
        frozen: the reference of a UNet that is trained as a whole; None while there is an adapter, or no need of it.
        anchor: the reference's adapter, by name, where training goes on from one; None takes the base model as the reference.
        process: the forward process of its noise schedule.
        fingerprint, encoders_fingerprint: of the base's weights, and of those that encode pairs.
        size: pixels of the side it was made for.
    """

    def __init__(
        self,
        name: str,
        *,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        config: str | None = None,
        prediction: str | None = None,
    ) -> None:
        """Load and freeze; `dtype` is the compute precision of the UNet. The others, and Raises, as `load_pipeline`."""
        pipe = load_pipeline(name, config=config, prediction=prediction)
        self.name, self.device, self.dtype = name, device, dtype
        self.pipeline, self.scheduler = type(pipe), pipe.scheduler  # of what samples from it
        self.scale, self.channels, self.factor = (
            float(pipe.vae.config.scaling_factor),
            pipe.vae.config.latent_channels,
            pipe.vae_scale_factor,
        )
        self.size = int(pipe.unet.config.sample_size) * self.factor
        self.process = _process(pipe, name)
        self.told_sizes = _told_sizes(pipe, name)
        self.text = TextEncoders(pipe, two=self.told_sizes)
        encoders = list(self.text.encoders)
        words = [[token.get_vocab(), token.pad_token_id, token.model_max_length] for token in self.text.tokenizers]
        told = [words, self.text.absent_is_zero, *(_facts(part) for part in (pipe.vae, *encoders))]
        self.encoders_fingerprint = fingerprint(pipe.vae, *encoders, facts=told)
        schedule = {"alphas": self.process.alphas_cumprod}
        self.fingerprint = fingerprint(pipe.unet, schedule, facts=[_facts(pipe.unet), self.process.prediction]) + self.encoders_fingerprint
        self.process = self.process.to(device)
        self.vae = pipe.vae.requires_grad_(False).eval()  # float32: half precision overflows in some VAEs
        self.unet = pipe.unet.requires_grad_(False).eval()
        self.network = Network(self.unet, dtype)
        self.policy: nn.Module = self.network
        self.frozen: nn.Module | None = None
        self.anchor: dict[str, Tensor] | None = None
        self._placed = self._compiled = False

    def latent_shape(self, size: int) -> tuple[int, int, int]:
        """(C, h, w) of an image of `size` pixels.

        Raises:
            UserError: the size is no multiple of what the VAE and UNet shrink it by.
        """
        if size % self.whole:
            raise UserError(f"size {size} is no multiple of {self.whole} pixels, which this model needs")
        return self.channels, size // self.factor, size // self.factor

    @property
    def whole(self) -> int:
        """Pixels that the sides of an image must be a multiple of."""
        return self.factor * 2 ** (len(self.unet.config.block_out_channels) - 1)

    def shapes(self, size: int) -> list[tuple[int, int]]:
        """Heights and widths in pixels that images of about size x size pixels may have, see `bucket_shapes`."""
        multiple = self.whole * max(1, size // 16 // self.whole)
        while size % multiple:  # the square is among them
            multiple -= self.whole
        return bucket_shapes(size, multiple)

    def use_xformers(self) -> None:
        """Compute the UNet's attention with xformers.

        Raises:
            UserError: xformers is not installed, or there is no CUDA device.
        """
        try:
            self.unet.enable_xformers_memory_efficient_attention()
        except (ImportError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(
                f"attention=xformers needs a CUDA device and `pip install -e '.[xformers]'` where this project was cloned ({reason})"
            ) from error

    def checkpoint(self, *, selective: bool = False) -> None:
        """Compute activations again in the backward pass rather than keep them.

        Args:
            selective: keep what matrix products, convolutions and attention gave, and compute only what lies between them again.
        """
        self.unet.enable_gradient_checkpointing(_selective if selective else None)

    def compile_blocks(self) -> None:
        """Compile the UNet's transformer blocks, one graph for all blocks of a shape, so that it takes a minute rather than ten.

        The adapter may be switched off and on: that is a graph of its own.
        """
        # every shape of a bucket, and the adapter on and off, are graphs of their own
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, GRAPHS)
        self.unet.compile_repeated_blocks()
        self._compiled = True

    def place(self, dtype: torch.dtype | None = None) -> None:
        """Move the UNet to the device, in the compute precision or another; until then it leaves the device to the encoders."""
        self.unet.to(device=self.device, dtype=dtype or self.dtype)
        self._placed = True

    def add_lora(
        self, *, rank: int, alpha: float, targets: Sequence[str] | None = None, dropout: float = 0.0, rslora: bool = False,
        dora: bool = False, text: bool = False, start: Mapping[str, Tensor] | None = None,
    ) -> None:  # fmt: skip
        """Give the UNet an adapter in float32, fresh (its output is exactly 0 until it is trained) or one to go on from.

        Args:
            rank: r of every adapted matrix.
            alpha: the adapter's output is scaled by alpha / r, with `rslora` by alpha / sqrt(r) (arXiv 2312.03732).
            targets: names of the layers; None takes the attention projections.
            dropout: on the adapter's input.
            rslora, dora: variants of the adapter; DoRA (arXiv 2402.09353) trains the magnitudes of the weights' rows apart.
            text: adapt the text encoders too, on their attention projections.
            start: an adapter's parameters, by the names of `trainable`; the reference is then the base with that adapter.

        Raises:
            UserError: none of the target names is a layer of the UNet, or `start` is of another shape.
        """
        from peft import LoraConfig

        self.place()
        options: dict[str, Any] = {"r": rank, "lora_alpha": alpha, "lora_dropout": dropout}  # peft computes alpha / r: any number does
        options |= {"use_rslora": rslora, "use_dora": dora}
        options["init_lora_weights"] = "gaussian"
        config = LoraConfig(target_modules=list(targets or ATTENTION), **options)
        try:
            self.unet.add_adapter(config)
        except ValueError as error:
            raise UserError(f"lora.targets {list(targets or ATTENTION)}: {error}") from error
        if text:
            self.text.to(self.device).add_lora(options)
            self.policy = self.network = Network(self.unet, self.dtype, self.text)
        for name, parameter in self.trainable().items():
            parameter.data = parameter.data.float()
            if "magnitude" in name and not name.startswith("text_"):  # of the weights as they are, which the compute precision would round
                base = self.unet.get_submodule(name.split(".lora_")[0]).base_layer.weight
                parameter.data.copy_(base.float().flatten(1).norm(dim=1).view(parameter.shape))
        if start is not None:
            self._begin(start)
        self.train(dropout > 0)

    def _begin(self, start: Mapping[str, Tensor]) -> None:
        live = self.trainable()
        if set(start) != set(live):
            raise UserError(f"lora.start: {_difference(set(start), set(live))}")
        for name, parameter in live.items():
            if parameter.shape != start[name].shape:
                raise UserError(
                    f"lora.start: {name} has shape {tuple(start[name].shape)}, not {tuple(parameter.shape)}; give its own lora.rank"
                )
            parameter.data.copy_(start[name])
        self.anchor = {name: parameter.detach().clone() for name, parameter in live.items()}

    def train_all(self, *, reference: bool) -> None:
        """Train every weight of the UNet, in float32.

        Args:
            reference: keep a frozen copy, for the reference's predictions. Its matrices are in the compute precision, which autocast
                rounds the policy's to as well, so that both agree until the policy is trained.
        """
        if reference:
            self.frozen = copy.deepcopy(self.unet).eval()
            for module in self.frozen.modules():
                if isinstance(module, nn.Linear | nn.Conv2d):
                    module.to(self.dtype)
            self.frozen.to(self.device)
            if self._compiled:
                self.frozen.compile_repeated_blocks()  # type: ignore[operator]
        self.place(torch.float32)
        self.unet.requires_grad_(True)

    def train(self, on: bool) -> None:
        """Put the adapters' dropout on or off."""
        self.unet.train(on)
        self.text.train(on and self.text.adapted)

    def trainable(self) -> dict[str, nn.Parameter]:
        """The parameters that are trained, by their name in the UNet, or as "text_encoder.<name>"."""
        reshard(self.unet)
        return {name: p for name, p in self.unet.named_parameters() if p.requires_grad or "lora_" in name} | self.text.adapters()

    @contextmanager
    def reference(self) -> Iterator[nn.Module]:
        """The reference: the frozen base model, bit for bit, or the base with the adapter that training goes on from, no dropout.

        Raises:
            ValueError: the UNet is trained as a whole, and no copy of it was kept.
        """
        if self.frozen is not None:
            yield self.frozen
            return
        trained = self.trainable()
        adapted = any("lora_" in name for name in trained)
        if trained and not adapted:
            raise ValueError("no reference was kept")
        training, live = self.unet.training, {}
        self.train(False)
        if self.anchor is not None:
            live = {name: parameter.data for name, parameter in trained.items()}
            self._point(self.anchor)
        elif adapted:
            self.unet.disable_adapters()
            self.text.switch(False)
        try:
            yield self.unet
        finally:
            if self.anchor is not None:
                self._point(live)
            elif adapted:
                self.unet.enable_adapters()
                self.text.switch(True)
            self.train(training)

    def _point(self, values: Mapping[str, Tensor]) -> None:
        for name, parameter in self.trainable().items():
            parameter.data = values[name]

    def reference_fingerprint(self) -> str:
        """Which reference this is: the base model, or another."""
        return self.fingerprint if self.anchor is None else self.fingerprint + fingerprint(self.anchor)

    def predict(self, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning, *, reference: bool = False) -> Tensor:
        """The UNet's prediction for both images of each pair, in one batch of 2 B; of groups of K images, K in place of 2.

        Args:
            noisy: x_t (B, 2, C, h, w).
            timesteps: (B,).
            conditioning: of the B pairs; with `sizes` and `pooled` for SDXL.
            reference: predict with the reference, without a graph.

        Returns:
            (B, 2, C, h, w).
        """
        if not self._placed:
            self.place()
        if self.told_sizes and (conditioning.pooled is None or conditioning.sizes is None):
            raise ValueError("this model is also conditioned on the pooled prompt and the images' sizes")
        given = (noisy, timesteps, conditioning.text, conditioning.pooled, conditioning.sizes if self.told_sizes else None)
        if not reference:
            return self.policy(*given, conditioning.tokens)
        with torch.no_grad(), self.reference() as unet:
            if self.anchor is not None and self.text.adapted:  # the base's embeddings are not the reference's
                return self.policy(*given, conditioning.tokens)
            return Network(unet, self.dtype)(*given)

    @torch.no_grad()
    def errors(self, latents: Tensor, noise: Tensor, timesteps: Tensor, conditioning: Conditioning, *, reference: bool = False) -> Tensor:
        """Errors (B, 2) of policy or reference, without a graph.

        Args:
            latents: scaled (B, 2, C, h, w).
            noise: broadcastable to them.
            timesteps: (B,).
            conditioning: of the B pairs.
            reference: those of the reference.
        """
        noisy = self.process.add_noise(latents, noise, timesteps)
        prediction = self.predict(noisy, timesteps, conditioning, reference=reference)
        return image_errors(prediction, self.process.target(latents, noise, timesteps))

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str | None]) -> Conditioning:
        """Embeddings of N prompts, float32, without sizes; None is the absent prompt that classifier-free guidance starts from.

        For SD1.x and SD2.x that is the empty prompt, for SDXL zeros where its pipeline says so. Prompts beyond the encoders' context are
        cut, as everywhere in this family. An adapter of the encoders is left out.
        """
        return self.encode_tokens(self.text.tokens(prompts))

    @torch.no_grad()
    def encode_tokens(self, tokens: Tensor) -> Conditioning:
        """As `encode_prompts`, of the tokens (N, encoders, L) of N prompts."""
        self.text.switch(False)
        found = self.text.to(self.device)(tokens.to(self.device))  # with a filled cache they are never needed there
        self.text.switch(True)
        return found

    @torch.no_grad()
    def encode_images(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the VAE's posterior, (N, 3, H, W) in [-1, 1] -> (N, C, h, w) twice, unscaled."""
        self.vae.to(self.device)
        found = []
        for part, count in chunks(pixels.contiguous(), SMALL_AT_ONCE if pixels[0, 0].numel() <= SMALL else LARGE_AT_ONCE):
            posterior = self.vae.encode(part.to(self.device)).latent_dist
            found.append((posterior.mean[:count].float(), posterior.std[:count].float()))
        mean, std = (torch.cat(parts).contiguous() for parts in zip(*found, strict=True))  # the UNet rounds by the layout it is given
        return mean, std

    def latents(self, mean: Tensor, std: Tensor, noise: Tensor) -> Tensor:
        """Scaled latents, a draw of the posterior; all of one shape."""
        return (mean + std * noise) * self.scale

    def drop_encoders(self, *, keep_text: bool = False) -> None:
        """Free the VAE and, unless they will be adapted, the text encoders, once everything they are for is cached."""
        del self.vae
        if not keep_text:
            self.text.encoders = nn.ModuleList()


class Network(nn.Module):
    """What is trained as one module: the UNet, in its compute precision, and the text encoders if they are adapted."""

    def __init__(self, unet: nn.Module, dtype: torch.dtype, text: TextEncoders | None = None) -> None:
        super().__init__()
        self.unet, self.dtype, self.text = unet, dtype, text

    def forward(
        self, noisy: Tensor, timesteps: Tensor, text: Tensor, pooled: Tensor | None, sizes: Tensor | None, tokens: Tensor | None = None
    ) -> Tensor:
        """Predictions (B, 2, C, h, w) for both images of each pair, in one batch, of x_t of that shape and what `Conditioning` holds."""
        if self.text is not None:
            if tokens is None:
                raise ValueError("the text encoders are adapted, so the prompts' tokens are needed")
            given = self.text(tokens)
            text, pooled = given.text, given.pooled
        added, images = None, noisy.shape[1]
        if sizes is not None and pooled is not None:
            added = {"text_embeds": _each(pooled, images).to(self.dtype), "time_ids": sizes.flatten(0, 1)}
        flat, t = noisy.flatten(0, 1).to(self.dtype), _each(timesteps, images)
        # the same precision in and out of the loop, for policy and reference: their errors are subtracted
        with torch.autocast(flat.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32):
            return self.unet(flat, t, _each(text, images).to(self.dtype), added_cond_kwargs=added).sample.view(noisy.shape)


def _each(values: Tensor, images: int) -> Tensor:
    """(B, ...) -> (B images, ...), each entry for every image of its pair or group."""
    return values[:, None].expand(len(values), images, *values.shape[1:]).flatten(0, 1)


KEPT = {"mm", "addmm", "bmm", "baddbmm", "linear", "convolution"}
ATTENDS = ("scaled_dot_product", "attention", "flash")  # in the names of attention's operations, xformers' too


def _keep(context: Any, operation: Any, *args: Any, **kwargs: Any) -> Any:
    name = operation.overloadpacket.__name__
    return CheckpointPolicy.MUST_SAVE if name in KEPT or any(part in name for part in ATTENDS) else CheckpointPolicy.PREFER_RECOMPUTE


def _selective(module: nn.Module, *args: Any) -> Any:
    return checkpoint(module, *args, use_reentrant=False, context_fn=partial(create_selective_checkpoint_contexts, _keep))


def _told_sizes(pipe: Any, name: str) -> bool:
    """Whether the UNet is told the images' sizes, as SDXL is."""
    unet = pipe.unet.config
    if unet.addition_embed_type is None:
        return False
    wide = unet.projection_class_embeddings_input_dim
    if unet.addition_embed_type != "text_time" or wide != TIMES * unet.addition_time_embed_dim + pipe.text_encoder_2.config.projection_dim:
        raise UserError(
            f"{name}: its UNet is conditioned on other things than those of SDXL's base model (a refiner?); give the base model"
        )
    return True


def _process(pipe: Any, name: str) -> ForwardProcess:
    """The forward process of the model's training schedule, whatever sampler the folder names.

    Raises:
        UserError: a schedule that is not given by betas, or a prediction that is not supported.
    """
    from diffusers import DDPMScheduler

    known = pipe.scheduler.config
    if not (known.get("beta_schedule") or known.get("trained_betas")) or "prediction_type" not in known or "sigma_data" in known:
        kind = type(pipe.scheduler).__name__
        raise UserError(f"{name}: its {kind} has no schedule of betas (a flow or EDM model?); give a model that was trained with one")
    if pipe.vae.config.get("latents_mean") is not None:
        raise UserError(f"{name}: its latents are shifted by a mean, which is not supported; give a model with the family's own VAE")
    try:
        check_betas(known.get("trained_betas") or [known["beta_start"], known["beta_end"]])
        return ForwardProcess(DDPMScheduler.from_config(known).alphas_cumprod, known["prediction_type"])
    except ValueError as error:
        raise UserError(f"{name}: {error}") from error


def _facts(module: Any) -> dict[str, Any]:
    """What a module's configuration says of its arithmetic."""
    config = module.config if isinstance(module.config, Mapping) else module.config.to_dict()
    idle = ("transformers_version", "dtype", "torch_dtype", "architectures")
    return {name: value for name, value in config.items() if not name.startswith("_") and name not in idle}


def fingerprint(*parts: nn.Module | Mapping[str, Tensor], facts: Any = None) -> str:
    """SHA-256 over names, shapes and values of weights, and what else they are used with: which model this is."""
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode())
    for part in parts:
        for name, value in (part.state_dict() if isinstance(part, nn.Module) else part).items():
            digest.update(json.dumps([name, list(value.shape), str(value.dtype)]).encode())
            digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _difference(start: set[str], live: set[str]) -> str:
    """What of an adapter to go on from is not what is trained, and what to do."""
    never = sorted(name for name in start - live if name.startswith("text_") and not any(f".{layer}." in name for layer in TEXT_ATTENTION))
    last = sorted(name for name in start - live if name.startswith("text_encoder.") and name not in never)
    merge = "merge it into its base (dedpo export FILE --model BASE --format merged --out FOLDER) and give that folder as --model"
    if never:
        place = never[0].partition(".lora_")[0]
        return f"it changes {place}, and of the text encoders attention alone is trained here, so that no setting fits it; {merge}"
    if last and any(name.startswith("text_") for name in live):
        place = last[0].partition(".lora_")[0]
        return f"it changes {place}, a layer of SDXL's first text encoder that is not trained here, so that no setting fits it; {merge}"
    odd = sorted(start ^ live)[0]
    return f"its layers are not those that lora.targets, lora.text_encoders and lora.dora ask for (first difference: {odd})"
