"""The paper from zero: run.sh's commands exist, run once and go on where they stopped; tables."""

import functools
import importlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys

import pytest
import yaml
from conftest import ROOT

LIMI = ROOT / "recipes" / "limi"
TINY_SUMMARY = {
    "metrics": {"FTFC": 0.5, "FTFC_ci": [0.25, 0.75], "RC@3": 0.25, "SR@3": 0.75},
    "tasks": 4,
    "episodes": 7,
    "not_run": {"killed": 1},
    "warnings": ["every answer was cut"],
}


def load(name):
    spec = importlib.util.spec_from_file_location(name, LIMI / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def table():
    return load("table")


@pytest.fixture(scope="module")
def cost():
    return load("cost")


@pytest.fixture
def checkout(tmp_path):
    """A folder with run.sh and the recipes, and beside it programs that only write down how they were called
    (cost.py runs); one whose command holds the word in the file "fails" ends with 1, the word in "kills" ends
    run.sh itself at once."""
    root = tmp_path / "checkout"
    files = [*ROOT.glob("recipes/*/*.yaml"), *ROOT.glob("recipes/*/config.json")]
    for path in [*files, *LIMI.glob("*.sh"), LIMI / "cost.py"]:
        (root / path.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, root / path.relative_to(ROOT))
    (root / "recipes/demo/setup.sh").write_text("")
    programs = tmp_path / "programs"
    programs.mkdir()
    names = "python accelerate git srun curl python3.10 python3.11 python3.12 pip"
    for name in names.split():
        (programs / name).write_text(
            f"""#!/bin/bash
            [[ $1 != *cost.py ]] || exec {sys.executable} "$@"
            echo "${{0##*/}} $*" >> {tmp_path}/calls
            case "$*" in *"$(cat {tmp_path}/fails 2> /dev/null || echo never)"*) exit 1 ;; esac
            case "$*" in *"$(cat {tmp_path}/kills 2> /dev/null || echo never)"*) kill -KILL $PPID ;; esac
            [ "$1 $2" != "-m venv" ] || {{ mkdir -p "$3/bin"; cp {programs}/pip {programs}/python "$3/bin"; }}
            """
        )
        (programs / name).chmod(0o755)
    return root


@pytest.fixture
def run(checkout, tmp_path):
    """run(*flags) -> (the finished process, the programs it called)."""

    def call(*flags, **environment):
        calls = tmp_path / "calls"
        calls.write_text("")
        outside = dict(os.environ)
        for key in os.environ:
            if key.startswith(("SLURM", "JUDGE", "USER_")):
                del outside[key]
        path = f"{tmp_path}/programs:{os.environ['PATH']}"
        command = ["bash", "recipes/limi/run.sh", *flags]
        environment = outside | {"PATH": path} | environment
        done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True)
        return done, calls.read_text().splitlines()

    return call


def planned(output: str) -> list[tuple[str, str, list[str]]]:
    """[(step, where, the command's words)] of what --plan prints."""
    found = re.findall(r"^=== \d+\. (\S+), on (.+)\n(.+)$", output, re.MULTILINE)
    return [(step, where, shlex.split(command)) for step, where, command in found]


def times_of(output: str) -> dict[str, str]:
    """{step: the line below its command}"""
    return dict(re.findall(r"^=== \d+\. (\S+), on .+\n.+\n(about .+)$", output, re.MULTILINE))


# ------------------------------------------------------------------------------------------------------------
# The plan


def parse_training(words, sft):
    split = words.index("03_sft.py")
    sft.check_flags(*sft.read_settings(sft.make_parser(), words[split + 1 :]))
    launcher = importlib.import_module("accelerate.commands.launch").launch_command_parser()
    if "--config_file" in words:
        launcher.parse_args(words[words.index("--config_file") : split + 1])


def parse_stage(words, module, positional):
    from trl import TrlParser

    parser = TrlParser(module.Settings, allow_abbrev=False)
    if positional:
        parser.add_argument("inputs", nargs="*")
    settings = parser.parse_args_and_config(words)[0]
    if hasattr(module, "check_settings"):
        module.check_settings(settings)


@functools.cache
def refusal(script: str, words: tuple[str, ...]) -> str:
    """What a recipe says to a command whose files are not there: never that it does not know a flag."""
    done = subprocess.run([sys.executable, ROOT / script, *words], capture_output=True, text=True)
    assert done.returncode == 2, done
    return done.stderr


