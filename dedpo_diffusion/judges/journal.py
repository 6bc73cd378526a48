"""What a server answered, kept answer by answer, so that no stop makes anyone pay twice.

A shard's journal is a file of JSON lines beside its parts. Each line is written out at once: what a killed process had
received is there for the next one, and a line that was cut off is asked for again.
"""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from dedpo_diffusion.core.files import atomic_file

Key = tuple[str, int, int]  # the pair, the order of its images, and which of several samples


@dataclass(frozen=True)
class Reading:
    """One reply, as far as it matters.

    `logit` and `validity` where token probabilities were read, else `word`: FIRST, SECOND or "". `refused` says why there is no
    answer; `said` is an excerpt of an answer that could not be read; tokens are those that were paid for.
    """

    logit: float = math.nan
    validity: float = math.nan
    word: str = ""
    refused: str = ""
    said: str = ""
    prompt_tokens: int = 0
    answer_tokens: int = 0


class Journal:
    """The readings of one shard. Threads may share it; processes hold the shard's lock.

    Args:
        path: the file; None keeps nothing beyond this process.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path, self.lock, self.whole = path, threading.Lock(), True
        self.held: dict[Key, Reading] = dict(self._read()) if path is not None and path.is_file() else {}

    def _read(self) -> Iterator[tuple[Key, Reading]]:
        assert self.path is not None
        data = self.path.read_bytes()
        self.whole = not data or data.endswith(b"\n")
        for line in data.splitlines():
            try:
                row = json.loads(line)
                yield (row.pop("pair_id"), row.pop("order"), row.pop("sample")), Reading(**row)
            except (ValueError, TypeError, KeyError, AttributeError):
                continue  # cut off by a kill

    def get(self, key: Key) -> Reading | None:
        """What was answered, if anything was."""
        return self.held.get(key)

    def put(self, key: Key, reading: Reading) -> None:
        """Keep an answer, now."""
        with self.lock:
            self.held[key] = reading
            if self.path is None:
                return
            line = _line(key, reading)
            with open(self.path, "ab") as file:  # in one write, which a kill does not cut in the middle of two
                file.write(line if self.whole else b"\n" + line)
            self.whole = True

    def settle(self, failed: Collection[str] = ()) -> None:
        """Once the shard is kept as a whole, its tokens with it: what is still of use are the answers in one order of pairs that failed
        in the other."""
        self.held = {key: replace(held, prompt_tokens=0, answer_tokens=0) for key, held in self.held.items() if key[0] in failed}
        if self.path is None:
            return
        if not self.held:
            self.path.unlink(missing_ok=True)
            return
        with atomic_file(self.path) as temporary:
            temporary.write_bytes(b"".join(_line(key, reading) for key, reading in self.held.items()))
        self.whole = True


def _line(key: Key, reading: Reading) -> bytes:
    return json.dumps({"pair_id": key[0], "order": key[1], "sample": key[2], **asdict(reading)}).encode() + b"\n"
