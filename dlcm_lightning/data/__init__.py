"""From text to `Batch`: tokenizer, shards, mixture, rows. Knows nothing of models or of training."""
