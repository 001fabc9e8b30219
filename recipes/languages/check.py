"""The check of a task mined by 01_build_queries.py: its private/check.py, run in the sandbox by `python3 -I`.

Reads  /private/plan.json   {"runner", "files": tests to run, "packages": names that must come from the
                             workspace, "seconds", "command"?, "fail_to_pass", "pass_to_pass": [name]}; while
                             these are null every test is reported, packed into one line
       /private/tests/      the test files of the merged pull request, laid over the workspace
Prints TAP, a line for each test that must pass now and one for each that was broken; exit 0: all pass.

A runner is a function that returns {test: (passed, message)} out of a format made for machines; a set-up
beside this file (NAME_setup.*) makes an environment for it and prints its name.
"""
import base64
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import zlib
from xml.etree import ElementTree

WORKSPACE = "/workspace"
LINES = 60
TAKEN_IN = r"^conftest\.py$|_test\.go$"  # whichever test file is named
PRIVATE = os.path.dirname(os.path.abspath(__file__))

def run(argv, plan, output, **env):
    """Run argv in the workspace; (exit status or None after a timeout, what it printed)."""
    env = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "CI": "1", **env}
    with open(output, "w+", errors="replace") as file:
        process = subprocess.Popen(argv, cwd=WORKSPACE, env=env, stdin=subprocess.DEVNULL, stdout=file,
                                   stderr=subprocess.STDOUT, start_new_session=True)
        try:
            status = process.wait(plan["seconds"])
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            status = None
        file.seek(0)
        return status, file.read()


def note(found, name, passed, message=""):
    """Several results of one name (parameters, subtests, projects) count as one: all must pass."""
    name = " ".join(name.split())
    old_passed, old_message = found.get(name, (True, ""))
    found[name] = (old_passed and passed, old_message or " ".join(message.split())[:400])


def read_junit(path):
    """{test: (passed, message)} of a JUnit XML file; skipped tests are left out; {} if the run left none."""
    found = {}
    try:
        cases = list(ElementTree.parse(path).iter("testcase"))
    except (ElementTree.ParseError, OSError):
        return found
    for case in cases:
        bad = [one for one in case if one.tag in ("failure", "error")]
        if bad or case.find("skipped") is None:
            text = " ".join((one.get("message") or "") + " " + (one.text or "")[-300:] for one in bad)
            note(found, f"{case.get('classname') or ''}::{case.get('name')}", not bad, text)
    return found


def pytest_outcomes(plan, folder):
    """An unknown option in the repository's own addopts (--cov without its plug-in): again without them."""
    report = folder + "/report.xml"
    argv = [sys.executable, "-I", "-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", "junit_family=xunit1"]
    for more in ([], ["-o", "addopts="]):
        status, text = run([*argv, *more, f"--junitxml={report}", *plan["files"]], plan, folder + "/output")
        if status != 4:
            break
    return status, text, read_junit(report)


def custom_outcomes(plan, folder):
    """--test_command of the user: {files} and {report} stand for the test files and a JUnit XML file."""
    report = folder + "/report.xml"
    command = plan["command"].replace("{report}", report).replace("{files}", shlex.join(plan["files"]))
    status, text = run(["bash", "-c", command], plan, folder + "/output")
    return status, text, read_junit(report)


def node_outcomes(plan, folder):
    report = folder + "/report"
    argv = {
        "node": ["node", "--test", "--test-reporter=junit", f"--test-reporter-destination={report}"],
        "mocha": ["node_modules/.bin/mocha", "--reporter", "xunit", "--reporter-option", f"output={report}"],
        "jest": ["node_modules/.bin/jest", "--json", f"--outputFile={report}", "--runTestsByPath"],
        # A sandbox without network knows no "localhost", whose address vitest looks up.
        "vitest": ["node_modules/.bin/vitest", "run", "--api.host=127.0.0.1", "--reporter=json",
                   f"--outputFile={report}"],
    }
    status, text = run([*argv[plan["runner"]], *plan["files"]], plan, folder + "/output")
    if plan["runner"] in ("node", "mocha"):
        return status, text, read_junit(report)
    found = {}
    try:
        with open(report) as file:
            suites = json.load(file)["testResults"]
    except (OSError, ValueError, LookupError):
        suites = []
    for suite in suites:
        text += suite.get("message") or ""
        for case in suite["assertionResults"]:
            if case["status"] in ("passed", "failed"):
                message = " ".join(case.get("failureMessages") or [])
                note(found, case["fullName"], case["status"] == "passed", message)
    return status, text, found


def go_outcomes(plan, folder):
    """`go test -json`: an event a line; the compiler's own lines are no JSON."""
    cache, ready = folder + "/gocache", "/opt/venv/gocache"
    if os.path.isdir(ready):  # the standard library, compiled once; a cache must be writable
        shutil.copytree(ready, cache)
    packages = sorted({"./" + os.path.dirname(path) for path in plan["files"]})
    argv = ["go", "test", "-count=1", "-json", *packages]
    status, text = run(
        argv, plan, folder + "/output", GOCACHE=cache, GOFLAGS="-buildvcs=false", GOPROXY="off"
    )
    found, said = {}, {}
    for line in text.splitlines():
        try:
            event = json.loads(line)
        except ValueError:
            continue
        name = f"{event.get('Package')}::{event.get('Test')}"
        said[name] = said.get(name, "") + event.get("Output", "")
        if event.get("Test") and event["Action"] in ("pass", "fail"):
            note(found, name, event["Action"] == "pass", said[name][-400:])
    return status, text, found


