#!/bin/sh
# OpenSSF's model_signing in a virtual environment of its own, for tests/integration/test_release_model_signing.py:
#   sh tests/integration/get_model_signing.sh /tmp/model-signing
#   FEDPEFT_MODEL_SIGNING=/tmp/model-signing/bin/model_signing make test-interop
# Version 1.1.1 imports OpenSSL, which nothing that it requires brings any more.
set -eu
python3 -m venv "$1"
"$1/bin/pip" install --quiet --disable-pip-version-check model-signing==1.1.1 pyOpenSSL
"$1/bin/model_signing" --version
