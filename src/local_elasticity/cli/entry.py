"""How a command is run, interrupted and refused."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from cyclopts import CycloptsError

from local_elasticity.base import interrupts
from local_elasticity.base.errors import InputError
from local_elasticity.base.files import DISK, refusal_of
from local_elasticity.cli import bench, data, estimate, measure, report, reproduce, simulate, track, train
from local_elasticity.cli.app import app

CONTINUED = {  # commands that go on where they stopped, and where that is
    "track": "from the last snapshot",
    "train": "from the last checkpoint",
    "reproduce": "with what is not yet done",
}
UNWRITTEN = ("measure",)  # commands that write at the very end


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command.

    Exit status 0, 1 (a claim failed), 2 (bad input, one clear line), 130 or 143 (SIGINT or SIGTERM, one line that says
    how to go on), or 141 (nobody reads the output any more).
    """
    words = [*(sys.argv[1:] if arguments is None else arguments)]
    with interrupts.ending(f"local-elasticity: {_after_interrupt(words)}"):
        try:
            status = app(words, exit_on_error=False, print_error=False)
        except InputError as error:
            _refuse(str(error))
        except CycloptsError as error:
            ours = error.__cause__ or error.__context__
            _refuse(str(ours) if isinstance(ours, InputError) else " ".join(str(error).split()) + "; see --help")
        except OSError as error:
            if error.filename is None and error.errno not in DISK:  # not of a file
                raise
            _refuse(str(refusal_of(error)))
        else:
            sys.stdout.flush()
            sys.exit(status if isinstance(status, int) else 0)


def _after_interrupt(words: Sequence[str]) -> str:
    """How to go on with a command that was interrupted."""
    command = words[0] if words else ""
    if command not in CONTINUED:
        return (
            "interrupted; nothing was written" if command in UNWRITTEN else "interrupted; the same command starts over"
        )
    same = "the same command without --overwrite" if "--overwrite" in words else "the same command"
    return f"interrupted; {same} continues {CONTINUED[command]}"


def _refuse(line: str, status: int = 2) -> None:
    print(f"local-elasticity: {line}", file=sys.stderr)
    sys.exit(status)


COMMANDS = (bench, data, estimate, measure, report, reproduce, simulate, track, train)  # each adds itself to the app
