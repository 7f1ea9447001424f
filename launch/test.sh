#!/usr/bin/env bash
# All checks of this project, from a fresh machine: environment, install, format, lint, types, documentation, tests. Can be repeated.
#   ./launch/test.sh            everything except the slow tier
#   ./launch/test.sh --quick    lint, types and tests/unit only
#   ./launch/test.sh ARGS...    pass ARGS to pytest
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
say "documentation: mkdocs"
NO_MKDOCS_2_WARNING=1 mkdocs build --strict --quiet
say "tests: pytest, two processes"
exec python -m pytest -m "not slow" -n 2 --dist loadfile --no-loadscope-reorder ${arguments[@]+"${arguments[@]}"}
