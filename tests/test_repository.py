"""What holds across the stages: shared code is the same code, --help is light, the README's commands exist."""

import ast
import inspect
import re
import subprocess
import sys

import pytest
from conftest import ROOT

STAGES = ["01_build_queries", "02_format_trajectories", "03_sft", "04_eval"]
SHARED = ["InputError", "parse_settings", "read_jsonl"]


@pytest.mark.parametrize("name", SHARED)
def test_code_that_several_stages_have_is_the_same(stage, name):
    sources = [inspect.getsource(getattr(stage(s), name)) for s in STAGES if hasattr(stage(s), name)]
    assert len(sources) > 1 and len(set(sources)) == 1


@pytest.mark.parametrize("name", STAGES)
def test_no_stage_imports_another_or_catches_everything(name):
    tree = ast.parse((ROOT / f"{name}.py").read_text())
    for node in ast.walk(tree):
        modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        modules += [node.module] if isinstance(node, ast.ImportFrom) else []
        assert not any(re.match(r"0\d_", module or "") for module in modules)
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None and ast.unparse(node.type) != "Exception"


@pytest.mark.parametrize("name", ["01_build_queries", "02_format_trajectories", "04_eval"])
def test_help_imports_nothing_heavy(name):
    code = f"import runpy, sys; sys.argv = ['x', '--help']\ntry: runpy.run_path('{name}.py', run_name='__main__')\n"
    code += "except SystemExit: pass\n"
    code += "print('HEAVY', [m for m in ('torch', 'transformers', 'datasets', 'vllm', 'sklearn', 'matplotlib') "
    code += "if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    usage, told, *_ = result.stdout.split("\n\n    ")[0].split("\n\n")  # then come the examples
    assert "--config" in usage and told.startswith("Stage "), result.stderr
    assert f"\n    python {name}.py " in result.stdout
    assert result.stdout.rstrip().endswith("HEAVY []"), result.stdout[-200:]


def test_help_of_training_begins_with_what_it_does_and_what_people_set_first(stage):
    text = stage("03_sft").make_parser().format_help()
    usage, told, first, *_ = text.split("\n\n")
    assert "--config" in usage
    assert "03_sft.py --config recipes/qwen3-8b/sft.yaml --dry_run" in " ".join(told.split())
    assert first.startswith("used first:\n  --model_name_or_path ") and first.count("\n  --") == 10


def readme_commands():
    """Lines of the README's bash blocks and commands in its text that start a program of this repository, continuation
    lines joined; "03 ... --flag" is one of 03_sft.py."""
    text = (ROOT / "README.md").read_text().replace("\\\n", " ")
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    lines = [line.split(" #")[0].strip() for block in blocks for line in block.splitlines()]
    inline = re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    short = {f"{stage[:2]} ...": f"{stage}.py" for stage in STAGES}
    lines += [short.get(line[:6], line[:6]) + line[6:].replace("\n", " ") for line in inline if " " in line]
    return [line for line in lines if re.search(r"\b(0\d_\w+\.py|\w+/\S+\.(sh|py))", line)]


def test_readme_commands_exist(run_stage):
    commands, helps = readme_commands(), {}
    assert len(commands) > 5
    for command in commands:
        script = re.search(r"(?:^|\s)((?:\w+/)*[\w.-]+\.(?:py|sh))", command)[1]
        assert (ROOT / script).exists(), command
        for config in re.findall(r"--config\s+(\S+)|--config_file\s+(\S+)", command):
            assert (ROOT / "".join(config)).exists(), command
        if re.match(r"0\d_", script):
            helps[script] = helps.get(script) or run_stage(script, "--help").stdout
            for flag in re.findall(r"\s(--\w+)", command.split(script)[1]):
                assert flag == "--config" or re.search(rf"{flag}\b", helps[script]), f"{flag} of: {command}"


def test_tests_that_the_readme_names_exist():
    claims = re.findall(r"pytest ((?:tests/\w+\.py ?)+)(?:-k (\w+|\"[^\"]+\"))?", (ROOT / "tests/README.md").read_text())
    assert len(claims) > 8
    for files, words in claims:
        names = re.findall(r"def (test_\w+)", "".join((ROOT / file).read_text() for file in files.split()))
        assert names and all(any(word in name for name in names) for word in words.strip('"').split(" or ")), words


def test_unknown_flags_and_keys_are_errors(run_stage, one_line_error, tmp_path):
    (tmp_path / "x.yaml").write_text("rouunds: 3\n")
    told = f"{tmp_path}/x.yaml: rouunds: no such setting; nearest: "
    one_line_error(run_stage("04_eval.py", "--config", tmp_path / "x.yaml"), told + "rounds")
    one_line_error(run_stage("01_build_queries.py", "--config", tmp_path / "x.yaml"), told + "see --help")
    flag = "--no_such_flag: no such setting; nearest: see --help"
    one_line_error(run_stage("02_format_trajectories.py", "x.json", "--no_such_flag", "1"), flag)
    output = "--output_di: no such setting; nearest: output_dir"
    one_line_error(run_stage("04_eval.py", "--output_di", "x"), output)  # no abbreviations either
    one_line_error(run_stage("01_build_queries.py", "--config", tmp_path / "missing.yaml"), "missing.yaml")


def test_training_names_the_file_of_an_unknown_key_too(stage, monkeypatch, tmp_path):
    sft = stage("03_sft")
    (tmp_path / "x.yaml").write_text("learning_rat: 3\n")
    monkeypatch.setattr(sys, "argv", ["03_sft.py", "--config", str(tmp_path / "x.yaml")])
    told = f"{tmp_path}/x.yaml: no such setting: --learning_rat; nearest: --learning_rate"
    with pytest.raises(sft.InputError, match=told):
        sft.read_settings(sft.make_parser())
