"""Gradient norms: written while a run trains, read back, and what they say of an instability."""
