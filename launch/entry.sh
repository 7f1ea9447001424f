#!/usr/bin/env bash
# Entry point of the image: checks that Ray requires a token, sets the defaults of a machine without GPUs, and replaces
# itself by the given command (ray start ..., dist-ft train ...), so that the command receives the container's signals.
set -euo pipefail

if [ "${RAY_AUTH_MODE:-}" != token ]; then
    echo "error: RAY_AUTH_MODE=${RAY_AUTH_MODE:-}: anyone who reaches this cluster could run code on it. Set RAY_AUTH_MODE=token." >&2
    exit 2
fi
if [ "${1:-}" = ray ] && [ "${2:-}" = start ] && [ -z "${RAY_AUTH_TOKEN:-}" ] && [ ! -s "${RAY_AUTH_TOKEN_PATH:-$HOME/.ray/auth_token}" ]; then
    echo "error: no token. Mount a file with one and set RAY_AUTH_TOKEN_PATH (python -c 'import secrets; print(secrets.token_hex(32))')" >&2
    exit 2
fi
if [ ! -e /dev/nvidiactl ]; then
    export DS_ACCELERATOR="${DS_ACCELERATOR:-cpu}" OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
fi
exec "$@"
