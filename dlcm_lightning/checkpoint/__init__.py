"""What a checkpoint is on disk: folders that are whole or not there, and tensors by name. Knows no engine."""
