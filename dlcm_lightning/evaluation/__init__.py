"""What a trained model can do, measured: above `inference` and `export`, without `training`."""