def parse_recipe(script, flags):
    if script.startswith("recipes/demo"):
        source = (ROOT / script).read_text()  # they would start to work
        assert all(f'"{word}"' in source for word in flags if word.startswith("--"))
        return
    told = refusal(script, tuple(flags))
    assert len(told.splitlines()) == 1, told
    assert "unrecognized" not in told, told


def parse(words, stage):
    """Parse one command as the programs do that it starts; an unknown flag raises."""
    scripts = [place for place, word in enumerate(words) if word.endswith((".py", "served.sh"))]
    if not scripts:
        return  # git, pip, curl
    script = words[scripts[0]]
    flags = words[scripts[0] + 1 :]
    if script.endswith("served.sh"):
        split = flags.index("--")
        parse(["04_eval.py", "--serve", *flags[:split]], stage)
        parse(flags[split + 1 :], stage)
    elif script == "03_sft.py":
        parse_training(words, stage("03_sft"))
    elif script.startswith("0"):
        module = stage(script.removesuffix(".py"))
        parse_stage(flags, module, positional=script.startswith("02"))
    else:
        parse_recipe(script, flags)


TAU2 = {"USER_BASE_URL": "http://user/v1", "USER_MODEL": "user"}
JUDGE = {"JUDGE_BASE_URL": "http://judge/v1", "JUDGE_MODEL": "judge"}
PLANS = [
    (("Qwen/Qwen3-8B",), {}, 10),
    (("Qwen/Qwen3-8B",), JUDGE, 10),
    (("zai-org/GLM-4.5-Air", "--nodes", "4"), JUDGE, 10),
    (("zai-org/GLM-4.5-Air", "--generalization"), TAU2 | {"SCICODE_TARGETS": "/none/test_data.h5"}, 55),
    (("qwen3-4b", "--nodes", "2", "--revision", "abc"), {}, 10),
    (("--miniature",), {}, 9),
]


@pytest.mark.parametrize(("flags", "environment", "number"), PLANS)
def test_every_planned_command_parses(run, stage, monkeypatch, flags, environment, number):
    monkeypatch.chdir(ROOT)
    done, calls = run(*flags, "--plan", **environment)
    assert done.returncode == 0, done.stderr
    assert all("memory.py" in call for call in calls)
    steps = planned(done.stdout)
    assert len(steps) == done.stdout.count("===") == number
    for _, _, words in steps:
        for word in words:
            assert not word.endswith(".py") or (ROOT / word).exists(), word
        parse(words, stage)


def test_the_plan_says_where_and_how_much_memory_and_makes_nothing(run, checkout):
    done, _ = run("zai-org/GLM-4.5-Air", "--plan")
    before = "benchmark commit tasks rows training base-tools base-no_tools tuned-tools tuned-no_tools table"
    assert [step for step, _, _ in planned(done.stdout)] == before.split()
    where = {step: where for step, where, _ in planned(done.stdout)}
    assert where["rows"] == "a machine with a network"
    assert where["training"] == "4 node(s) of 8 GPUs"
    memory = "python recipes/memory.py --config recipes/glm-4.5-air/sft.yaml"
    memory += " --model_name_or_path zai-org/GLM-4.5-Air"
    assert f"{memory} --longest 125000 --devices 32 --cp 8 --card 141" in done.stdout
    assert not list(checkout.glob("data")) + list(checkout.glob("results")) + list(checkout.glob("outputs"))


def test_the_plan_says_how_long_each_step_takes_on_a_gpu(run):
    """By hand: 12.18 billion weights at work, 46 layers, 96 heads of 128; 2.0e6 tokens at 1,000 a second."""
    done, _ = run("zai-org/GLM-4.5-Air", "--plan")
    times = times_of(done.stdout)
    weights = 6 * 12.18e9 * 42_400 * 78 * 8
    attention = 6 * 46 * 96 * 128 * 2.5e9 * 78 * 8
    hours = (weights + attention) / (0.15 * 990e12) / 3600
    assert times["training"] == f"about {60 * hours / 32:.0f} min on 32 H100, {hours:.1f} GPU h, calculated"
    assert times["base-tools"] == "about 43 min on 4 H100, 2.9 GPU h, calculated"
    assert list(times) == ["training", "base-tools", "base-no_tools", "tuned-tools", "tuned-no_tools"]


