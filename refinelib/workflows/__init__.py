"""What the notebooks stand on: checks, phases, comparison, prediction files, batches."""
