"""Tensor functions without parameters: what the four stages are made of."""
