"""Pretraining of Dynamic Large Concept Models (arXiv 2512.24617) with PyTorch Lightning."""

__version__ = "0.1.0"
