"""From a run to a model that stands alone. Knows neither Lightning nor DeepSpeed."""
