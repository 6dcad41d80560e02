"""Texts into shards: `dlcm tokenize`, `dlcm data merge`, and the sample corpus."""
