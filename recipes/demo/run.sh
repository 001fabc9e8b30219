#!/usr/bin/env bash
# The whole recipe on a real model of 135 million parameters, without a GPU: tasks, a teacher's trajectories,
# rows, training, evaluation, base against tuned. README.md beside it: what comes out, and how long it takes.
#
#   bash recipes/demo/run.sh                        SmolLM2-135M-Instruct
#   bash recipes/demo/run.sh --passes 8 --seed 2    another training; tasks, rows and base are used again
#   bash recipes/demo/run.sh --model tiny           GLM-4.5's architecture, random: learns rows by heart
#   bash recipes/demo/run.sh --quick                2 updates, 4 tasks: does everything run here?
#
# A second run reuses what is done. Files: data/demo, outputs/demo, results/demo.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

model=smollm2 passes=4 seed=42 quick=
while [ $# -gt 0 ]; do
    case $1 in
        --quick) quick=yes ;;
        --model | --passes | --seed)
            [ $# -gt 1 ] || { echo "run.sh: $1 needs a value" >&2; exit 2; }
            declare "${1#--}=$2"
            shift ;;
        *) echo "run.sh: no such flag: $1; there are --model, --passes, --seed and --quick" >&2; exit 2 ;;
    esac
    shift
done

name=demo
tasks_flags=() train_flags=(--seed "$seed" --num_train_epochs "$passes") limit=()
if [ "$model" = tiny ]; then  # random weights: it can only replay, so it is tested on what it was trained on
    name=demo-tiny
    tasks_flags=(--per_family 1)
    train_flags=(--seed "$seed" --num_train_epochs 42 --learning_rate 1.5e-3 --global_batch_size 4
                 --per_device_train_batch_size 4 --warmup_steps 20 --weight_decay 0)
elif [ "$model" != smollm2 ]; then
    name=demo-$(basename "$model")
fi
if [ "$quick" ]; then
    name=$name-quick
    tasks_flags+=(--per_family 1)
    train_flags+=(--max_steps 2 --warmup_steps 1)
    limit=(--limit 4)
fi
tuned=tuned
[ "$passes" = 4 ] || tuned=$tuned-passes$passes
[ "$seed" = 42 ] || tuned=$tuned-seed$seed
data=data/$name outputs=outputs/$name results=results/$name
test_tasks=("$data"/{held_out,unseen}.jsonl)
[ "$model" != tiny ] || test_tasks=("$data/queries.jsonl")

bash recipes/demo/setup.sh
export PATH="$PWD/.venv/bin:$PATH" HF_HUB_OFFLINE=1
export OMP_WAIT_POLICY=PASSIVE  # threads that wait do not spin: far faster on a busy machine
SECONDS=0
step() { printf '\n=== %s   [%d s]\n' "$1" "$SECONDS"; }

step "tasks: small jobs in files and shell, thirteen families to learn, two that are only tested"
python recipes/demo/tasks.py --output_dir "$data" "${tasks_flags[@]}"
for agent in solution nothing; do  # a task file proves itself: solutions pass every check, doing nothing none
    echo "--agent $agent"
    python 04_eval.py --tasks "$data"/{queries,held_out,unseen}.jsonl --agent $agent \
        --output_dir "$results/$agent" | grep ^SR@1:
done

step "trajectories: a scripted teacher plays the training tasks through 04's agent loop"
rm -f "$data/teacher.url"  # an earlier run's
python recipes/demo/teacher.py "$data/queries.jsonl" --port 0 > "$data/teacher.url" &
teacher=$!
trap 'kill $teacher 2> /dev/null || true' EXIT
until [ -s "$data/teacher.url" ]; do kill -0 $teacher; sleep 0.1; done
# One at a time: the rows are in the same order every time, and so is the training
python 04_eval.py --config recipes/demo/eval.yaml --tasks "$data/queries.jsonl" --model scripted-teacher \
    --base_url "$(cat "$data/teacher.url")" --concurrency 1 --output_dir "$results/teacher" | grep ^SR@1:
kill $teacher

make_base() {
    [ -f "$outputs/base/config.json" ] || python recipes/demo/make_model.py --model "$model" \
        --train_file "$data/train.jsonl" --output_dir "$outputs/base"
}
count=()
if [ "$model" != tiny ]; then
    step "the base: $model"
    make_base
    count=(--tokenizer "$outputs/base")
fi

step "02 rows: the teacher's episodes, and sessions of four other tools"
python 02_format_trajectories.py "$results/teacher/episodes.jsonl" recipes/demo/logs "${count[@]}" \
    --queries "$data/queries.jsonl" --tools codex=recipes/demo/codex_tools.json --output_file "$data/train.jsonl"
[ "$model" != tiny ] || make_base  # its tokenizer is trained on the rows

step "03 training: $model, all parameters"
rows=$(sha256sum < "$data/train.jsonl" | cut -d' ' -f1)
if grep -qs "$rows" "$outputs/$tuned/recipe.json"; then
    echo "$outputs/$tuned was trained on exactly these rows"
else
    rm -rf "${outputs:?}/$tuned" "${results:?}/$tuned"
    . recipes/demo/environment.sh
    python 03_sft.py --config recipes/demo/sft.yaml --model_name_or_path "$outputs/base" \
        --train_file "$data/train.jsonl" --output_dir "$outputs/$tuned" "${train_flags[@]}"
fi

# Its exit code 1 says "look at this before you believe it"; a base that never ends its answers is what we look at
for one in base "$tuned"; do
    step "04 evaluation: $one"
    python 04_eval.py --config recipes/demo/eval.yaml --tasks "${test_tasks[@]}" "${limit[@]}" \
        --model "$outputs/$one" --output_dir "$results/$one" || [ $? = 1 ]
done

step "base against tuned"
python 04_eval.py --compare "$results/base" "$results/$tuned" | grep -v ^test-
python recipes/demo/families.py "$results/base" "$results/$tuned"
python recipes/plot.py "$results/base" "$results/$tuned"
python recipes/view.py "$results/base" "$results/$tuned"
python recipes/view.py "$outputs/$tuned"
echo "done in $SECONDS s"
