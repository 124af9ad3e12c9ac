#!/bin/sh
# Prints the path of a Python that is new enough to run jax-engine and can make virtual environments.
# Looks on PATH, then under pyenv; each candidate is run, since a pyenv shim may exist for a Python that is not active.
set -u

new_enough() {
    "$1" -c 'import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 12))' >/dev/null 2>&1 </dev/null
}

offer() {
    if new_enough "$1"; then
        "$1" -c 'import sys; print(sys.executable)'
        exit 0
    fi
}

if [ -n "${PYTHON:-}" ]; then
    offer "$PYTHON"
    echo "PYTHON=$PYTHON is no Python 3.12 or newer with the venv and ensurepip modules" >&2
    exit 1
fi
for name in python3.14 python3.13 python3.12; do
    offer "$name"
done
for root in "${PYENV_ROOT:-}" "${HOME:-}/.pyenv"; do
    for minor in 14 13 12; do
        for candidate in "$root/versions/3.$minor".*/bin/python; do
            if [ -x "$candidate" ]; then
                offer "$candidate"
            fi
        done
    done
done
offer python3
echo "jax-engine needs Python 3.12 or newer with the venv module; none was found on PATH or under pyenv." >&2
echo "Install one (on Debian and Ubuntu: python3.12 and python3.12-venv), or name it: make PYTHON=/path/to/python" >&2
exit 1
