"""Ctrl-C and SIGTERM between two steps, never within one."""

from __future__ import annotations

import signal
import threading
from typing import Any


class Interruption:
    """Turns Ctrl-C and SIGTERM into a request that the loop honours between two steps.

    In the middle of a step half of the parameters may be updated; a checkpoint made then would be
    of a state that never was. A second Ctrl-C stops at once.
    """

    def __enter__(self) -> "Interruption":
        self.requested = False
        self._previous = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._request)
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _request(self, number: int, frame: Any) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
