"""The command line."""

from danceopd.cli.parser import main

__all__ = ["main"]
