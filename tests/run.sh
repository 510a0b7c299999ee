#!/usr/bin/env bash
# Set up what the tests need and run them. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
. .ci/environment.sh dev
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
exec python -m pytest "$@"
