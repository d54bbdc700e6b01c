#!/usr/bin/env bash
# Creates the two environments: .venv (trainer, manager, development tools) and .venv-rollout (SGLang).
# Where npm is, it also installs the web search server of recipes/web_search.yaml (tools/serper).
#
# They are separate because the pins of SGLang and those of the trainer drift apart with every release.
# Running it again does nothing unless a requirement file, pyproject.toml or this script changed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

die() {
    echo "setup: $*" >&2
    exit 1
}

python="${MATPO_PYTHON:-python3.11}"

stamp_of() { # Hash of the files named, and of where the tree lies (environments hold absolute paths).
    { echo "$PWD" && cat "$@"; } | sha256sum | cut -d ' ' -f 1
}

is_current() { # is_current DIRECTORY STAMP
    [[ -f "$1/.matpo-stamp" && "$(<"$1/.matpo-stamp")" == "$2" ]]
}

check_python() {
    command -v "$python" >/dev/null ||
        die "$python is missing. Install it (Debian, Ubuntu: apt-get install python3.11 python3.11-venv)," \
            "or set MATPO_PYTHON to a Python 3.11"
    "$python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' ||
        die "$python is $("$python" --version); Python 3.11 is needed"
    "$python" -c 'import venv, ensurepip' 2>/dev/null ||
        die "$python has no venv module. Install it (Debian, Ubuntu: apt-get install python3.11-venv)"
}

# --no-compile: byte code is written on first import, for the few modules that are really imported.
pip_install() { # pip_install DIRECTORY ARGUMENT...
    local env_dir="$1"
    shift
    "$env_dir/bin/python" -m pip install --quiet --disable-pip-version-check --no-compile "$@"
}

make_trainer() { # make_trainer STAMP
    rm -f .venv/.matpo-stamp
    [[ -x .venv/bin/python ]] || "$python" -m venv .venv
    pip_install .venv -r requirements/trainer-cpu.txt -r requirements/launch.txt
    pip_install .venv --no-deps -r requirements/launch-nodeps.txt
    pip_install .venv --no-build-isolation --no-deps -e .
    echo "$1" >.venv/.matpo-stamp
}

make_rollout() { # make_rollout STAMP
    rm -f .venv-rollout/.matpo-stamp
    [[ -x .venv-rollout/bin/python ]] || "$python" -m venv .venv-rollout
    pip_install .venv-rollout -r requirements/rollout-cpu.txt
    pip_install .venv-rollout --no-deps -r requirements/rollout-cpu-nodeps.txt
    # Shows that everything SGLang imports is there, and writes its byte code before a run waits for it.
    SGLANG_USE_CPU_ENGINE=1 .venv-rollout/bin/python megatron_matpo/rollout/sglang_cpu/serve.py --help \
        >/dev/null 2>.venv-rollout/check.log ||
        die "SGLang cannot be imported; the reason is in .venv-rollout/check.log"
    echo "$1" >.venv-rollout/.matpo-stamp
}

# Best effort: nothing but that recipe needs it. A failure is stamped too, so that it costs time once.
make_serper() { # make_serper STAMP
    local log=tools/serper/install.log
    if ! timeout 120 npm ci --prefix tools/serper --ignore-scripts --no-audit --no-fund \
        --fetch-retries 0 --fetch-timeout 20000 >"$log" 2>&1; then
        echo "setup: the web search server was not installed (see $log); recipes/web_search.yaml" \
            "needs it: npm ci --prefix tools/serper" >&2
    fi
    mkdir -p tools/serper/node_modules
    echo "$1" >tools/serper/node_modules/.matpo-stamp
}

trainer_stamp="$(stamp_of tools/setup.sh pyproject.toml requirements/trainer-cpu.txt \
    requirements/launch.txt requirements/launch-nodeps.txt)"
rollout_stamp="$(stamp_of tools/setup.sh requirements/rollout-cpu.txt \
    requirements/rollout-cpu-nodeps.txt requirements/rollout-router.txt)"
serper_stamp="$(stamp_of tools/serper/package.json tools/serper/package-lock.json)"

# The installations run in the background, which Ctrl-C does not reach by itself.
trap 'trap - TERM; kill 0' INT TERM
serper_pid=""
if command -v npm >/dev/null && ! is_current tools/serper/node_modules "$serper_stamp"; then
    make_serper "$serper_stamp" &
    serper_pid="$!"
fi
if is_current .venv "$trainer_stamp" && is_current .venv-rollout "$rollout_stamp"; then
    [[ -z "$serper_pid" ]] || wait "$serper_pid" || true
    exit 0
fi
check_python
trainer_pid=""
rollout_pid=""
start_s="$SECONDS"
if ! is_current .venv "$trainer_stamp"; then
    echo "setup: making .venv"
    make_trainer "$trainer_stamp" &
    trainer_pid="$!"
fi
if ! is_current .venv-rollout "$rollout_stamp"; then
    echo "setup: making .venv-rollout"
    make_rollout "$rollout_stamp" &
    rollout_pid="$!"
fi
failed=""
[[ -z "$trainer_pid" ]] || wait "$trainer_pid" || failed="$failed .venv"
[[ -z "$rollout_pid" ]] || wait "$rollout_pid" || failed="$failed .venv-rollout"
[[ -z "$serper_pid" ]] || wait "$serper_pid" || true
[[ -z "$failed" ]] || die "could not make:$failed (pip's message is above)"
if [[ -n "$trainer_pid$rollout_pid" ]]; then
    echo "setup: done in $((SECONDS - start_s)) s"
fi
