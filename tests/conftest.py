"""What the tests share: a random Stable Diffusion of the real file format, small enough to build in a second."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from dedpo_diffusion.models import tiny
from support.pictures import build_tiny_model, write_pairs

# tiny tensors are faster on one thread, and so are the commands that the tests start
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def own_caches(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Nothing of a test belongs into the cache of whoever runs it."""
    os.environ["DEDPO_CACHE"] = str(tmp_path_factory.mktemp("caches"))


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A diffusers folder of every architecture, by its kind."""
    root = tmp_path_factory.mktemp("bases")
    return {kind: tiny.build(root / kind, kind) for kind in tiny.KINDS}


@pytest.fixture(scope="session")
def tiny_pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("pairs") / "data")
