"""LMCache's command line with kvtc's serde known to it: `python -m kvtc.integrations.lmcache_server server ..`."""

from __future__ import annotations

import sys

from lmcache.cli.main import main

from . import lmcache_serde  # noqa: F401  importing it registers the serde

if __name__ == "__main__":
    sys.exit(main())
