"""Estimating the rates of the LE-SDE from recordings of training."""
