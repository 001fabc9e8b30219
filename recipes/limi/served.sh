#!/usr/bin/env bash
# A command beside a served model, for a benchmark that drives the agent itself:
#   bash recipes/limi/served.sh --model outputs/limi --port 8000 -- python recipes/benchmarks/tau2.py ...
# Starts 04_eval.py --serve with the flags before "--", waits until it answers, runs the command, ends the server.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

flags=() port=8000
while [ $# -gt 0 ] && [ "$1" != -- ]; do
    [ "$1" != --port ] || port=$2
    flags+=("$1")
    shift
done
[ $# -gt 1 ] || { echo "served.sh: wants FLAGS -- COMMAND" >&2; exit 2; }
shift
if (: < "/dev/tcp/localhost/$port") 2> /dev/null; then
    echo "served.sh: port $port is taken; name another: --port" >&2 # another model's, perhaps
    exit 2
fi

python 04_eval.py --serve "${flags[@]}" &
server=$!
trap 'kill "$server" 2> /dev/null || true; wait "$server" || true' EXIT
until (: < "/dev/tcp/localhost/$port") 2> /dev/null; do
    kill -0 "$server" 2> /dev/null || { echo "served.sh: the server has ended" >&2; exit 1; }
    sleep 1
done
"$@"
