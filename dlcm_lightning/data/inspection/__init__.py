"""What sources hold, what a run will read of them, and what it has read: `dlcm data verify, inspect, audit`."""
