#!/usr/bin/env bash
# What a container of the image runs: checks that Ray will ask for a token, sets what a machine without GPUs wants, and
# becomes the command it was given (ray start ..., dist-ft train ...), which so gets the container's signals itself.
set -euo pipefail

if [ "${RAY_AUTH_MODE:-}" != token ]; then
    echo "error: RAY_AUTH_MODE=${RAY_AUTH_MODE:-}: whoever reaches this cluster could run code on it; set it to token" >&2
    exit 2
fi
if [ "${1:-}" = ray ] && [ "${2:-}" = start ] && [ -z "${RAY_AUTH_TOKEN:-}" ] && [ ! -s "${RAY_AUTH_TOKEN_PATH:-$HOME/.ray/auth_token}" ]; then
    echo "error: no token: mount one and name it in RAY_AUTH_TOKEN_PATH (python -c 'import secrets; print(secrets.token_hex(32))')" >&2
    exit 2
fi
if [ ! -e /dev/nvidiactl ]; then
    export DS_ACCELERATOR="${DS_ACCELERATOR:-cpu}" OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
fi
exec "$@"
