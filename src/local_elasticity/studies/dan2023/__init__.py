"""Studies of Dan, Mukherjee, Das, Gampa (arXiv:2111.01166)."""
