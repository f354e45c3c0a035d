"""LMCache's command line with kvtc's serde known to it: `python -m kvtc.engines.lmcache.server
server ..`."""

from __future__ import annotations

import sys

from lmcache.cli.main import main

from . import serde as lmcache_serde  # noqa: F401  importing it registers the serde

if __name__ == "__main__":
    sys.exit(main())
