"""The command line, thin: it reads words, calls the library, and says where the result is."""

from local_elasticity.cli.app import app, console
from local_elasticity.cli.entry import main

__all__ = ["app", "console", "main"]
