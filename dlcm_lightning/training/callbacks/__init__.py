"""What watches a run: metrics, progress, validation, boundaries one can see, checkpoints."""
