"""Every row of README's table of ablations, from its command to its comparison, on a model of two layers:
rows, training, a server for the checkpoint, 04, --compare. What the models score means nothing; that each
ablation changes its one thing and ends in figures beside the recipe's is what is tested."""

import importlib
import json
import re
import shlex
import shutil
import signal
import sys

import pytest
from conftest import ROOT
from scripted import write_tasks

pytestmark = [pytest.mark.demo, pytest.mark.usefixtures("one_thread")]
ANSWER = "Done."
FLAGS = "--global_batch_size 4 --max_steps 3 --learning_rate 1e-3 --warmup_steps 1"
FLAGS += " --gradient_checkpointing false --save_steps 0"
TASKS = 5  # the fewest for an interval


def ablations():
    """The commands of README's table; "with `--flag`" belongs to the script named before it."""
    table = (ROOT / "README.md").read_text().partition("## Ablations\n")[2].partition("\n## ")[0]
    commands = []
    for line in table.splitlines():
        if not line.startswith("|"):
            continue
        script = None
        for code in re.findall(r"`([^`]+)`", line):
            if code.startswith("--"):
                code = f"{script} ... {code}"
            script = code.split(" ")[0]
            commands.append(code)
    return commands


ABLATIONS = ablations()


# ------------------------------------------------------------------------------------------------------------
# A model, its rows, its tasks, its server


def log(number):
    tool = {"name": "run_shell_command", "description": "Run it.", "parameters": {"type": "object"}}
    call = {"id": "c", "type": "function"}
    call["function"] = {"name": tool["name"], "arguments": {"command": f"touch {number}"}}
    messages = [{"role": "user", "content": f"Make {number}."}]
    messages.append({"role": "assistant", "content": "", "tool_calls": [call]})
    messages[-1]["reasoning_content"] = f"It wants {number}."
    messages.append({"role": "tool", "tool_call_id": "c", "content": "(no output)"})
    messages.append({"role": "assistant", "content": ANSWER})
    tools = [{"type": "function", "function": tool}]
    return {"query_id": f"q{number}", "messages": messages, "tools": tools}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Eight logs, and the tasks that they come from: two domains, two sources."""
    folder = tmp_path_factory.mktemp("ablations")
    (folder / "logs").mkdir()
    tasks = []
    for number in range(8):
        (folder / "logs" / f"{number}.json").write_text(json.dumps(log(number)))
        task = {"query_id": f"q{number}", "turns": [{"query": f"Make {number}.", "check": "true"}]}
        task["domain"] = "research" if number % 2 else "vibe_coding"
        task["source"] = "pull_request" if number < 4 else "real"
        tasks.append(task)
    write_tasks(folder, *tasks)
    return folder


@pytest.fixture(scope="module")
def base(folder, make_model):
    """GLM-4.5 with two layers, one of four experts, a token a byte."""
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    tok = make_model.make_tokenizer(["a"], vocab_size=277)
    config = make_model.make_config(tok)
    config.update({"hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16})
    config.update({"num_hidden_layers": 2, "n_routed_experts": 4, "num_attention_heads": 2})
    config.num_key_value_heads = 1
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.generation_config = GenerationConfig(eos_token_id=config.eos_token_id)
    model.save_pretrained(folder / "base")
    tok.save_pretrained(folder / "base")
    return folder / "base"


@pytest.fixture(scope="module")
def make_rows(folder, run_stage):
    def make(name, *flags):
        path = folder / f"{name}.jsonl"
        words = [folder / "logs", "--queries", folder / "queries.jsonl", "--output_file", path]
        done = run_stage("02_format_trajectories.py", *words, *flags)
        assert done.returncode == 0, done.stderr
        return path

    return make


@pytest.fixture(scope="module")
def train(base, folder, stage):
    def run(name, rows, *flags):
        """recipe.json of a training that takes the recipe's flags, and then these."""
        sft = stage("03_sft")
        words = f"--model_name_or_path {base} --train_file {rows} --output_dir {folder / name} {FLAGS}"
        sft.main(*sft.read_settings(sft.make_parser(), [*words.split(), *map(str, flags)]))
        return json.loads((folder / name / "recipe.json").read_text())

    return run


