"""Where the command line prints for people."""

from __future__ import annotations

from rich.console import Console

WIDTH_WITHOUT_TERMINAL = 140
"""In a file or a pipe nobody's window limits a table."""


def make_console(*, stderr: bool = False) -> Console:
    """A console of the terminal's width."""
    console = Console(stderr=stderr)
    return console if console.is_terminal else Console(stderr=stderr, width=WIDTH_WITHOUT_TERMINAL)
