"""`dlcm analyze`: what a trained model does with texts, as one page, one JSON file and TensorBoard events."""

from dlcm_lightning.evaluation.analysis.report import analyze

__all__ = ["analyze"]
