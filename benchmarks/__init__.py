"""Measurements, one table each, with their raw results in `results/`. Not tests: nothing here asserts a time."""
