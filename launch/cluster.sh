#!/usr/bin/env bash
# A Ray cluster on this machine for trying things: a head without CPUs, one worker node, token authentication.
#   ./launch/cluster.sh start           start it (or report that it runs), with one CPU for each core
#   eval "$(./launch/cluster.sh env)"   set its address and token in this shell
#   ./launch/cluster.sh stop            stop the two processes it started and their children, and no other Ray
# The dashboard and job server listen on loopback only. Ray's own ports (GCS, raylets) listen on this machine's address
# and require the token. The folder (DIST_FT_CLUSTER, default /tmp/dist-ft-cluster-UID) is readable by its owner only. It
# holds the token, the pids and the logs. DIST_FT_CLUSTER_PORT: first of three ports (default 8265: dashboard and job
# server, then agent and GCS). DIST_FT_CLUSTER_CPUS: CPUs of the worker node.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

FOLDER="${DIST_FT_CLUSTER:-/tmp/dist-ft-cluster-$(id -u)}"
PORT="${DIST_FT_CLUSTER_PORT:-8265}"
AGENT_PORT=$((PORT + 1)) GCS_PORT=$((PORT + 2))
OBJECT_STORE_BYTES=134217728

# running NAME: whether the process started as NAME still runs (its pid may have been reused).
running() {
    local pid started
    [ -f "$FOLDER/$1.pid" ] || return 1
    read -r pid started <"$FOLDER/$1.pid"
    [ "$(started_at "$pid")" = "$started" ]
}

# started_at PID: start time of the process, from the kernel; nothing if there is none.
started_at() { sed 's/.*) //' "/proc/$1/stat" 2>/dev/null | cut -d' ' -f20 || true; }

# launch NAME ARGS...: run `ray start ARGS` in the background, in its own session. It outlives its caller, so it must not
# inherit file descriptors: a lock of the caller (flock) would be held as long as the cluster runs.
launch() {
    local name="$1"
    shift
    (
        for descriptor in "/proc/$BASHPID/fd/"*; do
            descriptor="${descriptor##*/}"
            if [ "$descriptor" -gt 2 ] && [ "$descriptor" -ne 255 ]; then eval "exec $descriptor>&-"; fi
        done
        exec setsid python "$ROOT/launch/ray_on_loopback.py" start --block --disable-usage-stats --object-store-memory "$OBJECT_STORE_BYTES" "$@"
    ) >"$FOLDER/$name.log" 2>&1 </dev/null &
    echo "$! $(started_at $!)" >"$FOLDER/$name.pid"
}

await() { # await WHAT COMMAND...: wait until COMMAND succeeds, at most 90 s
    local what="$1" count
    shift
    for count in $(seq 180); do
        if "$@" >/dev/null 2>&1; then return; fi
        if ! running head; then break; fi
        sleep 0.5
    done
    tail -n 5 "$FOLDER"/*.log >&2
    "$0" stop
    fail "$what did not come up; its log is above and in $FOLDER"
}

job_server() { # whether the job server answers with the token; passed in a file, as arguments are visible to others
    curl --silent --fail --max-time 5 --header "@$FOLDER/header" "http://127.0.0.1:$PORT/api/version"
}

two_nodes() {
    [ "$(curl --silent --fail --max-time 5 --header "@$FOLDER/header" "http://127.0.0.1:$PORT/api/v0/nodes" |
        grep -o '"state": *"ALIVE"' | wc -l)" -ge 2 ]
}

start() {
    if running head; then
        say "already running; its folder is $FOLDER"
        return
    fi
    command -v ray >/dev/null || fail "ray: not found; activate the environment (source $VENV/bin/activate)"
    umask 077
    # Its default name is known to all users of the machine: another one may have made a link of that name.
    [ ! -L "$FOLDER" ] || fail "$FOLDER: a link. Set DIST_FT_CLUSTER to the folder itself."
    mkdir -p "$FOLDER"
    [ -O "$FOLDER" ] || fail "$FOLDER: owned by another user. Set DIST_FT_CLUSTER to your own folder."
    chmod 700 "$FOLDER"
    python -c 'import secrets; print(secrets.token_hex(32), end="")' >"$FOLDER/token"
    printf 'Authorization: Bearer %s' "$(cat "$FOLDER/token")" >"$FOLDER/header"
    eval "$(environment)"
    on_cpu_only
    unset RAY_ADDRESS RAY_API_SERVER_ADDRESS # each node gets its address below
    say "starting a head and a worker node, logs in $FOLDER"
    launch head --head --num-cpus 0 --node-ip-address 127.0.0.1 --port "$GCS_PORT" --dashboard-host 127.0.0.1 \
        --dashboard-port "$PORT" --dashboard-agent-listen-port "$AGENT_PORT" --temp-dir "$FOLDER/ray"
    await "the head" job_server
    # its own folder: nodes that share one delete each other's copy of a job's project
    launch worker --address "127.0.0.1:$GCS_PORT" --node-ip-address 127.0.0.1 --dashboard-agent-listen-port 0 \
        --temp-dir "$FOLDER/worker" \
        --num-cpus "${DIST_FT_CLUSTER_CPUS:-$(nproc)}"
    await "the worker node" two_nodes
    say "running; next: eval \"\$($0 env)\""
}

environment() {
    printf 'export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=%q RAY_API_SERVER_ADDRESS=http://127.0.0.1:%s\n' \
        "$FOLDER/token" "$PORT"
    printf 'unset RAY_AUTH_TOKEN RAY_ADDRESS\n' # they would take precedence
    printf 'export RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0\n' # Ray takes 127.0.0.1 as it is, see ray_on_loopback.py
}

stop() {
    local name pid rest count
    for name in worker head; do
        if running "$name"; then
            read -r pid rest <"$FOLDER/$name.pid"
            kill -TERM "$pid" # `ray start --block` stops its own processes
        fi
    done
    for count in $(seq 30); do
        if ! running worker && ! running head; then break; fi
        sleep 0.5
    done
    for name in worker head; do
        if running "$name"; then
            read -r pid rest <"$FOLDER/$name.pid"
            kill -KILL -- "-$pid" # its whole session
        fi
        rm -f "$FOLDER/$name.pid"
    done
    say "stopped"
}

case "${1:-}" in
start | stop) "$1" ;;
env) if running head; then environment; else fail "no cluster runs in $FOLDER. Start it: $0 start"; fi ;;
*) fail "unknown command. Use start, env or stop: $0 start" ;;
esac
