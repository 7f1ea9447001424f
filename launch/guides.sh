#!/usr/bin/env bash
# Run a guide: train and score small real models on real data, with the plain engine and again on two DeepSpeed
# workers, and compare the tables. Without a name: list the guides. Can be repeated.
#   ./launch/guides.sh additive [--engine plain|zero2|zero3|both] [--data FOLDER] [--out FOLDER]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

set_up guides
cd "$ROOT"
exec python launch/guides/run.py "$@"
