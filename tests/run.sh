#!/usr/bin/env bash
# Set up what the tests need and run them. Arguments go to pytest; paths are from where one is.
# Without arguments all tests run, a process on each core; give -n to choose otherwise.
set -euo pipefail
arguments=()
for argument in "$@"; do
    case "$argument" in
        /* | -*) ;;
        */* | *.py | *.py::*) [ -e "${argument%%::*}" ] && argument="$PWD/$argument" ;;
    esac
    arguments+=("$argument")
done
[ $# -gt 0 ] || arguments=(-n auto --maxprocesses 16 --dist worksteal)
cd "$(dirname "$0")/.."
GRALORA_EXTRAS=dev . .ci/environment.sh
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
exec python -m pytest "${arguments[@]+"${arguments[@]}"}"
