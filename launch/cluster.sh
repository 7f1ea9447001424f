#!/usr/bin/env bash
# A Ray cluster on this machine to try things on: a head without CPUs to give, one worker node, token authentication.
#   ./launch/cluster.sh start           starts it (or says that it runs), with as many CPUs as there are cores
#   eval "$(./launch/cluster.sh env)"   tells this shell where it is and with which token to ask
#   ./launch/cluster.sh stop            ends it: the two processes it started and theirs, and no other Ray
# The dashboard and job server listen on loopback only; Ray's own ports (GCS, raylets) listen on this machine's address and
# answer only those who have the token. Its folder (DIST_FT_CLUSTER, else /tmp/dist-ft-cluster-UID) is readable by its
# owner only and holds the token, the pids and the logs. DIST_FT_CLUSTER_PORT: first of three ports (default 8265: the
# dashboard and job server, then agent and GCS). DIST_FT_CLUSTER_CPUS: CPUs of the worker node.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

FOLDER="${DIST_FT_CLUSTER:-/tmp/dist-ft-cluster-$(id -u)}"
PORT="${DIST_FT_CLUSTER_PORT:-8265}"
AGENT_PORT=$((PORT + 1)) GCS_PORT=$((PORT + 2))
OBJECT_STORE_BYTES=134217728

# running NAME: whether the process started as NAME still is that process (a pid may have gone to another).
running() {
    local pid started
    [ -f "$FOLDER/$1.pid" ] || return 1
    read -r pid started <"$FOLDER/$1.pid"
    [ "$(started_at "$pid")" = "$started" ]
}

# started_at PID: the moment the kernel gave this pid to its process; nothing if there is none.
started_at() { sed 's/.*) //' "/proc/$1/stat" 2>/dev/null | cut -d' ' -f20 || true; }

# launch NAME ARGS...: run `ray start ARGS` on in the background, in a session of its own. It outlives its caller, so it
# must hold nothing of his: a lock that he took (flock) would stay taken as long as the cluster runs.
launch() {
    local name="$1"
    shift
    (
        for descriptor in "/proc/$BASHPID/fd/"*; do
            descriptor="${descriptor##*/}"
            if [ "$descriptor" -gt 2 ] && [ "$descriptor" -ne 255 ]; then eval "exec $descriptor>&-"; fi
        done
        exec setsid ray start --block --disable-usage-stats --object-store-memory "$OBJECT_STORE_BYTES" "$@"
    ) >"$FOLDER/$name.log" 2>&1 </dev/null &
    echo "$! $(started_at $!)" >"$FOLDER/$name.pid"
}

await() { # await WHAT COMMAND...: until COMMAND succeeds, at most 90 s
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

job_server() { # whether the job server answers one who has the token, which goes by a file: others see arguments
    curl --silent --fail --max-time 5 --header "@$FOLDER/header" "http://127.0.0.1:$PORT/api/version"
}

two_nodes() {
    [ "$(curl --silent --fail --max-time 5 --header "@$FOLDER/header" "http://127.0.0.1:$PORT/api/v0/nodes" |
        grep -o '"state": *"ALIVE"' | wc -l)" -ge 2 ]
}

start() {
    if running head; then
        say "it runs already; its folder is $FOLDER"
        return
    fi
    command -v ray >/dev/null || fail "ray: not found; activate the environment (source $VENV/bin/activate)"
    umask 077
    mkdir -p "$FOLDER"
    [ -O "$FOLDER" ] || fail "$FOLDER: belongs to someone else; set DIST_FT_CLUSTER to a folder of your own"
    chmod 700 "$FOLDER"
    python -c 'import secrets; print(secrets.token_hex(32), end="")' >"$FOLDER/token"
    printf 'Authorization: Bearer %s' "$(cat "$FOLDER/token")" >"$FOLDER/header"
    eval "$(environment)"
    on_cpu_only
    unset RAY_ADDRESS RAY_API_SERVER_ADDRESS # where a node is to be told it is told below
    say "starting a head and a worker node, logs in $FOLDER"
    launch head --head --num-cpus 0 --node-ip-address 127.0.0.1 --port "$GCS_PORT" --dashboard-host 127.0.0.1 \
        --dashboard-port "$PORT" --dashboard-agent-listen-port "$AGENT_PORT" --temp-dir "$FOLDER/ray"
    await "the head" job_server
    # a folder of its own: nodes that share one take away each other's copy of a job's project
    launch worker --address "127.0.0.1:$GCS_PORT" --node-ip-address 127.0.0.1 --dashboard-agent-listen-port 0 \
        --temp-dir "$FOLDER/worker" \
        --num-cpus "${DIST_FT_CLUSTER_CPUS:-$(nproc)}"
    await "the worker node" two_nodes
    say "it runs; next: eval \"\$($0 env)\""
}

environment() {
    printf 'export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=%q RAY_API_SERVER_ADDRESS=http://127.0.0.1:%s\n' \
        "$FOLDER/token" "$PORT"
    printf 'unset RAY_AUTH_TOKEN RAY_ADDRESS\n' # they would go before the above
}

stop() {
    local name pid rest count
    for name in worker head; do
        if running "$name"; then
            read -r pid rest <"$FOLDER/$name.pid"
            kill -TERM "$pid" # `ray start --block` takes its own processes with it
        fi
    done
    for count in $(seq 30); do
        if ! running worker && ! running head; then break; fi
        sleep 0.5
    done
    for name in worker head; do
        if running "$name"; then
            read -r pid rest <"$FOLDER/$name.pid"
            kill -KILL -- "-$pid" # the session that was made for it
        fi
        rm -f "$FOLDER/$name.pid"
    done
    say "stopped"
}

case "${1:-}" in
start | stop) "$1" ;;
env) if running head; then environment; else fail "no cluster runs in $FOLDER; start it: $0 start"; fi ;;
*) fail "say start, env or stop: $0 start" ;;
esac
