#!/usr/bin/env bash
# Set up what the tests need and run them. Arguments go to pytest; paths are from where one is.
# Without arguments, the whole suite runs in one process more than there are cores. A choice of tests
# runs in one process, which starts sooner; -n 4 gives it more.
set -euo pipefail
arguments=()
for argument in "$@"; do
    case "$argument" in
        /* | -*) ;;
        */* | *.py | *.py::*) [ -e "${argument%%::*}" ] && argument="$PWD/$argument" ;;
    esac
    arguments+=("$argument")
done
if [ $# -eq 0 ]; then
    arguments=(-n auto --maxprocesses 8 --dist worksteal)
fi
cd "$(dirname "$0")/.."
GRALORA_EXTRAS=dev . .ci/environment.sh
unset PYTHONDONTWRITEBYTECODE # each process that a test starts would compile the package anew
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=1
exec python -m pytest ${arguments[@]+"${arguments[@]}"}