@pytest.mark.parametrize(
    ("recipe", "billions", "at_work"),
    [
        ("qwen3-4b", 4.02, 3.63),
        ("qwen3-8b", 8.19, 6.95),
        ("qwen3-32b", 32.76, 31.21),
        ("glm-4.5-air", 106.85, 12.18),
        ("glm-4.5", 352.80, 32.08),
    ],
)
def test_the_shapes_beside_the_recipes_have_the_published_sizes(cost, recipe, billions, at_work):
    """As the model cards have them (GLM: 12 and 32 billion at work); at work: without embedding."""
    config = json.loads((ROOT / "recipes" / recipe / "config.json").read_text())
    weights, active = cost.count_weights(config)
    assert (round(weights / 1e9, 2), round(active / 1e9, 2)) == (billions, at_work)


@pytest.fixture
def memory():
    sys.path.insert(0, str(ROOT / "recipes"))
    return importlib.import_module("memory")


def test_the_memory_of_a_recipe_is_calculated_without_asking_anybody(stage, memory, monkeypatch, capsys):
    sft = stage("03_sft")
    flags = ["memory.py", "--longest", "125000", "--devices", "8", "--model_name_or_path"]
    monkeypatch.setattr(sys, "argv", [*flags, "Qwen/Qwen3-8B"])
    memory.main(sft)
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith("  8 device(s), FSDP2, 1 at one sample: 58.0 of 80 GB (weights 4.1, ")
    monkeypatch.setattr(sys, "argv", [*flags, "nobody/Nothing-1B"])
    told = "nobody/Nothing-1B: its config.json is not on this machine; with a network: hf download"
    with pytest.raises(sft.InputError, match=told):
        memory.main(sft)
    code = "import os, sys; sys.path.insert(0, 'recipes'); import memory; print(os.environ['HF_HUB_OFFLINE'])"
    environment = os.environ | {"HF_HUB_OFFLINE": "0"}
    asked = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True)
    assert asked.stdout == b"1\n"  # before the Hub's client is imported, which reads it


def test_the_benchmarks_of_tables_3_and_4_run_with_tools_and_without(run):
    done, calls = run("Qwen/Qwen3-8B", "--generalization")
    assert done.returncode == 0, done.stderr
    assert "left out: SciCode" in done.stdout and "left out: tau2-bench" in done.stdout
    arms = [re.search(r"limi-qwen3-8b/(\S+)$", call)[1] for call in calls if "04_eval.py" in call]
    expected = []
    for model in ("base", "tuned"):
        expected += [f"{model}-tools", f"{model}-no_tools"]
        for arm in ("tools", "no_tools"):
            expected += [f"{model}-{arm}-{name}" for name in ("humaneval", "mbpp", "ds1000")]
    assert arms == expected
    without = [call for call in calls if "no_tools-" in call]
    assert all("--no_tools --" in call and "/no_tools.jsonl" in call for call in without)
    assert sum("--max_tokens 1024" in call for call in calls) == 2


def test_benchmarks_are_prepared_once_for_all_models(run):
    _, first = run("Qwen/Qwen3-8B", "--generalization", "--prepare")
    _, second = run("Qwen/Qwen3-4B", "--generalization", "--prepare")
    assert sum("limi-benchmarks" in call for call in first) == 12
    assert not [call for call in second if "limi-benchmarks" in call]


def test_the_packages_of_a_benchmark_are_those_of_its_converter():
    script = (LIMI / "generalization.sh").read_text().replace("\\\n", " ")
    for packages in re.findall(r"environment (\S+) python\S+ (.+)", script):
        name = packages[0]
        head = (ROOT / f"recipes/benchmarks/{name}.py").read_text().split('"""')[1].replace("\\\n", " ")
        for pin in re.findall(r"\S+==\S+", packages[1]):
            assert pin in head, f"{name}: {pin}"


def test_both_models_are_served_with_the_same_window(run):
    for model, window in (("Qwen/Qwen3-8B", "40960"), ("zai-org/GLM-4.5-Air", "131072")):
        done, _ = run(model, "--plan")
        windows = []
        for step, _, words in planned(done.stdout):
            if "tools" in step:
                windows.append(re.search(r"--max-model-len (\d+)", " ".join(words))[1])
        assert windows == [window] * 4


