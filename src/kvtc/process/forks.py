"""What a child process does first after `os.fork`: objects with locks, threads or connections make themselves new ones.

A lock that another thread held at the moment of the fork stays locked in the child for ever, and threads are not there at all.
"""

from __future__ import annotations

import itertools
import os
import sys
import weakref
from collections.abc import Callable
from types import MethodType
from typing import Any

_renewals: dict[int, tuple[weakref.ref[Any], Callable[[Any], Any]]] = {}
_numbers = itertools.count()


def in_child(renew: Callable[[], Any]) -> None:
    """Call this bound method in every forked child, as long as its object lives; objects that are older are renewed first.

    The method finds the child with one thread, and with whatever state the parent's other threads left half-changed. It must not
    take a lock that it has not just made, and starts no thread.
    """
    if not isinstance(renew, MethodType):
        raise TypeError(f"{renew!r} is no bound method")
    number, forget = next(_numbers), _renewals.pop
    _renewals[number] = weakref.ref(renew.__self__, lambda _: forget(number, None)), renew.__func__


class _Inheritance:
    """What a forked child has of its parent that does not work there."""

    torch_threads = False
    """PyTorch was loaded in the parent: its threads did not come along, and it would wait for them for ever."""


inheritance = _Inheritance()


def _renew_all() -> None:
    inheritance.torch_threads = "torch" in sys.modules
    for reference, function in list(_renewals.values()):
        owner = reference()
        if owner is not None:
            function(owner)


if hasattr(os, "register_at_fork"):  # where there is no fork, there is nothing to do
    os.register_at_fork(after_in_child=_renew_all)
