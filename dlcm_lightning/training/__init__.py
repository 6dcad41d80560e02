"""Training: the only folder that knows Lightning."""
