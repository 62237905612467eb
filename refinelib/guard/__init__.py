"""What keeps a run alive and says what went wrong: guard, recovery, incidents, gradients read back, faults on demand."""
