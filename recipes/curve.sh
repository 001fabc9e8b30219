#!/usr/bin/env bash
# How many rows does it take? Trains on nested subsets of one file and evaluates each; n = 0 is the base.
#
#   bash recipes/curve.sh demo data/demo/train.jsonl 10 20 40 80 --seeds 3
#   bash recipes/curve.sh demo data/demo/train.jsonl 20 80 --against data/other.jsonl    # rows of another kind
#
# RECIPE is a folder of recipes/ with sft.yaml and eval.yaml; then the rows and the sizes. Two curves, because
# fewer rows at equal passes would be fewer updates, and a curve would count those: every size is trained for
# as many updates, and for as many tokens, as the largest has with sft.yaml's num_train_epochs. A run that both
# need is made once, and where the two differ by less than a tenth, they are one. Seeds draw subsets and order.
# --against trains on a second set as well, at the same sizes and on all of it. What was cut short goes on;
# with other rows or another sft.yaml it is another curve, and refused.
# curve.py plans, and plots.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[ $# -ge 3 ] || { echo "usage: bash recipes/curve.sh RECIPE ROWS SIZES... [--seeds 3] [--against ROWS]" >&2; exit 2; }
[ ! -d .venv/bin ] || export PATH="$PWD/.venv/bin:$PATH"
recipe=$1
results=results/curve-$recipe
launch=(python)
serve=()
devices=recipes/$recipe/accelerate.yaml
[ ! -f "$devices" ] || launch=(accelerate launch --config_file "$devices")
nodes=$(sed -n 's/^num_machines: //p' "$devices" 2> /dev/null) || true
if [ "${nodes:-1}" -gt 1 ]; then # one process on each node, which srun numbers
    [ "${SLURM_JOB_ID:-}" ] || { echo "curve.sh: $recipe needs $nodes nodes: sbatch --nodes=$nodes --wrap 'bash $0 $*'" >&2; exit 2; }
    HOST=$(scontrol show hostnames | head -n 1)
    export HOST
    own='exec accelerate launch --machine_rank $SLURM_NODEID --main_process_ip $HOST "$@"'
    launch=(srun "--nodes=$nodes" --ntasks-per-node=1 bash -c "$own" launch --config_file "$devices")
    serve=(srun --nodes=1 --ntasks=1)
fi

python recipes/curve.py plan "$@"
while IFS=$'\t' read -r -u 3 run model rows updates seed; do
    echo "=== $run"
    if [ "$run" != base ]; then
        [ -f "$model/recipe.json" ] || (
            [ ! -f "recipes/$recipe/environment.sh" ] || . "recipes/$recipe/environment.sh"
            "${launch[@]}" 03_sft.py --config "recipes/$recipe/sft.yaml" \
                --train_file "$rows" --output_dir "$model" --max_steps "$updates" --seed "$seed")
    fi
    # 1: 04 finds something odd, such as a base that never ends its answers; the table has it in a column
    "${serve[@]}" python 04_eval.py --config "recipes/$recipe/eval.yaml" --model "$model" --output_dir "$results/$run" || [ $? = 1 ]
done 3< "$results/runs.tsv"
python recipes/curve.py table "$recipe"
