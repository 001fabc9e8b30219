#!/usr/bin/env bash
# The paper from zero: GAIR/LIMI -> rows -> training -> AgencyBench v1, base and tuned, with tools and without ->
# results/limi-NAME/table.md, beside the paper's numbers. README.md beside this file: what each claim costs.
#
#   bash recipes/limi/run.sh Qwen/Qwen3-8B --plan        every command, where it runs, memory and time; runs nothing
#   bash recipes/limi/run.sh Qwen/Qwen3-8B               on one node of 8 GPUs
#   sbatch --nodes=4 recipes/limi/job.sbatch zai-org/GLM-4.5-Air    under SLURM
#   bash recipes/limi/run.sh --miniature                 the same path without a GPU: proves nothing but that it runs
#
# MODEL is a Hub id or a folder whose name is one of recipes/*/sft.yaml. --nodes N: other nodes than that recipe has;
# --revision SHA: of GAIR/LIMI; --prepare: only the steps that need a network; --generalization: the benchmarks of the
# paper's Tables 3 and 4 too (generalization.sh). With JUDGE_BASE_URL, JUDGE_MODEL (and
# JUDGE_API_KEY) set, all 49 turns are graded; without, only those that a program decides: never the paper's number.
# A step that is done is skipped; what was cut short goes on. Delete results/limi-NAME/done/STEP to repeat one.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

fail() {
    echo "run.sh: $1" >&2
    exit 2
}

model='' plan='' prepare='' nodes='' revision='' miniature='' generalization=''
while [ $# -gt 0 ]; do
    case $1 in
        --plan | --prepare | --miniature | --generalization) declare "${1#--}=yes" ;;
        --nodes | --revision)
            [ $# -gt 1 ] || fail "$1 needs a value"
            declare "${1#--}=$2"
            shift ;;
        -*) fail "no such flag: $1; there are --plan, --prepare, --nodes, --revision, --generalization and --miniature" ;;
        *)
            [ -z "$model" ] || fail "one model at a time: $model or $1?"
            model=$1 ;;
    esac
    shift
done
[[ $nodes =~ ^([1-9][0-9]*)?$ ]] || fail "--nodes $nodes: a number of nodes"

if [ "$miniature" ]; then
    recipe=miniature
    [ -z "$model$nodes$revision$generalization" ] || fail "--miniature has its own model, node, rows and tasks"
