"""The network, its refinements and losses: pure tensor code, without settings, files or prints."""
