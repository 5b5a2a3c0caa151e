"""The command line: one file per verb, each of which parses, calls the function of the same name, and prints."""

from squall.cli.app import main

__all__ = ["main"]
