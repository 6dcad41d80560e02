"""How a model is spread over processes: one file an engine, and one choice among them."""