def test_several_nodes_are_started_by_srun_with_the_number_of_each(run):
    done, _ = run("glm-4.5-air", "--nodes", "4", "--plan")
    steps = {}
    for step, _, command in planned(done.stdout):
        steps[step] = command
    words = steps["training"]
    assert words[:3] == ["srun", "--nodes=4", "--ntasks-per-node=1"]
    assert "--machine_rank $SLURM_NODEID --main_process_ip $HOST" in words[5]
    assert words[words.index("--num_processes") + 1] == "32"
    assert words[words.index("--parallelism_config_dp_shard_size") + 1] == "4"
    assert steps["tuned-tools"][:3] == ["srun", "--nodes=1", "--ntasks=1"]


FLAGS = "--plan, --prepare, --nodes, --revision, --generalization and --miniature"


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ((), "which model? e.g. bash recipes/limi/run.sh Qwen/Qwen3-8B --plan"),
        (("x/other",), "no recipe for x/other; there are: glm-4.5 glm-4.5-air qwen3-32b qwen3-4b qwen3-8b "),
        (("a", "b"), "one model at a time: a or b?"),
        (("a", "--nodes"), "--nodes needs a value"),
        (("a", "--nodes", "two"), "--nodes two: a number of nodes"),
        (("--x",), f"no such flag: --x; there are {FLAGS}"),
        (("glm-4.5-air",), "4 nodes: sbatch --nodes=4 recipes/limi/job.sbatch glm-4.5-air"),
        (("--miniature", "--nodes", "2"), "--miniature has its own model, node, rows and tasks"),
    ],
)
def test_a_mistake_is_one_line(run, flags, told):
    done, calls = run(*flags)
    assert (done.returncode, done.stderr, calls) == (2, f"run.sh: {told}\n", [])


# ------------------------------------------------------------------------------------------------------------
# Running it


@pytest.fixture
def served(checkout, tmp_path):
    """served(port, server, *command) -> the finished process; server: what stands in for 04 --serve."""

    def call(port, server, *command):
        python = tmp_path / "programs" / "python"
        python.write_text(f"#!/bin/bash\nexec {server}\n")
        python.chmod(0o755)
        path = f"{tmp_path}/programs:{os.environ['PATH']}"
        words = ["bash", "recipes/limi/served.sh", "--model", "m", "--port", str(port), "--", *command]
        environment = os.environ | {"PATH": path}
        return subprocess.run(words, cwd=checkout, env=environment, capture_output=True, text=True)

    return call


def test_a_command_runs_beside_a_served_model_and_then_the_server_ends(served, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    late = f"bash -c 'sleep 0.5; exec {sys.executable} -m http.server --bind localhost {port}'"
    fetch = f"import urllib.request; print(urllib.request.urlopen('http://localhost:{port}/').status)"
    done = served(port, late, sys.executable, "-c", fetch)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "200"), done.stderr
    with socket.socket() as again:
        assert again.connect_ex(("127.0.0.1", port)) != 0
    assert served(port, late, "bash", "-c", "exit 3").returncode == 3


def test_a_server_that_does_not_come_up_ends_the_step(served):
    done = served(9, "false", "echo", "never")
    assert (done.returncode, done.stdout) == (1, "")
    assert "served.sh: the server has ended" in done.stderr


def test_a_port_that_is_taken_serves_another_model(served):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        done = served(port, "sleep 60", "echo", "never")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"served.sh: port {port} is taken; name another: --port\n"


def test_a_step_that_is_done_is_skipped_and_one_that_failed_runs_again(run, tmp_path):
    (tmp_path / "fails").write_text("03_sft.py")
    done, calls = run("Qwen/Qwen3-8B")
    assert done.returncode == 1
    assert [call.split()[0] for call in calls] == ["git", "git", "python", "python", "accelerate"]
    (tmp_path / "fails").unlink()
    done, calls = run("Qwen/Qwen3-8B")
    assert done.returncode == 0 and done.stdout.count("done before") == 4
    assert ["03_sft.py" in call for call in calls] == [True, False, False, False, False, False]
    arms = re.findall(r"--model (\S+) --output_dir (\S+)", "\n".join(calls))
    assert arms == [
        ("Qwen/Qwen3-8B", "results/limi-qwen3-8b/base-tools"),
        ("Qwen/Qwen3-8B", "results/limi-qwen3-8b/base-no_tools"),
        ("outputs/limi-qwen3-8b/tuned", "results/limi-qwen3-8b/tuned-tools"),
        ("outputs/limi-qwen3-8b/tuned", "results/limi-qwen3-8b/tuned-no_tools"),
    ]
    _, calls = run("Qwen/Qwen3-8B")
    assert [call.split()[1] for call in calls] == ["recipes/limi/table.py"]


