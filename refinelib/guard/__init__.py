"""Safe steps for any PyTorch model and loop: guard, rewind, monitor, diagnose, faults on demand."""
