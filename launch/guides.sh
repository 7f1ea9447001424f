#!/usr/bin/env bash
# The guides: each is one command that trains and scores real small models on real data, in the plain engine and again
# on two DeepSpeed workers, and compares the tables. Without a name: says which there are. Can be run again.
#   ./launch/guides.sh additive [--engine plain|zero2|zero3|both] [--data FOLDER] [--out FOLDER]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

set_up guides
cd "$ROOT"
exec python launch/guides/run.py "$@"
