#!/usr/bin/env bash
# The whole recipe in miniature on a machine without a GPU: queries, trajectories, training, evaluation, base against tuned.
# Everything is the real code path; a second run reuses what is done. Files: data/demo, outputs/demo, results/demo.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
bash recipes/demo/setup.sh
export PATH="$PWD/.venv/bin:$PATH" HF_HUB_OFFLINE=1
export OMP_WAIT_POLICY=PASSIVE  # threads that wait do not spin: the same speed on a free machine, far better on a busy one
SECONDS=0
step() { printf '\n=== %s   [%d s]\n' "$1" "$SECONDS"; }

step "01 queries: six real-world ones, two mined from the pull requests of a small repository"
if [ ! -d data/demo/pr_repo.git ]; then
    mkdir -p data/demo
    git init -q --bare -b main data/demo/pr_repo.partial
    git -C data/demo/pr_repo.partial fast-import --quiet < recipes/demo/pr_repo.fastexport
    mv data/demo/pr_repo.partial data/demo/pr_repo.git
fi
python 01_build_queries.py --config recipes/demo/queries.yaml

step "02 trajectories: logs in four formats become chat rows"
python 02_format_trajectories.py recipes/demo/logs --output_file data/demo/train.jsonl --report data/demo/report.html

data=$(sha256sum < data/demo/train.jsonl | cut -d' ' -f1)
if grep -qs "$data" outputs/demo/tuned/recipe.json; then
    step "03 training: outputs/demo/tuned was trained on exactly these rows"
else
    step "03 training: GLM-4.5's architecture with 3.5 million random parameters"
    rm -rf outputs/demo results/demo
    python recipes/demo/make_model.py
    python 03_sft.py --config recipes/demo/sft.yaml --dry_run
    python 03_sft.py --config recipes/demo/sft.yaml
fi

for name in base tuned; do
    step "04 evaluation: $name"
    python 04_eval.py --config recipes/demo/eval.yaml --model outputs/demo/$name --output_dir results/demo/$name
done

step "base against tuned"
python 04_eval.py --compare results/demo/base results/demo/tuned
echo
echo "which tokens were trained: outputs/demo/tuned/sample.html"
echo "done in $SECONDS s"
