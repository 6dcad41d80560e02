"""`dlcm ladder fit`: the compression-aware scaling law of section 6.2, fitted to a ladder of runs.

`formula` evaluates a fitted law with the standard library alone. Everything else here needs the extra `scaling`: SciPy,
pandas and matplotlib.
"""
