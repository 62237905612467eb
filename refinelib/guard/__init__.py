"""Safe steps for any PyTorch model and loop: guard, rewind, monitor, diagnose, faults on demand."""

from refinelib.guard.diagnose import diagnose
from refinelib.guard.guard import Guard
from refinelib.guard.rewind import DivergedError, Rewinder

__all__ = ["DivergedError", "Guard", "Rewinder", "diagnose"]
