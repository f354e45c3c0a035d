"""What a forked child does, told to the parent."""

import os
import select
import signal
import traceback
import warnings


def in_forked_child(call, seconds=30):
    """`repr` of what `call()` returns in a child, or the traceback of what it raises; an AssertionError where the child hangs."""
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # that other threads live here is what is tested
        child = os.fork()
    if child == 0:
        try:
            try:
                text = repr(call())
            except BaseException:  # noqa: BLE001  whatever it is, the parent is told
                text = traceback.format_exc()
            os.write(writing, text.encode()[:60_000])
        finally:
            os._exit(0)
    os.close(writing)
    try:
        assert select.select([reading], [], [], seconds)[0], f"the child has not answered within {seconds} seconds"
        return os.read(reading, 65_536).decode()
    finally:
        os.close(reading)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
