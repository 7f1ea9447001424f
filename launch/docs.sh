#!/usr/bin/env bash
# Build the documentation site into site/; a broken link or a missing page is an error.
#   ./launch/docs.sh           build
#   ./launch/docs.sh serve     build, serve on this machine, and build again when a file changes
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

set_up dev
cd "$ROOT"
if [ "${1:-}" = serve ]; then export NO_MKDOCS_2_WARNING=1; exec mkdocs serve; fi
NO_MKDOCS_2_WARNING=1 mkdocs build --strict --quiet
say "written: $ROOT/site/index.html"
