"""Studies that stand on refinelib: the first attempt taken apart, the tables and figures of the results notebook."""
