"""Ctrl-C, SIGTERM and SIGHUP between two steps, never within one."""

from __future__ import annotations

import signal
import threading
from typing import Any

_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


class Interruption:
    """Turns Ctrl-C, SIGTERM and SIGHUP (a terminal that was closed) into an orderly end.

    Before the training loop they raise ``KeyboardInterrupt`` at once. In the loop (``deferred``) they are a request that it
    honours between two steps: in the middle of a step half of the parameters may be updated, and a checkpoint made
    then would be of a state that never was. The same signal a second time stops at once. A signal that was ignored
    (``nohup``) stays ignored.
    """

    def __enter__(self) -> "Interruption":
        self.requested = self.deferred = False
        self._seen: set[int] = set()
        self._previous = {}
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._previous[number] = signal.signal(number, self._request)
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _request(self, number: int, frame: Any) -> None:
        if number in self._seen or not self.deferred:
            raise KeyboardInterrupt
        self._seen.add(number)
        self.requested = True
