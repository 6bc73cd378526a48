"""What wandb keeps offline for `wandb sync`: its own messages, framed as LevelDB frames a log; wandb reads them in Go alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

BLOCK, HEAD = 32768, 7  # bytes of a block; of the file's mark and of a fragment's head


def records(file: Path) -> Iterator[Any]:
    """The records of a `.wandb` file, in order."""
    from wandb.proto import wandb_internal_pb2

    data, place, held = file.read_bytes(), HEAD, b""
    assert data[:4] == b":W&B"
    while place + HEAD <= len(data):
        if BLOCK - place % BLOCK < HEAD:  # the rest of a block is empty
            place += BLOCK - place % BLOCK
            continue
        size, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        held += data[place + HEAD : place + HEAD + size]
        place += HEAD + size
        if kind in (1, 4):  # a whole one, or the last part of one
            record = wandb_internal_pb2.Record()
            record.ParseFromString(held)
            yield record
            held = b""
