#!/usr/bin/env bash
# Everything that checks this project, on a fresh machine: environment, install, lint, types, tests. Can be run again.
#   ./launch/test.sh            all but the slow tier
#   ./launch/test.sh --quick    lint, types and tests/unit only
#   ./launch/test.sh ARGS...    ARGS go to pytest
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

arguments=()
for argument in "$@"; do
    if [ "$argument" = --quick ]; then arguments+=(tests/unit); else arguments+=("$argument"); fi
done

set_up dev
cd "$ROOT"
say "format: ruff"
ruff format --check .
say "lint: ruff"
ruff check .
say "types: mypy"
mypy
say "tests: pytest, two processes"
exec python -m pytest -m "not slow" -n 2 --dist loadfile --no-loadscope-reorder ${arguments[@]+"${arguments[@]}"}
