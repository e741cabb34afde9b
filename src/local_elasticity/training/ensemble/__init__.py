"""Many replicas of a network, trained in lock step: log, order of samples, looks, training."""
