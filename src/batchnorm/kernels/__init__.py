"""Who computes: one file for each family of arrays, chosen by `registry`."""
