"""The application that the commands belong to."""

from __future__ import annotations

from cyclopts import App
from rich.console import Console

from local_elasticity.base import interrupts


class _Terminal(Console):
    """A console that ends quietly where its reader has gone (``| head``)."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        interrupts.end_quietly()


console = _Terminal(highlight=False, soft_wrap=True)
app = App(
    console=console,
    suppress_keyboard_interrupt=False,
    name="local-elasticity",
    help="When one update is taken at x, how much does the prediction at x' move?",
    version_flags=["--version"],
)