def server_of(checkpoint):
    """What stands in the place of vLLM: the checkpoint's own next tokens, at temperature 0."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tok = AutoTokenizer.from_pretrained(checkpoint)
    model = AutoModelForCausalLM.from_pretrained(checkpoint)

    def reply(body):
        tools = body.get("tools")
        ids = tok.apply_chat_template(
            body["messages"], tools=tools, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        made = model.generate(**ids, max_new_tokens=8, do_sample=False)[0, ids["input_ids"].shape[1] :]
        return {"content": tok.decode(made, skip_special_tokens=True), "finish_reason": "stop"}

    return reply


@pytest.fixture
def evaluate(folder, endpoint, stage, tmp_path, monkeypatch):
    """evaluate(checkpoint, name, *flags): 04 on tasks of its own; its summary."""
    m = stage("04_eval")
    tasks = []
    for number in range(TASKS):
        tasks.append((f"t{number}", [(f"Make {number}.", "test -s /answer.md")]))
    path = write_tasks(tmp_path, *tasks)

    def run(checkpoint, name, *flags):
        endpoint.otherwise = server_of(checkpoint)
        output = folder / "results" / name
        words = f"--model {checkpoint} --base_url {endpoint.url} --tasks {path} --output_dir {output}"
        words += " --temperature 0 --max_steps 1 --rounds 2 --concurrency 1"
        if "--no_tools" not in flags:  # our eight tools are 8,000 tokens of a byte each
            words += f" --tools {ROOT / 'recipes/tools/bash.py'}"
        monkeypatch.setattr(sys, "argv", ["04_eval.py", *words.split(), *flags])
        before = signal.getsignal(signal.SIGTERM)
        try:
            m.main(*m.parse_settings(m.TrlParser(m.Settings)))
        finally:
            signal.signal(signal.SIGTERM, before)
        return json.loads((output / "summary.json").read_text())

    return run


@pytest.fixture(scope="module")
def recipe(make_rows, train):
    return train("recipe", make_rows("train"))


def compared(stage, folder, capsys, name):
    """Lines of 04 --compare: the recipe's run, then the ablation's."""
    capsys.readouterr()
    results = folder / "results"
    stage("04_eval").compare([str(results / "recipe"), str(results / name)], None)
    return capsys.readouterr().out


# ------------------------------------------------------------------------------------------------------------
# The table


def test_the_table_has_commands():
    assert len(ABLATIONS) >= 10
    assert {command.split()[0] for command in ABLATIONS} == {"bash", "02", "03", "04"}


@pytest.mark.skipif(not shutil.which("bwrap"), reason="needs bubblewrap")
@pytest.mark.parametrize("command", [command for command in ABLATIONS if command[:2] in ("02", "03", "04")])
def test_an_ablation_ends_beside_the_recipe(
    command, folder, recipe, make_rows, train, evaluate, stage, capsys
):
    script, *flags = shlex.split(command.replace(" ...", ""))
    name = "_".join([script, *flags]).replace("=", "-").replace("/", "-")
    if not (folder / "results/recipe").exists():
        evaluate(folder / "recipe", "recipe")
    changed = recipe
    if script == "02":
        rows = make_rows(name, *flags)
        changed = train(name, rows)
        assert len(rows.read_text().splitlines()) == 4
    if script == "03":
        changed = train(name, folder / "train.jsonl", *flags)
    assert changed["loss"] != recipe["loss"] or script == "04"
    checkpoint = folder / ("recipe" if script == "04" else name)
    summary = evaluate(checkpoint, name, *(flags if script == "04" else []))
    assert summary["tasks"] == TASKS and not summary["not_run"]
    text = compared(stage, folder, capsys, name)
    assert re.search(r"^FTFC: .+ -> .+\n    against \S+/recipe: .+, p = ", text, re.MULTILINE), text
    assert ("different --rounds" in text) == ("--rounds" in flags)


@pytest.mark.skipif(not shutil.which("bwrap"), reason="needs bubblewrap")
def test_the_curve_ends_in_its_table(folder, base, make_rows, train, evaluate, monkeypatch, capsys):
    """Each run of the plan as curve.sh makes it, with a second set."""
    sys.path.insert(0, str(ROOT / "recipes"))
    curve = importlib.import_module("curve")
    monkeypatch.setattr(curve, "ROOT", folder)
    (folder / "recipes/tiny").mkdir(parents=True)
    settings = {"model_name_or_path": str(base), "global_batch_size": 4}
    settings |= {"num_train_epochs": 2, "warmup_steps": 1}
    (folder / "recipes/tiny/sft.yaml").write_text(json.dumps(settings))
    rows = make_rows("train")
    lines = rows.read_text().splitlines(keepends=True)
    (folder / "other.jsonl").write_text("".join(lines[:3]))
    curve.plan("tiny", rows, [8], 1, against=folder / "other.jsonl")
    (folder / "results").mkdir(exist_ok=True)
    for line in (folder / "results/curve-tiny/runs.tsv").read_text().splitlines():
        run, checkpoint, part, updates, seed = line.split("\t")
        if run != "base":
            made = train(checkpoint, folder / part, "--max_steps", updates, "--seed", seed)
            assert made["steps"] == int(updates)
        evaluate(folder / checkpoint if run != "base" else base, f"curve-tiny/{run}")
    curve.table("tiny")
    table = (folder / "results/curve-tiny/table.md").read_text().splitlines()
    names = [line.split(" | ")[0] for line in table if line.startswith("| ")]
    assert names[2:] == ["| the base", *["| 8 rows"] * 2, *["| 3 other rows"] * 2]
    assert sum(line.startswith("- 8 rows minus 3 other rows at equal ") for line in table) == 2
    assert (folder / "results/curve-tiny/curve.png").exists()
