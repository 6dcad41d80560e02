"""Tasks of lm-eval: `dlcm evaluate --tasks`."""
