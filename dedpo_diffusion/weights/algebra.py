"""LoRAs from LoRAs, and from weights: another strength, another rank, two in one, the change that a fine-tune made."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dedpo_diffusion.core.console import UserError, track
from dedpo_diffusion.weights.lora import Lora, LoraLayer, factors


@dataclass(frozen=True)
class Loss:
    """What an approximation leaves out, relative to what it approximates: Frobenius norms.

    Attributes:
        relative: over all weights together; 0 is exact, 1 is nothing kept.
        worst: the layer of the largest relative loss, and that loss.
        left_out: tensors that changed and are no matrices (biases, norms), which no LoRA holds.
        left_out_share: their part of the squared norm of the whole change.
    """

    relative: float
    worst: tuple[str, float]
    left_out: int = 0
    left_out_share: float = 0.0


def scaled(lora: Lora, strength: float) -> Lora:
    """The same at another strength: every change is multiplied by it, exactly.

    Raises:
        UserError: a DoRA, whose magnitudes do not scale.
    """
    if strength != 1:
        _refuse_dora(lora, "has no other strength in a file; load it at the strength you want")
    return replace(lora, layers={name: replace(layer, alpha=layer.alpha * strength) for name, layer in lora.layers.items()})


def combined(loras: Sequence[Lora]) -> Lora:
    """One whose change is the sum of theirs, exactly: in each layer the ranks add up. The first one's metadata stay.

    Raises:
        UserError: a DoRA among several, or layers of different shapes, which belong to different models.
    """
    if len(loras) > 1:
        for lora in loras:
            _refuse_dora(
                lora,
                "cannot be added to another LoRA as it is; give --rank, which extracts a plain LoRA of all, or merge them into the model",
            )
    names = dict.fromkeys(name for lora in loras for name in lora.layers)
    layers = {name: _stacked(name, [lora.layers[name] for lora in loras if name in lora.layers]) for name in names}
    return Lora(layers, loras[0].metadata)


def _stacked(name: str, parts: Sequence[LoraLayer]) -> LoraLayer:
    if len(parts) == 1:
        return parts[0]
    first = parts[0]
    for part in parts[1:]:
        if part.down.shape[1:] != first.down.shape[1:] or len(part.up) != len(first.up):
            shapes = f"{tuple(first.delta().shape)} and {tuple(part.delta().shape)}"
            raise UserError(f"{name}: the LoRAs change weights of shapes {shapes}, of different models; give LoRAs of one base")
    down = torch.cat([part.down.float() for part in parts])
    up = torch.cat([part.scale * part.up.float() for part in parts], dim=1)
    return LoraLayer(down, up, alpha=float(len(down)))


def one_alpha(lora: Lora) -> Lora:
    """The same changes with one rank and one alpha in all layers, and none scaled by its square root of r: what every reader takes.

    Readers of the kohya layout take no rslora, diffusers (0.42) takes the alphas of layers that differ for one, diffusers 0.32 takes alpha
    for the rank where ranks differ, and others refuse several ranks.
    """
    lora = one_rank(lora)
    wanted = {name: layer.scale * layer.rank for name, layer in lora.layers.items()}
    counts = sorted(alpha for alpha in wanted.values() if alpha != 0)  # a layer of 0 is 0 at any alpha
    return _with_alpha(lora, max(counts, key=counts.count) if counts else 1.0)


def folded(lora: Lora) -> Lora:
    """The same changes with one rank in all layers and alpha = rank: what a reader computes that knows nothing of alpha."""
    lora = one_rank(lora)
    return _with_alpha(lora, float(max(lora.ranks(), default=1)))


def _with_alpha(lora: Lora, alpha: float) -> Lora:
    """The same changes with this alpha; what it leaves of a layer's scale is worked into up."""
    layers = {}
    for name, layer in lora.layers.items():
        share = layer.scale * layer.rank / alpha
        up = layer.up if share == 1 else (layer.up.float() * share).to(layer.up.dtype)
        layers[name] = replace(layer, up=up, alpha=alpha, rslora=False)
    return replace(lora, layers=layers)


def one_rank(lora: Lora) -> Lora:
    """The same changes with the largest rank in all layers: the others are filled up with zeros."""
    rank = max(lora.ranks(), default=0)
    return replace(lora, layers={name: _filled_up(layer, rank) for name, layer in lora.layers.items()})


def _filled_up(layer: LoraLayer, rank: int) -> LoraLayer:
    missing = rank - layer.rank
    if not missing:
        return layer
    down = torch.cat([layer.down, layer.down.new_zeros(missing, *layer.down.shape[1:])])
    up = torch.cat([layer.up, layer.up.new_zeros(len(layer.up), missing, *layer.up.shape[2:])], dim=1)
    return replace(layer, down=down, up=up, alpha=layer.scale * rank, rslora=False)


