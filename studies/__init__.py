"""Studies that use refinelib: the first attempt, extra losses, the results notebook."""
