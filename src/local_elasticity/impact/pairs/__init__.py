"""Products of per-sample gradients for all pairs: capture, a rule a layer, products, the sweep."""
