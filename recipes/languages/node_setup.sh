# The packages of a JavaScript or TypeScript repository, and which test runner its package.json names.
set -euo pipefail
if [ -f package.json ]; then
    npm ci --ignore-scripts --no-audit --no-fund || npm install --ignore-scripts --no-audit --no-fund --no-package-lock
    for runner in vitest jest mocha; do
        if [ -x node_modules/.bin/$runner ]; then
            echo "runner: $runner"
            exit
        fi
    done
    grep -q 'node --test\|node:test' package.json || { echo "no runner known in package.json: give --test_command"; exit 1; }
fi
echo "runner: node"
