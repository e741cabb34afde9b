"""Runs the ```python blocks of README.md and docs/ as tests, each page in a folder of its own. Nothing is timed."""

import os
import tempfile
from pathlib import Path

from hypothesis import settings
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser, SkipParser

settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


def _enter_temporary_folder(namespace: dict) -> None:
    namespace["_folder"] = tempfile.TemporaryDirectory()
    namespace["_came_from"] = Path.cwd()
    os.chdir(namespace["_folder"].name)


def _leave_temporary_folder(namespace: dict) -> None:
    os.chdir(namespace["_came_from"])
    namespace["_folder"].cleanup()


pytest_collect_file = Sybil(
    parsers=[PythonCodeBlockParser(), SkipParser()],
    patterns=["README.md", "docs/*.md"],
    setup=_enter_temporary_folder,
    teardown=_leave_temporary_folder,
).pytest()
