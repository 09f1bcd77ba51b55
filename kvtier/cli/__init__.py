"""The command line. Commands are loaded when they are called, so that ``kvtier --help`` is quick and needs no torch."""

from kvtier.cli.app import main

__all__ = ["main"]
