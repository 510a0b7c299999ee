#!/usr/bin/env bash
# Make a virtual environment for this clone and run `gralora demo` in it: train an adapter of a new
# subject on the bundled base, on the CPU, and show the result. All output is in outputs/demo of the
# clone, or in the folder given as the first argument. Further arguments go to `gralora demo`.
set -euo pipefail
arguments=("$@")
case "${1:-}" in
    "") arguments=("outputs/demo" --overwrite_output_dir "${@:2}") ;;
    /*) ;;
    *) arguments=("$PWD/$1" "${@:2}") ;; # relative to the caller's folder
esac
cd "$(dirname "$0")/.."
. .ci/environment.sh
exec gralora demo "${arguments[@]}"