else
    [ "$model" ] || fail "which model? e.g. bash recipes/limi/run.sh Qwen/Qwen3-8B --plan"
    recipe=$(basename "$model" | tr '[:upper:]' '[:lower:]')
    known=$(cd recipes && ls -d ./*/accelerate.yaml | cut -d/ -f2 | LC_ALL=C sort | tr '\n' ' ')
    [ -f "recipes/$recipe/accelerate.yaml" ] || fail "no recipe for $model; there are: $known"
fi
data=data/limi-$recipe outputs=outputs/limi-$recipe results=results/limi-$recipe
[ ! -d .venv/bin ] || export PATH="$PWD/.venv/bin:$PATH"
if [ "${JUDGE_BASE_URL:-}" ]; then
    [ "${JUDGE_MODEL:-}" ] || fail "JUDGE_BASE_URL without JUDGE_MODEL: name the judge"
fi
[ -z "$generalization" ] || . recipes/limi/generalization.sh

quoted() {
    local word line=
    for word in "$@"; do
        [[ $word =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]] || word=${word@Q}
        line+=" $word"
    done
    echo "${line# }"
}

# 04 ends with 1 as well where all episodes ran and it has a warning; those stand in table.md.
# Nor does another start help a task that needs what this machine has not.
# tau2.py ends with 1 for lost episodes alone, and writes no not_run.jsonl: another start repeats them
only_warned() {
    [ -f "$1/not_run.jsonl" ] && ! grep -qv '"reason": "missing_need"' "$1/not_run.jsonl"
}

# What a step is made from: its command, and the sha256 of each file that it reads (of a trained model, its
# recipe.json): where one has changed, the step is not done
made_from() {
    local word before=
    quoted "$@"
    for word in "$@"; do
        [ ! -d "$word" ] || word+=/recipe.json
        if [ -f "$word" ] && [[ $word != *.@(py|sh) && $before != @(--output*|-o) ]]; then
            sha256sum "$word"
        fi
        before=$word
    done
}

# step NAME WHERE COMMAND...
number=0 unfinished=
step() {
    local name=$1 where=$2 made code=0
    shift 2
    number=$((number + 1))
    printf '\n=== %s. %s, on %s\n%s\n' $number "$name" "$where" "$(quoted "$@")"
    if [ "$plan" ]; then
        [ "$miniature" ] || python recipes/limi/cost.py "$recipe" "$nodes" --step "$name"
        return 0
    fi
    made=$(made_from "$@")
    if [ "$(cat "$results/done/$name" 2> /dev/null)" = "$made" ]; then
        echo "done before"
        return 0
    fi
    "$@" || code=$?
    if [ "$code" = 1 ] && [ -f "${*: -1}/summary.json" ]; then
        # The other models and arms do not wait for an episode that may never run
        only_warned "${*: -1}" || { unfinished+=" $name"; return 0; }
    elif [ "$code" != 0 ]; then
        exit 1
    fi
    mkdir -p "$results/done"
    echo "$made" > "$results/done/$name"
}

print_memory() {
    local command cards
    cards=$(sed -En '1s/.*: [0-9]+ GPUs of ([0-9]+) GB.*/\1/p' "recipes/$recipe/sft.yaml") # the card that it is made for
    command=(python recipes/memory.py --config "recipes/$recipe/sft.yaml" --model_name_or_path "$base" --longest 125000)
    command+=(--devices $((8 * nodes)) --cp "$shared" --card "$cards")
    quoted "${command[@]}"
    "${command[@]}" | tail -n 1
}

# What differs between the paper and its miniature: the rows, the tasks, the model, and what the stages are told
on_gpus=() launch=(python) tools=() no_tools=(--no_tools)
if [ "$miniature" ]; then
    [ "$plan" ] || bash recipes/demo/setup.sh
    export HF_HUB_OFFLINE=1 OMP_WAIT_POLICY=PASSIVE VLLM_CPU_KVCACHE_SPACE=1
    where="this machine, without a GPU" training="$where" serving="$where"
    base=$outputs/base
    tasks=$data/queries.jsonl
    rows=(recipes/demo/logs --tools codex=recipes/demo/codex_tools.json)
    train=(--model_name_or_path "$base" --global_batch_size 3 --max_steps 4 --learning_rate 1.5e-3 --warmup_steps 1)
    tools=(--tools recipes/tools/bash.py)
    evaluate=(--limit 3 --temperature 0 --max_tokens 40 --max_steps 2)
    evaluate+=("--vllm_args=--dtype bfloat16 --enforce-eager --max-model-len 2048")
    step tasks "$where" python recipes/demo/tasks.py --output_dir "$data" --per_family 1
