"""``python -m local_elasticity.cli``."""

from local_elasticity.cli import main

main()
