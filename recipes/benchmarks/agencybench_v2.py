#!/usr/bin/env python3
"""AgencyBench v2 by its own graders, unmodified: a grader asks for an agent, 04_eval.py's answers.

    git clone https://github.com/GAIR-NLP/AgencyBench    # at ec65324
    python3.11 -m venv venvs/v2
    venvs/v2/bin/pip install -r recipes/benchmarks/agencybench_v2/requirements.txt
    python recipes/benchmarks/agencybench_v2.py --clone AgencyBench --venv venvs/v2 --scenarios 'Backend/*' \\
        --model outputs/limi --output_dir results/v2-limi

Every other flag is 04's, and so are server, agent loop, sandbox, resume and summary. A scenario is an
episode: its grader runs in a sandbox without network in which its own folder is read-only but for what it
makes; the agent sees the one folder that the grader names. Judges (--judge_model, --judge_base_url) stand
behind a relay: their faults are "not run", never a score. Pages (Game, Frontend) are shown by chromium in the
grader's sandbox. The metrics are the paper's (sec. 3.3): S_avg, also by capability, Pass@1, Pass@2.

A grader runs what the model wrote, some in its own process: a program made for that could write its score.
"""

import fnmatch
import importlib
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import yaml

HERE = Path(__file__).resolve().with_suffix("")
sys.path[:0] = [str(HERE.parents[2]), str(HERE.parent), str(HERE)]
stage = importlib.import_module("04_eval")
episode = importlib.import_module("episode")
common = importlib.import_module("common")
KNOWN = yaml.safe_load((HERE / "scenarios.yaml").read_text())
PAPER = HERE.with_name("paper_tables.yaml")
REQUIREMENTS = (HERE / "requirements.txt").read_text()
COMMIT = "ec65324"


@dataclass
class Settings(stage.Settings):
    clone: str | None = stage.setting(None, "A clone of GAIR-NLP/AgencyBench.")
    scenarios: list[str] | None = stage.setting(None, "Which, e.g. 'Code/*'; left out, all.")
    venv: str | None = stage.setting(None, "A Python environment with agencybench_v2/requirements.txt.")
    repository: str | None = stage.setting(None, "Code/scenario2: a clone of github.com/microsoft/autogen.")


# ----------------------------------------------------------------------------------------------------------
# The scenarios


def read_scenarios(settings):
    """(tasks of the scenarios that are asked for, {query_id: why it is left out}); subtasks become turns."""
    files = {}
    for path in sorted(Path(settings.clone).rglob("scenario*/eval_task.py")):
        files[str(path.parent.relative_to(path.parents[2]))] = path.parent
    for wanted in settings.scenarios or ["*"]:
        if not fnmatch.filter(files, wanted):
            found = ", ".join(files) or "no scenario"
            raise stage.InputError(f"--scenarios {wanted}: not in {settings.clone}, which has {found}")
    names = []
    for wanted in settings.scenarios or ["*"]:
        names += fnmatch.filter(files, wanted)
    tasks = []
    left_out = {}
    for name in dict.fromkeys(names):
        query_id = f"agencybench-v2-{name.replace('/', '-')}"
        if reason := why_not(name, settings) or other_files(name, files[name]):
            left_out[query_id] = reason
        else:
            tasks.append(task_of(query_id, name, files[name], settings))
    return tasks, left_out


def why_not(name, settings):
    """Why a scenario cannot be run here, or None."""
    for pattern, why in KNOWN["refused"].items():
        if fnmatch.fnmatch(name, pattern):
            return why
    facts = facts_of(name)
    if facts.get("judge") and not settings.judge_model:
        return "needs --judge_model"
    if facts.get("repository") and not settings.repository:
        return "needs --repository"
    return None


def other_files(name, folder):
    """Which files of a scenario are not as in the commit, or None: a grader whose data is missing crashes
    once the agent has worked. Of a folder without history nothing can be said."""
    command = ["git", "-C", folder, "diff", "--name-only", "--relative", COMMIT]
    command += ["--", ".", ":(exclude,glob)**/.env"]
    command.append(f":(exclude,glob)**/{facts_of(name).get('spare', '.env')}")
    names = subprocess.run(command, capture_output=True, text=True).stdout.splitlines()
    return f"not as in commit {COMMIT}: {', '.join(names[:3])}" if names else None


def facts_of(name):
    """What scenarios.yaml says of a scenario."""
    for pattern, facts in KNOWN["scenarios"].items():
        if fnmatch.fnmatch(name, pattern):
            return facts
    return {}


def task_of(query_id, name, folder, settings):
    facts = facts_of(name)
    description = stage.read_json(folder / "description.json")
    turns = []
    try:
        for number in range(1, description["subtask_count"] + 1):
            turns.append({"query": description[f"subtask{number}"]})
    except (KeyError, TypeError) as error:
        raise stage.InputError(f"{folder}/description.json: {error}: check the clone out again") from None
    domain = "research" if name.startswith("Research") else "vibe_coding"
    task = {"query_id": query_id, "turns": turns, "source": "agencybench-v2", "domain": domain}
    task |= {"workspace": folder, "venv": Path(settings.venv).absolute(), "needs": facts.get("programs", [])}
    meta = {"faults": facts.get("faults")}
    return task | {"meta": meta | {name: facts.get(name, False) for name in ("browser", "judge")}}


