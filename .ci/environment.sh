# Sourced by samples/demo.sh and tests/run.sh, from the repository's root: makes .venv with the
# package and activates it.
# Usage: GRALORA_EXTRAS=dev . .ci/environment.sh
# The extras are no argument, for a sourced script that is given none sees its caller's.
# Set PYTHON to choose another interpreter than python3, and GRALORA_CONSTRAINTS to choose other
# versions than those of constraints.txt: a file of pip's constraints, or /dev/null for none.

extras="${GRALORA_EXTRAS:-}"
python="${PYTHON:-python3}"
constraints="${GRALORA_CONSTRAINTS:-.ci/constraints.txt}"
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    echo "error: $python is not Python 3.11 or newer. Install it, or name another by PYTHON=..." >&2
    exit 1
fi
wanted="$extras $(cat pyproject.toml "$constraints" | cksum)"
stamp=".venv/installed${extras:+-$extras}"
if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
    echo "setting up .venv (once) ..."
    if [ ! -x .venv/bin/python ] && ! "$python" -m venv .venv; then
        echo "error: $python cannot make virtual environments (Debian: apt install python3-venv)" >&2
        exit 1
    fi
    # torch by name: with the constraint, pip does not go looking for another build
    .venv/bin/python -m pip install --quiet --disable-pip-version-check \
        -c "$constraints" torch -e ".${extras:+[$extras]}"
    echo "$wanted" > "$stamp"
fi
. .venv/bin/activate
