"""The check of mined tasks on the reports of real test runners; what is not installed is skipped by name."""

import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

LANGUAGES = Path(__file__).resolve().parents[1] / "recipes" / "languages"


def load(name):
    spec = importlib.util.spec_from_file_location(name, LANGUAGES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


check = load("check")


@pytest.fixture
def workspace(tmp_path, monkeypatch):
    """write({path: text}) fills a workspace; run(plan) gives {test: passed} of its runner."""
    monkeypatch.setattr(check, "WORKSPACE", str(tmp_path / "workspace"))
    (tmp_path / "output").mkdir()

    def outcomes(runner, files, texts):
        for name, text in texts.items():
            path = tmp_path / "workspace" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        plan = {"runner": runner, "files": files, "seconds": 200}
        runners = {"pytest": check.pytest_outcomes, "go": check.go_outcomes, "cargo": check.cargo_outcomes}
        _, _, found = runners.get(runner, check.node_outcomes)(plan, str(tmp_path / "output"))
        return {name: passed for name, (passed, _) in found.items()}

    return outcomes


def needs(program):
    return pytest.mark.skipif(not shutil.which(program), reason=f"needs {program}")


@needs("node")
def test_node_names_with_spaces_and_logs_between(workspace):
    test = """const test = require('node:test'); const assert = require('assert');
test('adds one two', () => { console.log('not ok 1 - lie'); assert.equal(1 + 1, 2) });
test('adds one three', () => { assert.equal(1 + 1, 3) });
test('left out', {skip: true}, () => {});
"""
    found = workspace("node", ["a.test.js"], {"a.test.js": test})
    assert {name.split("::")[1]: passed for name, passed in found.items()} == {
        "adds one two": True,
        "adds one three": False,
    }


@needs("go")
def test_go_subtests_and_a_package_that_does_not_compile(workspace):
    files = {
        "go.mod": "module example.invalid/m\n\ngo 1.19\n",
        "a.go": "package m\n\nfunc X() int { return 2 }\n",
        "a_test.go": 'package m\n\nimport ("fmt"; "testing")\n\nfunc TestX(t *testing.T) {\n'
        '\tfmt.Println("{not json")\n\tt.Run("one two", func(t *testing.T) {})\n'
        '\tt.Run("one three", func(t *testing.T) { if X() != 3 { t.Fatal("no") } })\n}\n',
    }
    assert workspace("go", ["a_test.go"], files) == {
        "example.invalid/m::TestX": False,
        "example.invalid/m::TestX/one_two": True,
        "example.invalid/m::TestX/one_three": False,
    }
    assert workspace("go", ["a_test.go"], {"a.go": "package m\n"}) == {}


@needs("cargo")
def test_cargo_runs_every_test_program_and_reads_its_events(workspace):
    files = {
        "Cargo.toml": '[package]\nname = "m"\nversion = "0.1.0"\nedition = "2021"\n',
        "src/lib.rs": 'pub fn x() -> i32 { 2 }\n\n#[test]\nfn inner() { println!("test lie ... ok"); }\n',
        "tests/it.rs": "#[test]\nfn two() { assert_eq!(m::x(), 2) }\n\n"
        "#[test]\nfn three() { assert_eq!(m::x(), 3) }\n"
        "\n#[test]\n#[ignore]\nfn left_out() {}\n",
    }
    assert workspace("cargo", ["tests/it.rs"], files) == {
        "m::inner": True,
        "it::two": True,
        "it::three": False,
    }


def test_jest_and_vitest_reports(workspace, tmp_path):
    cases = [
        {"fullName": "adds one two", "status": "passed"},
        {"fullName": "adds one three", "status": "failed", "failureMessages": ["Expected 3\n got 2"]},
        {"fullName": "left out", "status": "pending"},
    ]
    report = {"testResults": [{"message": "", "assertionResults": cases}]}
    for runner in ("jest", "vitest"):
        fake = '#!/bin/sh\nfor word; do case "$word" in --outputFile=*) out=${word#*=};; esac; done\n'
        fake += f"cat > $out <<'END'\n{json.dumps(report)}\nEND\nexit 1\n"
        files = {f"node_modules/.bin/{runner}": fake, "a.test.ts": ""}
        (tmp_path / "workspace" / "node_modules" / ".bin").mkdir(parents=True, exist_ok=True)
        path = tmp_path / "workspace" / "node_modules" / ".bin" / runner
        path.touch(0o755)
        assert workspace(runner, ["a.test.ts"], files) == {"adds one two": True, "adds one three": False}


def test_junit_parameters_of_one_name_must_all_pass(tmp_path):
    report = tmp_path / "r.xml"
    report.write_text(
        '<r><s><testcase classname="a" name="t"/>'
        '<testcase classname="a" name="t"><failure message="no"/></testcase>'
        '<testcase classname="a" name="u"><skipped/></testcase><testcase classname="a" name="v  w"/></s></r>'
    )
    assert check.read_junit(report) == {"a::t": (False, "no"), "a::v w": (True, "")}
    report.write_text("<r><s>")  # a run that was killed
    assert check.read_junit(report) == {}


def test_a_conftest_of_the_agents_is_taken_away_and_the_tests_own_is_laid(tmp_path, monkeypatch):
    monkeypatch.setattr(check, "WORKSPACE", str(tmp_path / "workspace"))
    monkeypatch.setattr(check, "PRIVATE", str(tmp_path / "private"))
    for name, text in (
        ("workspace/conftest.py", "evil"),
        ("workspace/tests/conftest.py", "evil"),
        ("private/tests/tests/conftest.py", "good"),
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    check.lay_tests()
    assert not (tmp_path / "workspace" / "conftest.py").exists()
    assert (tmp_path / "workspace" / "tests" / "conftest.py").read_text() == "good"


def test_a_go_test_that_the_pull_request_renamed_or_the_agent_wrote_is_not_compiled(tmp_path, monkeypatch):
    """Go compiles all tests of a package: the same function in two of its files is an error."""
    monkeypatch.setattr(check, "WORKSPACE", str(tmp_path / "workspace"))
    monkeypatch.setattr(check, "PRIVATE", str(tmp_path / "private"))
    for name in ("workspace/p/old_test.go", "workspace/p/a.go", "private/tests/p/new_test.go"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("package p\n")
    check.lay_tests()
    assert sorted(os.listdir(tmp_path / "workspace" / "p")) == ["a.go", "new_test.go"]


def test_thousands_of_tests_are_told_through_what_04_keeps_of_an_output(capsys):
    stage, evaluation = (importlib.import_module(name) for name in ("01_build_queries", "04_eval"))
    names = [hashlib.sha256(bytes([n // 256, n % 256])).hexdigest() for n in range(4000)]
    check.report_all({name: (True, "") for name in names}, "end")
    output = evaluation.without_middle(capsys.readouterr().out.encode(), 4 * evaluation.LONGEST).decode()
    checks = evaluation.read_check(1, output)
    told = {"passed": sorted(names), "failed": {}, "end": "end"}
    assert stage.survey_of({"rounds": [{"checks": checks}]}) == told


def test_links_and_folders_in_the_way_of_the_tests_are_taken_away(tmp_path, monkeypatch):
    """A link that both have, a link of the agent's to a folder, a folder where a test file is to be."""
    monkeypatch.setattr(check, "WORKSPACE", str(tmp_path / "workspace"))
    monkeypatch.setattr(check, "PRIVATE", str(tmp_path / "private"))
    for name in ("workspace/tests/a.py", "workspace/src", "private/tests/tests"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("private/tests/tests/a.py", "private/tests/more/b.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("test")
    for root in ("workspace", "private/tests"):
        (tmp_path / root / "tests" / "link").symlink_to("a.py")
    (tmp_path / "workspace" / "more").symlink_to("src")
    check.lay_tests()
    workspace = tmp_path / "workspace"
    assert (workspace / "tests" / "a.py").read_text() == "test"
    assert (workspace / "tests" / "link").is_symlink() and not (workspace / "more").is_symlink()
    assert not list((workspace / "src").iterdir())


def test_one_line_a_test_that_must_pass_and_one_for_each_that_broke(capsys):
    plan = {"fail_to_pass": ["new", "gone"], "pass_to_pass": ["old", "kept"]}
    found = {"new": (True, ""), "old": (False, ""), "kept": (True, "")}
    assert check.report(plan, found) == 1
    assert capsys.readouterr().out == "ok - new\nnot ok - gone\nnot ok - old (passed before)\n"
    assert check.report(plan, found | {"gone": (True, ""), "old": (True, "")}) == 0


def test_no_python_begins_with_a_file_of_the_agents(tmp_path):
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    load("environment").tell_paths(tmp_path / "tree", tmp_path / "venv")
    [paths] = tmp_path.glob("venv/lib/python*/site-packages/workspace.pth")
    paths.write_text(paths.read_text().replace("/workspace", str(tmp_path)))
    (tmp_path / "sitecustomize.py").write_text("print('ok - all')")
    command = [tmp_path / "venv/bin/python3", "-I", "-c", "import sys; print(sys.path[-1])"]
    assert subprocess.run(command, capture_output=True, text=True).stdout == f"{tmp_path}\n"


def test_what_a_python_project_declares_for_its_tests_is_installed(tmp_path, monkeypatch):
    setup = load("python_setup")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "requirements").mkdir()
    (tmp_path / "requirements" / "tests.txt").write_text("freezegun\n")
    (tmp_path / "pyproject.toml").write_text(
        '[project]\nname = "x"\n[project.optional-dependencies]\ntests = ["a"]\ndocs = ["b"]\n'
        '[dependency-groups]\ntest = ["c"]\nlint = ["d"]\n'
    )
    assert setup.install_commands(setup.read_project()) == [
        ("-e .", True),
        ("pytest", True),
        ("-e .[tests]", False),
        ("--group test", False),
        ("-r requirements/tests.txt", False),
    ]
