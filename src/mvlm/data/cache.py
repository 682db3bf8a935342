"""The folder of everything that is made or fetched once."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """Where everything made once is kept: $MVLM_CACHE, or `cache/` in the working directory."""
    return Path(os.environ.get("MVLM_CACHE") or "cache")
