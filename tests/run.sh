#!/usr/bin/env bash
# All tests on a machine without a GPU. Arguments go to pytest, e.g.  bash tests/run.sh -m "not vllm and not demo"
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash recipes/demo/setup.sh
export OMP_WAIT_POLICY=PASSIVE
exec .venv/bin/python -m pytest -q tests "$@"
