"""The command line. Each command is one file, loaded only when it is called, so that `vlm-edge run` never sees torch."""

from .main import main

__all__ = ["main"]
