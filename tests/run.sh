#!/usr/bin/env bash
# All tests on a machine without a GPU. Arguments go to pytest, e.g.  bash tests/run.sh -m "not vllm and not demo"
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash recipes/demo/setup.sh
# The tests of pages drive a browser and are skipped by name without one
if [ "$(id -u)" = 0 ] && command -v apt-get > /dev/null && ! command -v chromium google-chrome > /dev/null; then
    apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium > /dev/null || echo "no chromium" >&2
fi
export OMP_WAIT_POLICY=PASSIVE
exec .venv/bin/python -m pytest -q tests "$@"