def cargo_outcomes(plan, folder):
    """The test programs are built and then run one by one, each with libtest's own JSON, an event a line."""
    env = {
        "CARGO_TARGET_DIR": folder + "/target",
        "CARGO_NET_OFFLINE": "true",
        "CARGO_HOME": folder + "/cargo",
    }
    argv = ["cargo", "test", "--no-run", "--offline", "--message-format=json"]
    status, text = run(argv, plan, folder + "/output", **env)
    found, said = {}, text
    for line in text.splitlines() if status == 0 else ():
        built = json.loads(line) if line.startswith("{") else {}
        if not built.get("executable") or not built["profile"]["test"]:
            continue
        argv = [built["executable"], "-Z", "unstable-options", "--format", "json"]
        run_status, text = run(argv, plan, folder + "/output", RUSTC_BOOTSTRAP="1")
        status = status or run_status if run_status is not None else None
        for event in map(json.loads, re.findall(r'(?m)^\{ "type": "test".*\}$', text)):
            if event["event"] in ("ok", "failed"):
                name = f"{built['target']['name']}::{event['name']}"
                note(found, name, event["event"] == "ok", event.get("stdout", "")[-400:])
    return status, said, found


def strange_origin(names):
    """Where a package of the workspace would be imported from if that is not the workspace, else None."""
    for name in names:
        spec = importlib.util.find_spec(name)
        places = [spec.origin or "", *(spec.submodule_search_locations or [])] if spec else []
        if any("/site-packages/" in place for place in places):
            return f"{name} is imported from {places[0]}, not from the workspace"
    return None


def lay_tests():
    """Lay the pull request's tests over the workspace; of what every run takes in none but theirs is left."""
    for folder, _, files in os.walk(WORKSPACE):
        for name in filter(re.compile(TAKEN_IN).search, files):
            os.remove(os.path.join(folder, name))
    tests = PRIVATE + "/tests"
    for folder, names, files in os.walk(tests):
        for name in names + files:  # a link would be followed, or be in the way of one
            place = os.path.join(WORKSPACE + folder.removeprefix(tests), name)
            if os.path.islink(place):
                os.remove(place)
            elif os.path.isdir(place) and name in files:
                shutil.rmtree(place)
    shutil.copytree(tests, WORKSPACE, symlinks=True, dirs_exist_ok=True)


def report_all(found, text):
    """While it is being found out which tests count: all of them, packed, in lines that 04 keeps.

    {"passed": [name], "failed": {name: message}, "end": last words of the run}
    """
    passed = sorted(name for name, (good, _) in found.items() if good)
    failed = {name: message[:200] for name, (good, message) in found.items() if not good}
    for name in list(failed)[20:]:
        failed[name] = ""
    told = {"passed": passed, "failed": failed, "end": " ".join(text.split())[-1500:]}
    for line in base64.encodebytes(zlib.compress(json.dumps(told).encode(), 9)).split():
        print("not ok - survey", line.decode())
    return 1


def report(plan, found):
    """A line for each test that the pull request makes pass and each that is broken; 0: all is well.

    04 keeps 16,000 characters of a check's output: what goes beyond LINES shares one line.
    """
    passing = {name for name, (passed, _) in found.items() if passed}
    named, rest = plan["fail_to_pass"][:LINES], plan["fail_to_pass"][LINES:]
    broken = [f"{name} (passed before)" for name in plan["pass_to_pass"] if name not in passing]
    for name in named:
        print("ok -" if name in passing else "not ok -", name[:100])
    if rest:
        print("ok -" if passing.issuperset(rest) else "not ok -", f"{len(rest)} more tests")
    for name in broken[:LINES]:
        print("not ok -", name[:100])
    return 0 if not broken and passing.issuperset(plan["fail_to_pass"]) else 1


def grade(plan):
    """Run the tests and print TAP; returns the exit status."""
    lay_tests()
    if strange := strange_origin(plan["packages"]):
        print("Bail out!", strange)
        return 1
    runners = {
        "pytest": pytest_outcomes,
        "custom": custom_outcomes,
        "go": go_outcomes,
        "cargo": cargo_outcomes,
    }
    with tempfile.TemporaryDirectory() as folder:
        status, text, found = runners.get(plan["runner"], node_outcomes)(plan, folder)
    if status is None:
        print(f"not ok - the tests end within {plan['seconds']} s")
        return 1
    return report_all(found, text) if plan["fail_to_pass"] is None else report(plan, found)


if __name__ == "__main__":
    with open(PRIVATE + "/plan.json") as file:
        sys.exit(grade(json.load(file)))
