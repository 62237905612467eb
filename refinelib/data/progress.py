"""A progress bar in a terminal or notebook, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time

from tqdm import tqdm


class Progress:
    """Counts up to ``total``; used as a context.

    Args:
        total: what 100 % is.
        title: what is going on.
        unit: plural noun of what is counted.
        show: False: count in silence.
        every: seconds between lines where there is no terminal.
    """

    def __init__(self, total: int, title: str, unit: str, show: bool = True, every: float = 10.0) -> None:
        self.total, self.title, self.unit, self.show, self.every = total, title, unit, show, every
        self.done, self._started = 0, time.monotonic()
        self._told = self._started
        # A text bar rather than a widget: a headless notebook keeps no widget state.
        live = show and (sys.stderr.isatty() or "ipykernel" in sys.modules)
        self._bar = None
        if live:
            self._bar = tqdm(total=total, desc=title, unit=f" {unit}", mininterval=0.5, dynamic_ncols=True)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def add(self, count: int) -> None:
        self.done += count
        if self._bar is not None:
            self._bar.update(count)
        elif self.show and time.monotonic() - self._told >= self.every:
            self._told = time.monotonic()
            rate = self.done / (self._told - self._started)
            left = (self.total - self.done) / rate
            done = f"{self.done} of {self.total} {self.unit}"
            print(f"{self.title} {done}, {rate:.0f} a second, {left:.0f} s left", flush=True)