def resized(lora: Lora, rank: int) -> tuple[Lora, Loss]:
    """The best one of another rank in every layer: fewer directions by SVD, more by zeros (exact).

    Raises:
        UserError: a rank below 1, or a DoRA.
    """
    _check_rank(rank)
    _refuse_dora(lora, "keeps the rank it was trained with; leave --rank out")
    layers, counter = {}, _LossCounter()
    for name, layer in track(lora.layers.items(), "changing the rank", len(lora.layers)):
        layers[name], kept = _resize(layer, rank)
        counter.add(name, layer.delta(), kept)
    return replace(lora, layers=layers), counter.loss()


def _resize(layer: LoraLayer, rank: int) -> tuple[LoraLayer, Tensor]:
    """The layer at this rank, and its change."""
    up, down = layer.up.double().flatten(1), layer.down.double().flatten(1)
    (left, small), (right, other) = torch.linalg.qr(up), torch.linalg.qr(down.T)  # the SVD of B A through its r x r core
    a, b = factors(layer.scale * small @ other.T, rank)
    a, b = (a.double() @ right.T).float(), (left @ b.double()).float()
    missing = rank - len(a)
    if missing > 0:
        a, b = torch.cat([a, a.new_zeros(missing, a.shape[1])]), torch.cat([b, b.new_zeros(len(b), missing)], dim=1)
    ends = [1] * (layer.up.ndim - 2)
    found = LoraLayer(a.view(rank, *layer.down.shape[1:]), b.view(len(b), rank, *ends), alpha=float(rank))
    return found, found.delta()


def extracted(before: Mapping[str, Tensor], after: Mapping[str, Tensor], rank: int, *, part: str = "unet") -> tuple[Lora, Loss]:
    """The LoRA that comes closest to what a fine-tune of all weights did, by SVD of every matrix's change.

    Args:
        before, after: state dictionaries of the same module, before and after.
        rank: at most; a layer whose weight has fewer rows or columns takes as many as it has.
        part: what the module is called in a pipeline; "" where the names say it.

    Raises:
        UserError: a rank below 1, or state dictionaries of different modules.
    """
    _check_rank(rank)
    odd = sorted(set(before) ^ set(after))
    layers, counter = {}, _LossCounter()
    for name, old in track(before.items(), "extracting a LoRA", len(before)):
        new = after[name] if not odd else None  # read once: it may lie in a file
        if new is None or new.shape != old.shape:
            first = odd[0] if odd else name
            raise UserError(f"{first}: the two models do not have the same weights, so no LoRA leads from one to the other")
        change = new.float() - old.float()
        if not change.any():
            continue
        module, _, kind = name.rpartition(".")
        if kind != "weight" or change.ndim < 2:
            counter.leave_out(change)
            continue
        matrix = change.flatten(1)
        down, up = factors(matrix, min(rank, *matrix.shape))
        ends = [1] * (change.ndim - 2)
        layer = LoraLayer(down.view(len(down), *change.shape[1:]), up.view(*up.shape, *ends), alpha=float(len(down)))
        where = f"{part}.{module}" if part else module
        layers[where] = layer
        counter.add(where, change, layer.delta())
    if not layers:
        raise UserError("the two models are the same, so there is no LoRA between them")
    return Lora(layers), counter.loss()


class _LossCounter:
    """Squared norms of changes, and of what approximations miss of them."""

    def __init__(self) -> None:
        self.whole = self.missed = self.outside = 0.0
        self.count = 0
        self.worst = ("", -1.0)

    def add(self, name: str, change: Tensor, kept: Tensor) -> None:
        whole, missed = float(change.double().square().sum()), float((change - kept).double().square().sum())
        self.whole, self.missed = self.whole + whole, self.missed + missed
        share = math.sqrt(missed / whole) if whole else 0.0
        if share > self.worst[1]:
            self.worst = (name, share)

    def leave_out(self, change: Tensor) -> None:
        self.outside += float(change.double().square().sum())
        self.count += 1

    def loss(self) -> Loss:
        whole = self.whole + self.outside
        relative = math.sqrt((self.missed + self.outside) / whole) if whole else 0.0
        return Loss(relative, self.worst, self.count, self.outside / whole if whole else 0.0)


def _check_rank(rank: int) -> None:
    if rank < 1:
        raise UserError(f"--rank is {rank}; it must be at least 1")


def _refuse_dora(lora: Lora, what: str) -> None:
    found = next((name for name, layer in lora.layers.items() if layer.magnitude is not None), None)
    if found is not None:
        raise UserError(f"{found}: a DoRA {what}")