else
    where="a machine with a network"
    base=$model
    [[ $model = */* ]] || base=$(sed -n 's/^model_name_or_path: //p' "recipes/$recipe/sft.yaml")
    in_recipe=$(sed -n 's/^num_machines: //p' "recipes/$recipe/accelerate.yaml")
    nodes=${nodes:-$in_recipe}
    training="$nodes node(s) of 8 GPUs" serving="one node of GPUs"
    tasks=$data/tasks.jsonl
    rows=("GAIR/LIMI${revision:+@$revision}" --tokenizer "$base")
    train=(--config "recipes/$recipe/sft.yaml" --model_name_or_path "$base")

    spread=(--num_machines "$nodes" --num_processes $((8 * nodes)))
    shared=$(sed -En 's/^ *parallelism_config_cp_size: ([0-9]+).*/\1/p' "recipes/$recipe/accelerate.yaml")
    shared=${shared:-1} # GPUs at one sample; where it is eight, as many samples at a time as nodes
    [ "$shared" = 1 ] || spread+=(--parallelism_config_dp_shard_size "$nodes")
    launch=(accelerate launch --config_file "recipes/$recipe/accelerate.yaml" "${spread[@]}")
    if [ "${SLURM_JOB_ID:-}" ] || [ "$nodes" -gt 1 ]; then
        [ "$plan$prepare${SLURM_JOB_ID:-}" ] || fail "$nodes nodes: sbatch --nodes=$nodes recipes/limi/job.sbatch $model"
        # srun passes the signal on that comes before the time is over, and gives each node its number
        on_gpus=(srun --nodes=1 --ntasks=1)
        own='exec accelerate launch --machine_rank $SLURM_NODEID --main_process_ip $HOST "$@"'
        launch=(srun "--nodes=$nodes" --ntasks-per-node=1 bash -c "$own" launch "${launch[@]:2}")
        if [ -z "$plan$prepare" ]; then
            HOST=$(scontrol show hostnames | head -n 1)
            export HOST
        fi
    fi

    # Both models at the same window: Qwen3's own is 40,960 tokens, and only the tuned one comes with YaRN
    vllm=$(sed -n 's/^vllm_args: //p' "recipes/$recipe/eval.yaml")
    [[ $recipe != qwen3-* ]] || vllm=${vllm/131072/40960}
    evaluate=(--config "recipes/$recipe/eval.yaml" "--vllm_args=$vllm")
    convert=()
    if [ "${JUDGE_BASE_URL:-}" ]; then
        convert=(--judge --network)
        evaluate+=(--network --feedback judge --judge_base_url "$JUDGE_BASE_URL" --judge_model "$JUDGE_MODEL")
    fi
    # A clone that was cut short goes, and what is known of its commit
    [ "$plan" ] || [ -f "$results/done/benchmark" ] || rm -rf "$data/AgencyBench" "$results/done/commit"
    step benchmark "$where" git clone -q https://github.com/GAIR-NLP/AgencyBench "$data/AgencyBench"
    step commit "$where" git -C "$data/AgencyBench" checkout -q ec65324
    step tasks "$where" python recipes/benchmarks/agencybench_v1.py "$data/AgencyBench" --output_dir "$data" \
        "${convert[@]}"
fi

[ -z "$generalization" ] || prepare_generalization
step rows "$where" python 02_format_trajectories.py "${rows[@]}" --output_file "$data/train.jsonl"
[ -z "$prepare" ] || exit 0
[ -z "$miniature" ] || step base "$where" python recipes/demo/make_model.py --model tiny \
    --train_file "$data/train.jsonl" --output_dir "$base" # its tokenizer is made from the rows
step training "$training" "${launch[@]}" 03_sft.py "${train[@]}" --train_file "$data/train.jsonl" \
    --output_dir "$outputs/tuned" --save_steps 1
if [ "$plan" ] && [ -z "$miniature" ]; then print_memory; fi

declare -A models=([base]=$base [tuned]=$outputs/tuned)
for one in base tuned; do
    for arm in tools no_tools; do
        declare -n flags=$arm
        step "$one-$arm" "$serving" "${on_gpus[@]}" python 04_eval.py "${evaluate[@]}" "${flags[@]}" \
            --tasks "$tasks" --rounds 3 --model "${models[$one]}" --output_dir "$results/$one-$arm"
    done
    [ -z "$generalization" ] || evaluate_generalization "$one" "${models[$one]}"
done
[ "$plan" ] || rm -f "$results/done/table" # costs nothing, and shows what is there now
step table "$where" python recipes/limi/table.py --runs "$results" --model "$recipe"
[ -z "$unfinished" ] || { echo "run.sh: not all episodes ran in$unfinished; the same command tries them again" >&2; exit 1; }
