#!/bin/bash
# In the place of what a test.sh or solve.sh installs with: the packages are in the task's environment, and there is no
# network. Linked as uv, uvx, pytest, pip, pip3, apt, apt-get and curl.
run_pytest() {
    arguments=()
    while [ $# -gt 0 ]; do
        case $1 in
            --ctrf) shift ;;  # a report that nobody reads here
            *) arguments+=("$1") ;;
        esac
        shift
    done
    python3 -I -c 'import pytest' || { echo "Bail out! no pytest in the task's venv"; exit 1; }
    exec python3 -I -m pytest -p no:cacheprovider -c /dev/null "${arguments[@]}"
}
name=$(basename "$0")
if [ "$name" = pytest ]; then
    run_pytest "$@"
elif [ "$name $1" = "uv venv" ]; then
    folder=${2:-.venv}
    mkdir -p "$folder/bin"
    touch "$folder/bin/activate"
elif [ "$name" = uvx ] || [ "$name $1" = "uv run" ]; then
    while [ $# -gt 0 ] && [ "$1" != pytest ]; do shift; done
    shift
    run_pytest "$@"
elif [ "$name" = curl ] && [[ "$*" != *astral.sh* ]]; then
    exec /usr/bin/curl "$@"
fi
