"""A polite end: SIGTERM lets a loop finish its step, save and leave."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

PATIENCE = 5.0


class Terminated(Exception):
    """The process was asked to end, and what it had done is saved."""


class StopSignal:
    """Within it, SIGTERM is noted in `asked`; one that comes PATIENCE seconds later ends the process at once.

    A launcher passes on a signal that its whole group was sent, so two in a row are one. Outside the main thread nothing is noted.
    """

    def __init__(self) -> None:
        self.asked = False
        self._before: Any = None
        self._first = 0.0

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._note)
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.asked and now - self._first > PATIENCE:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGTERM)
        if not self.asked:
            self.asked, self._first = True, now

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)
