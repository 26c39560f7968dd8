"""The TUF project's conformance suite against this library's client; docs/release.md says how to get it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

SUITE = os.environ.get("FEDPEFT_TUF_CONFORMANCE", "")
CLIENT = Path(__file__).with_name("tuf_client.py")
ROOT = CLIENT.parents[2]
REFUSED = ("test_download_with_hash_algorithms[hashes1]",)
"""What fails on purpose: a file whose only signed hash is SHA-512."""


@pytest.mark.interop
@pytest.mark.timeout(3600)
@pytest.mark.skipif(not SUITE, reason="FEDPEFT_TUF_CONFORMANCE names no checkout of theupdateframework/tuf-conformance")
@pytest.mark.skipif(shutil.which("faketime") is None, reason="faketime (of Debian) is not installed")
def test_the_suite_passes_but_for_what_is_refused_on_purpose(tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    command = [sys.executable, "-m", "pytest", "tuf_conformance", "-q", "-p", "no:cacheprovider", "-o", "addopts="]
    options = ["--entrypoint", f"{sys.executable} {CLIENT}", f"--junitxml={report}"]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([*command, *options], cwd=SUITE, env=env, capture_output=True, text=True, check=False)
    cases = list(ET.parse(report).iter("testcase"))  # noqa: S314 - our own process wrote it
    failed = [case.get("name") for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skipped = [case.get("name") for case in cases if case.find("skipped") is not None]
    print(f"tuf-conformance: {len(cases) - len(failed) - len(skipped)} of {len(cases)} passed")
    assert (set(failed), skipped) == (set(REFUSED), []), done.stdout[-4000:]
    assert len(cases) >= 113
