"""Studies of Wang, Zhang, Su (arXiv:2110.05960), and the trainings that they share."""
