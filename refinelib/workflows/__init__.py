"""What the notebooks stand on: checks, phases, comparison, widgets."""
