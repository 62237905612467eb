"""What keeps a run alive and says what went wrong: guard, recovery, incidents, faults on demand."""
