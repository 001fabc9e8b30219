# The benchmarks of the paper's Tables 3 and 4, with tools and without. run.sh --generalization reads this file.
# tau2-bench has its own tools and its own harness: once, beside Table 4. Its user is a model at USER_BASE_URL
# (USER_MODEL, USER_API_KEY). SciCode's targets, 1 GB, are on a drive that asks for a click: SCICODE_TARGETS says where
# test_data.h5 lies. What is not set is left out, and said.

benchmarks=(humaneval mbpp ds1000)
[ -z "${SCICODE_TARGETS:-}" ] || benchmarks+=(scicode)
domains=()
if [ "${USER_BASE_URL:-}" ]; then
    [ "${USER_MODEL:-}" ] || fail "USER_BASE_URL without USER_MODEL: name the model that plays the user"
    domains=(airline retail)
fi
given=data/limi-benchmarks # the same for all models

# environment NAME PYTHON PACKAGE...: the packages that a benchmark's own checks need
environment() {
    local name=$1 python=$2
    shift 2
    step "$name-venv" "$where" "$python" -m venv "$given/$name-venv"
    step "$name-packages" "$where" "$given/$name-venv/bin/pip" install -q "$@"
}

# clone REPOSITORY COMMIT
clone() {
    local folder=$given/${1##*/}
    # A clone that was cut short goes, and what is known of its commit
    [ "$plan" ] || [ -f "$results/done/${1##*/}" ] || rm -rf "$folder" "$results/done/${1##*/}-commit"
    step "${1##*/}" "$where" git clone -q "https://github.com/$1" "$folder"
    step "${1##*/}-commit" "$where" git -C "$folder" checkout -q "$2"
}

# convert NAME SCRIPT ENVIRONMENT DATA...: the task files of both arms
convert() {
    local name=$1 script=$2 environment=$3 python=python arm
    shift 3
    [ "$name" != scicode ] || python=$given/scicode-venv/bin/python # it imports the authors' package
    for arm in "" --no_tools; do
        step "$name-tasks${arm/--/-}" "$where" "$python" "recipes/benchmarks/$script.py" "$@" \
            --venv "$given/$environment-venv" --output "$given/$name" ${arm:+"$arm"}
    done
}

prepare_generalization() {
    local release=https://github.com/evalplus
    local results=$given # its done/STEP too: another model's run must not clone and install anew below this one's
    [ "$plan" ] || mkdir -p "$given"
    environment evalplus python3.11 evalplus==0.3.1 numpy==2.4.6 tree-sitter==0.26.1 tree-sitter-python==0.25.0
    step humaneval-data "$where" curl -sfL -o "$given/HumanEvalPlus.jsonl.gz" \
        "$release/humanevalplus_release/releases/download/v0.1.10/HumanEvalPlus.jsonl.gz"
    step mbpp-data "$where" curl -sfL -o "$given/MbppPlus.jsonl.gz" \
        "$release/mbppplus_release/releases/download/v0.2.0/MbppPlus.jsonl.gz"
    convert humaneval evalplus evalplus "$given/HumanEvalPlus.jsonl.gz"
    convert mbpp evalplus evalplus "$given/MbppPlus.jsonl.gz"

    environment ds1000 python3.10 gensim==4.3.2 matplotlib==3.8.4 numpy==1.26.4 pandas==1.5.3 torch==2.2.0 \
        seaborn==0.13.2 scikit-learn==1.4.0 scipy==1.12.0 statsmodels==0.14.1 xgboost==2.0.3 \
        tensorflow-cpu==2.16.1 PyYAML==6.0.2 tqdm==4.67.1
    clone xlang-ai/DS-1000 b39aab71
    convert ds1000 ds1000 ds1000 "$given/DS-1000"

    if [ "${SCICODE_TARGETS:-}" ]; then
        environment scicode python3.11 datasets==3.6.0 pyarrow==20.0.0 h5py==3.15.1 numpy==1.26.4 scipy==1.13.1 \
            sympy==1.14.0 matplotlib==3.9.4
        clone scicode-bench/SciCode 588b4069
        step scicode-data "$where" bash -c 'git -C "$1" show a7221968:eval/data/problems_all.jsonl > "$2"' show \
            "$given/SciCode" "$given/problems.jsonl"
        convert scicode scicode scicode "$given/SciCode" "$given/problems.jsonl" "$SCICODE_TARGETS"
    else
        echo "left out: SciCode, for which SCICODE_TARGETS must name test_data.h5"
    fi

    if [ "${USER_BASE_URL:-}" ]; then
        clone sierra-research/tau2-bench fc0055dc
        environment tau2 python3.12 "$given/tau2-bench" litellm==1.82.6 openai==3.54.0 pydantic==2.14.3
    else
        echo "left out: tau2-bench, whose user is a model at USER_BASE_URL"
    fi
}

# evaluate_generalization base|tuned CHECKPOINT
evaluate_generalization() {
    local arm name
    local own=(--config "recipes/$recipe/eval.yaml" "--vllm_args=$vllm")
    for arm in tools no_tools; do
        declare -n flags=$arm
        for name in "${benchmarks[@]}"; do
            local more=() tasks=$given/$name/tasks.jsonl
            [ "$arm" = tools ] || tasks=$given/$name/no_tools.jsonl
            [ "$name $arm" != "ds1000 no_tools" ] || more=(--max_tokens 1024)
            [ "$name" != scicode ] || more=(--check_seconds 2000)
            step "$1-$arm-$name" "$serving" "${on_gpus[@]}" python 04_eval.py "${own[@]}" "${flags[@]}" "${more[@]}" \
                --tasks "$tasks" --rounds 1 --n_runs 1 --temperature 0 --model "$2" \
                --output_dir "$results/$1-$arm-$name"
        done
    done
    for name in "${domains[@]}"; do
        step "$1-no_tools-tau2-$name" "$serving" "${on_gpus[@]}" bash recipes/limi/served.sh "${own[@]}" --model "$2" \
            --port 8000 -- python recipes/benchmarks/tau2.py "$given/tau2-bench" --venv "$given/tau2-venv" \
            --domain "$name" --base_url http://localhost:8000/v1 --model "$2" \
            --user_base_url "$USER_BASE_URL" --user_model "$USER_MODEL" \
            --output_dir "$results/$1-no_tools-tau2-$name"
    done
}