@pytest.mark.parametrize(
    ("reasons", "code"),
    [([], 0), (["missing_need"], 0), (["missing_need", "endpoint_error"], 1), (None, 1)],
)
def test_neither_a_warning_nor_an_episode_to_repeat_keeps_the_table_away(run, checkout, tmp_path, reasons, code):
    """04 ends with 1 in all these cases; None: it has written no summary."""
    (tmp_path / "fails").write_text("base-tools")
    folder = checkout / "results/limi-qwen3-8b/base-tools"
    if reasons is not None:
        folder.mkdir(parents=True)
        (folder / "summary.json").write_text("{}")
        lines = [json.dumps({"query_id": "q", "run": 0, "reason": reason}) for reason in reasons]
        (folder / "not_run.jsonl").write_text("".join(line + "\n" for line in lines))
    done, calls = run("Qwen/Qwen3-8B")
    assert done.returncode == code
    tried_again = "run.sh: not all episodes ran in base-tools; the same command tries them again\n"
    assert done.stderr == (tried_again if code and reasons else "")
    assert ("recipes/limi/table.py" in calls[-1]) == (reasons is not None)  # made of what there is
    assert (checkout / "results/limi-qwen3-8b/done/base-tools").exists() == (code == 0)


def test_a_run_that_is_killed_twice_does_what_is_left_and_no_more(run, tmp_path):
    _, whole = run("Qwen/Qwen3-8B")
    shutil.rmtree(tmp_path / "checkout" / "results")
    calls = []
    for place in ("03_sft.py", "tuned-no_tools"):
        (tmp_path / "kills").write_text(place)
        done, before = run("Qwen/Qwen3-8B")
        assert done.returncode == -9
        calls += before[:-1]  # the last one was cut short
    (tmp_path / "kills").unlink()
    done, rest = run("Qwen/Qwen3-8B")
    assert done.returncode == 0
    assert calls + rest == whole


def test_a_step_whose_command_has_changed_runs_again(run):
    run("Qwen/Qwen3-8B", "--prepare")
    _, calls = run("Qwen/Qwen3-8B", "--prepare", "--revision", "abc")
    assert len(calls) == 1
    assert "02_format_trajectories.py GAIR/LIMI@abc " in calls[0]


def called(calls):
    """The scripts of these calls, of 04 the folder that it writes."""
    names = []
    for call in calls:
        words = call.split()
        script = next(word.split("/")[-1] for word in words if word.endswith(".py"))
        names.append(words[-1].split("/")[-1] if script == "04_eval.py" else script)
    return names


def test_a_step_whose_files_have_changed_runs_again(run, checkout):
    run("Qwen/Qwen3-8B")
    rows = checkout / "data/limi-qwen3-8b/train.jsonl"
    rows.parent.mkdir(parents=True)
    rows.write_text("{}\n")
    _, calls = run("Qwen/Qwen3-8B")
    assert called(calls) == ["03_sft.py", "table.py"]
    trained = checkout / "outputs/limi-qwen3-8b/tuned/recipe.json"
    trained.parent.mkdir(parents=True)
    trained.write_text("{}")
    _, calls = run("Qwen/Qwen3-8B")
    assert called(calls) == ["tuned-tools", "tuned-no_tools", "table.py"]
    with (checkout / "recipes/qwen3-8b/eval.yaml").open("a") as file:
        file.write("seed: 2\n")
    _, calls = run("Qwen/Qwen3-8B")
    assert called(calls) == ["base-tools", "base-no_tools", "tuned-tools", "tuned-no_tools", "table.py"]


def test_a_clone_made_again_is_set_to_its_commit_again(run, checkout):
    run("Qwen/Qwen3-8B", "--prepare")
    (checkout / "results/limi-qwen3-8b/done/benchmark").unlink()
    _, calls = run("Qwen/Qwen3-8B", "--prepare")
    assert [call.split()[:2] for call in calls] == [["git", "clone"], ["git", "-C"]]


