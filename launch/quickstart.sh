#!/usr/bin/env bash
# From a fresh machine to a fully fine-tuned language model: environment, install, main job. Can be repeated.
#   ./launch/quickstart.sh [arguments of launch/quickstart.py]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

set_up quickstart
say "main job: two Ray workers fully fine-tune SmolLM2-135M under ZeRO-3"
cd "$ROOT"
exec python launch/quickstart.py "$@"
