"""Gradient norms by module: written while training, read back by the notebooks."""