def test_episodes_that_tau2_bench_lost_are_not_a_warning(run, checkout):
    """Its runner ends with 1 for those alone, and names them nowhere but in its summary."""
    folder = checkout / "results/limi-qwen3-8b/base-no_tools-tau2-airline"
    folder.mkdir(parents=True)
    (folder / "summary.json").write_text("{}")
    done, _ = run("Qwen/Qwen3-8B", "--generalization", **TAU2)
    assert done.returncode == 1
    assert not (checkout / "results/limi-qwen3-8b/done/base-no_tools-tau2-airline").exists()


@pytest.mark.parametrize("who", ["JUDGE", "USER"])
def test_an_endpoint_without_its_model_is_told_before_anything_runs(run, who):
    done, calls = run("Qwen/Qwen3-8B", "--generalization", **{f"{who}_BASE_URL": "http://there/v1"})
    assert (done.returncode, calls) == (2, [])
    assert done.stderr.startswith(f"run.sh: {who}_BASE_URL without {who}_MODEL: name the ")


def test_a_name_with_a_space_and_a_quote_stays_one_word(run):
    model = "my model's/Qwen3-8B"
    done, _ = run(model, "--plan")
    for step, _, words in planned(done.stdout):
        assert (model in words) == (step in ("rows", "training", "base-tools", "base-no_tools")), step
    (memory,) = re.findall(r"^python recipes/memory.py .+", done.stdout, re.MULTILINE)
    assert model in shlex.split(memory)


def test_prepare_runs_what_needs_a_network_and_no_more(run):
    done, calls = run("zai-org/GLM-4.5", "--prepare")
    assert done.returncode == 0
    assert [call.split()[0] for call in calls] == ["git", "git", "python", "python"]


def test_the_job_leaves_time_to_save_and_asks_nobody():
    job = (LIMI / "job.sbatch").read_text()
    assert subprocess.run(["bash", "-n", LIMI / "job.sbatch"]).returncode == 0
    for line in ("#SBATCH --signal=TERM@900", "#SBATCH --requeue", "#SBATCH --mem=0", "HF_HUB_OFFLINE=1"):
        assert line in job
    assert re.search(r"export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=900\b", job)


# ------------------------------------------------------------------------------------------------------------
# The tables


def test_the_readme_holds_the_table_of_the_claims(table):
    _, held, _ = table.split_readme()
    assert held == table.claims_table()


def test_every_claim_is_there_and_its_command_exists(table, stage, monkeypatch):
    monkeypatch.chdir(ROOT)
    claims = yaml.safe_load((LIMI / "claims.yaml").read_text())
    where = " ".join(claim["where"] for claim in claims)
    for place in ("Table 2", "Table 3", "Table 4", "Fig. 1", "Fig. 2", "Fig. 4", "abstract", "text"):
        assert place in where, place
    numbers = " ".join(claim["claim"] + claim["paper"] for claim in claims)
    for number in ("73.5", "45.1", "53.7", "128 times", "57.2", "7.2 points", "36.7", "29.2", "34.3"):
        assert number in numbers, number
    for claim in claims:
        words = shlex.split(claim["command"])
        if words[0] != "none;":
            programs = [word for word in words if re.search(r"\.(py|sh|sbatch)$", word)]
            assert all((ROOT / program).exists() for program in programs)
            parse(words, stage)


def test_a_claim_that_lacks_something_is_told(table, tmp_path, monkeypatch):
    (tmp_path / "claims.yaml").write_text("- {claim: It flies, where: Fig. 9}\n")
    monkeypatch.setattr(table, "HERE", tmp_path)
    with pytest.raises(table.InputError, match="'It flies': wants exactly claim, where, paper"):
        table.claims_table()


def test_runs_stand_beside_the_papers_numbers(table, tmp_path):
    for arm in table.ARMS:
        (tmp_path / arm).mkdir()
        (tmp_path / arm / "summary.json").write_text(json.dumps(TINY_SUMMARY))
    lines = table.runs_table(tmp_path, "glm-4.5").splitlines()
    ours = " | 50.0 [25.0, 75.0]" * 4
    arms = "base, tools | tuned, tools | base, no_tools | tuned, no_tools"
    assert lines[0] == f"| % | paper: base | paper: tuned | {arms} |"
    assert lines[2] == f"| FTFC | 37.8 | 71.7{ours} |"
    assert lines[5] == f"| average | 45.1 | 73.5{' | 50.0' * 4} |"
    assert "- tuned-tools: 4 tasks, 7 episodes, 1 not run" in lines
    assert "- tuned-tools, beware: every answer was cut" in lines
    dense = table.runs_table(tmp_path, "qwen3-8b").splitlines()
    assert dense[2] == f"| FTFC |  | {ours} |"
    assert dense[5].startswith("| average | 7.3 | 10.6 |")
    (tmp_path / "tuned-tools" / "summary.json").unlink()
    with pytest.raises(table.InputError, match="tuned-tools/summary.json: no such file"):
        table.runs_table(tmp_path, "glm-4.5")


