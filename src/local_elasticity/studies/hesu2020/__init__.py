"""Studies of He and Su (arXiv:1910.06943)."""
