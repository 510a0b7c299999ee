#!/usr/bin/env bash
# Set up what the tests need and run them. Arguments go to pytest; paths are from where one is.
set -euo pipefail
arguments=()
for argument in "$@"; do
    case "$argument" in
        /* | -*) ;;
        */* | *.py | *.py::*) [ -e "${argument%%::*}" ] && argument="$PWD/$argument" ;;
    esac
    arguments+=("$argument")
done
cd "$(dirname "$0")/.."
GRALORA_EXTRAS=dev . .ci/environment.sh
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
exec python -m pytest ${arguments[@]+"${arguments[@]}"}
