"""Every figure, drawn from run folders."""
