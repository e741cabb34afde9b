"""The locally elastic SDE: the model, and its estimation from real training."""
