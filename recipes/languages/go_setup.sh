# The modules of a Go repository (in vendor/), and the standard library compiled once.
set -euo pipefail
if grep -q '^require' go.mod; then
    go mod vendor
fi
GOCACHE="$ENVIRONMENT/gocache" go test -run '^$' ./... || true
echo "runner: go"
