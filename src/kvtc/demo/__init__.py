"""The demo: a conversation of the reference model is put away and taken up again, and everything it costs is printed."""

from .run import run_demo

__all__ = ["run_demo"]
