"""Local data: where a client's rows come from, how they are split, and the named assets.

Importing this package is light: pyarrow, datasets and flwr-datasets are loaded by the source that needs them.
"""

from federated.data.assets import ASSETS, Asset, asset_path, cache_dir, fetch, is_fetched
from federated.data.source import ClientData, Row, Source, check_source
from federated.data.sources import open_source

__all__ = [
    "ASSETS",
    "Asset",
    "ClientData",
    "Row",
    "Source",
    "asset_path",
    "cache_dir",
    "check_source",
    "fetch",
    "is_fetched",
    "open_source",
]
