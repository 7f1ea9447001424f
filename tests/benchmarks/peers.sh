#!/usr/bin/env bash
# Create a separate environment for the peers of the benchmarks, in tests/benchmarks/.peers.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
[ -x .peers/bin/python ] || "${PYTHON:-python3}" -m venv .peers
torch="$(grep -m1 '^torch==' ../../constraints.txt)"
.peers/bin/python -m pip install -q --disable-pip-version-check "$torch"
printf '%s\n' "$torch" >.peers/constraints.txt
.peers/bin/python -m pip install -q --disable-pip-version-check -c .peers/constraints.txt \
    "mosaicml-streaming>=0.12" "litdata>=0.2.40" "webdataset>=0.2.100" "datasets>=5,<6" "trl>=0.20" s3fs
# MosaicML Streaming installs torchvision for its image datasets, built for another torch. transformers
# (used by TRL) fails to import with it.
.peers/bin/python -m pip uninstall -q -y torchvision
