"""A progress bar where somebody watches, a line now and then elsewhere."""

from __future__ import annotations

import os
import sys
import time

from tqdm import tqdm


def interactive() -> bool:
    """Whether somebody watches: a terminal, or a kernel that a Jupyter server started (papermill and nbval start theirs without)."""
    return sys.stderr.isatty() or ("ipykernel" in sys.modules and "JPY_SESSION_NAME" in os.environ)


class Progress:
    """Counts up to ``total``; used as a context.

    Args:
        total: what 100 % is.
        title: what is going on.
        unit: plural noun of what is counted.
        show: False: count in silence.
        every: seconds between lines where nobody watches.
        done: where counting starts.
    """

    def __init__(self, total: int, title: str, unit: str, *, show: bool = True, every: float = 10.0, done: int = 0) -> None:
        self.total, self.title, self.unit, self.show, self.every = total, title, unit, show, every
        self.done, self._first, self._started = done, done, time.monotonic()
        self._told = self._started
        # A text bar rather than a widget: a headless notebook keeps no widget state.
        live = show and interactive()
        self._bar = None
        if live:
            # In a notebook, what goes to stderr is red, and what follows it on stdout tears the bar apart.
            stream = sys.stdout if "ipykernel" in sys.modules else sys.stderr
            self._bar = tqdm(file=stream, total=total, initial=done, desc=title, unit=f" {unit}", mininterval=0.5, dynamic_ncols=True)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def reach(self, done: int) -> None:
        """Counting stands at ``done``; it may go back."""
        self.add(done - self.done)

    def add(self, count: int) -> None:
        self.done += count
        if self._bar is not None:
            self._bar.update(count)
        elif self.show and time.monotonic() - self._told >= self.every:
            self._told = time.monotonic()
            rate = (self.done - self._first) / (self._told - self._started)
            left = (self.total - self.done) / rate
            done = f"{self.done} of {self.total} {self.unit}"
            print(f"{self.title} {done}, {rate:.0f} a second, {left:.0f} s left", flush=True)

    def note(self, line: str) -> None:
        """Print a line, above the bar where there is one."""
        if self._bar is not None:
            self._bar.write(line)
        elif self.show:
            print(line, flush=True)
        self._told = time.monotonic()
