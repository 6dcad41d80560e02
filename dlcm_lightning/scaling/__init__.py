"""What a run would need, from its configuration alone: memory, time, space. No torch."""
