"""What a run would need, from its configuration alone; which run a budget pays for; laws of many runs. No torch."""
