"""The demo: the cache of a conversation is stored and restored, and everything that this costs is
printed.
"""

from .run import run_demo

__all__ = ["run_demo"]