# ----------------------------------------------------------------------------------------------------------
# The run


def print_missing(tasks, settings):
    """The packages that bring the programs which scenarios need and this machine lacks."""
    missing = set()
    for task in tasks:
        missing.update(stage.missing_needs(task, settings))
    for name in sorted(missing & KNOWN["packages"].keys()):
        print(f"missing: {name}: apt install {KNOWN['packages'][name]}")


def check(settings):
    """Raises stage.InputError for what cannot be meant."""
    if not settings.clone or not settings.venv:
        raise stage.InputError("--clone DIR and --venv DIR are needed, see --help")
    for name in ("compare", "regrade", "serve"):
        if getattr(settings, name):
            raise stage.InputError(f"--{name} is for 04_eval.py alone")
    if settings.agent != "model":
        raise stage.InputError(f"--agent {settings.agent}: its graders ask a model")
    if settings.sandbox != "bwrap" or settings.sandbox_command:
        raise stage.InputError("its graders run in bubblewrap: leave --sandbox as it is")
    if settings.repository and not Path(settings.repository).is_dir():
        raise stage.InputError(f"--repository {settings.repository}: no such folder")
    settings.feedback = "judge" if settings.judge_model else "check"
    stage.check_settings(settings)


def by_capability(scores):
    """{benchmark, or a capability of it: {"S_avg", "scenarios", "of", "published"}}; nothing is published of
    a part. scores: {query_id: metrics}."""
    paper = yaml.safe_load(PAPER.read_text())
    rows = {}
    for name, metrics in paper["AgencyBench v2"]["benchmarks"].items():
        found = [scores[query_id]["S_avg"] for query_id in scores if query_id.startswith(f"{name}-")]
        row = {"S_avg": sum(found) / len(found) if found else None}
        row |= {"scenarios": len(found), "of": paper["tasks"][name]}
        rows[name] = row | {"published": metrics["S_avg"] if len(found) == row["of"] else None}
    return rows


def print_scores(rows, judge):
    stands_in = f"; judge {judge} in the place of the authors'" if judge else ""
    for name, row in rows.items():
        if row["scenarios"]:
            score = f"{row['S_avg']:.1%} over {row['scenarios']} of {row['of']} scenarios"
            models = ", ".join(f"{model} {number}" for model, number in (row["published"] or {}).items())
            print(f"{name}: S_avg {score}{stands_in}{'; published: ' if models else ''}{models}")


def main(settings):
    check(settings)
    stage.signal.signal(stage.signal.SIGINT, stage.signal.default_int_handler)
    stage.signal.signal(stage.signal.SIGTERM, lambda *_: stage.signal.raise_signal(stage.signal.SIGINT))
    tasks, left_out = read_scenarios(settings)
    for query_id, why in left_out.items():
        print(f"left out: {query_id}: {why}")
    tasks = tasks[: settings.limit]
    if not tasks:
        raise stage.InputError("no scenario is left to run")
    # A package that is missing would be a fault of the grader, once the agent has worked
    common.installed(Path(settings.venv), *re.findall(r"^\S+==\S+", REQUIREMENTS, re.MULTILINE))
    if Path(settings.clone, ".git").exists():
        common.unchanged(settings.clone, COMMIT, ":(glob)**/eval_task.py", ":(glob)**/description.json")
    print_missing(tasks, settings)
    tools = stage.load_tools(settings.tools)
    # 04's run, with our kind of episode and its metrics
    stage.Episode = episode.Scenario
    stage.turn_scores = episode.scenario_scores
    hashes = [stage.task_sha256(task) for task in tasks]
    fingerprints = {"tasks_sha256": stage.sha256(hashes), "tools_sha256": stage.sha256(tools[1])}
    fingerprints["model_sha256"] = stage.fingerprint(settings.model)
    scripts = [Path(stage.__file__), Path(__file__), *sorted(HERE.iterdir())]
    texts = [path.read_text() for path in scripts if path.is_file()]
    fingerprints["script_sha256"] = stage.sha256(texts)
    output_dir = Path(settings.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    with stage.locked(output_dir):
        stage.check_same_settings(settings, fingerprints, output_dir)
        rows, not_run, stopped = stage.run_tasks(settings, tasks, tools)
        summary = stage.write_summary(settings, tasks, rows, not_run, fingerprints)
        summary |= {"left_out": left_out, "capabilities": by_capability(summary["by_task"])}
        faults = {task["query_id"]: task["meta"]["faults"] for task in tasks}
        summary["faults"] = {query_id: text for query_id, text in faults.items() if text}
        stage.write_json(output_dir / "summary.json", summary)
    code = stage.print_summary(settings, summary, not_run, stopped)
    for query_id, text in summary["faults"].items():
        print(f"beware: {query_id}: {text}")
    print_scores(summary["capabilities"], settings.judge_model)
    return code


if __name__ == "__main__":
    stage.__doc__ = __doc__  # what --help begins with
    try:
        sys.exit(main(*stage.parse_settings(stage.TrlParser(Settings))))
    except KeyboardInterrupt:
        sys.exit(130)
    except (stage.InputError, OSError) as error:
        print(f"agencybench_v2.py: {error}", file=sys.stderr)
        sys.exit(2)