def test_generalization_stands_beside_tables_3_and_4(table, tmp_path):
    solved = {"humaneval": {"SR@1": 0.9}, "scicode": {"pass@1": 0.02, "SR@1 over turns": 0.25}}
    for arm in table.ARMS:
        for name, metrics in ({"": TINY_SUMMARY["metrics"]} | solved).items():
            folder = tmp_path / f"{arm}-{name}".rstrip("-")
            folder.mkdir()
            (folder / "summary.json").write_text(json.dumps(TINY_SUMMARY | {"metrics": metrics}))
    (tmp_path / "base-no_tools-tau2-retail").mkdir()
    lost = json.dumps({"metrics": {"pass^4": None}, "tasks": 114, "not_run": {"fault": 2}})
    (tmp_path / "base-no_tools-tau2-retail" / "summary.json").write_text(lost)
    lines = table.runs_table(tmp_path, "glm-4.5").splitlines()
    start = lines.index("") + 1
    head = "| % | Table 3: base | Table 3: tuned | base, tools | tuned, tools | Table 4: base"
    assert lines[start].startswith(head)
    assert lines[start + 2 : start + 6] == [
        "| tau2-retail, pass^4 | 36.8 | 45.6 |  |  | 52.6 | 49.1 | not all ran |  |",
        "| HumanEval+, SR@1 | 90.2 | 92.1 | 90.0 | 90.0 | 92.1 | 92.5 | 90.0 | 90.0 |",
        "| SciCode, pass@1 | 1.5 | 3.1 | 2.0 | 2.0 | 3.3 | 3.3 | 2.0 | 2.0 |",
        "| SciCode, SR@1 over turns | 25.3 | 25.3 | 25.0 | 25.0 | 27.8 | 28.1 | 25.0 | 25.0 |",
    ]
    for run in ("base-tools", "tuned-no_tools-humaneval"):
        assert f"- {run}: 4 tasks, 7 episodes, 1 not run" in lines
    assert "- tuned-no_tools-humaneval, beware: every answer was cut" in lines
    assert "- base-no_tools-tau2-retail: 114 tasks, 2 not run" in lines
    (tmp_path / "base-tools-mbpp").mkdir()  # cut short: no line of its own, and the table is there
    assert table.runs_table(tmp_path, "glm-4.5").splitlines() == lines
    dense = table.runs_table(tmp_path, "qwen3-8b")
    assert "| HumanEval+, SR@1 |  |  | 90.0 | 90.0 |  |  | 90.0 | 90.0 |" in dense


# ------------------------------------------------------------------------------------------------------------
# The whole of it, in miniature


@pytest.mark.demo
@pytest.mark.skipif(not shutil.which("bwrap"), reason="needs bubblewrap")
def test_the_miniature_gives_a_table_and_twice_the_same():
    results = ROOT / "results" / "limi-miniature"
    for part in ("data", "outputs", "results"):
        shutil.rmtree(ROOT / part / "limi-miniature", ignore_errors=True)
    command = ["bash", LIMI / "run.sh", "--miniature"]
    first = subprocess.run(command, capture_output=True, text=True)
    assert first.returncode == 0, first.stdout[-3000:] + first.stderr[-3000:]
    made = (results / "table.md").read_text()
    assert len(made.splitlines()) >= 11 and "3 episodes, 0 not run" in made
    recipe = json.loads((ROOT / "outputs/limi-miniature/tuned/recipe.json").read_text())
    assert recipe["steps"] == 4 and recipe["loss"][-1] < recipe["loss"][0]
    (results / "done" / "tuned-tools").unlink()  # as if killed after its last episode
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.stdout.count("done before") == 7
    assert (results / "table.md").read_text() == made
