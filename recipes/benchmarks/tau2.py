"""tau2-bench: its own harness runs airline (50 tasks) or retail (114) against an endpoint; pass^k.

    python3.12 -m venv venvs/tau2
    venvs/tau2/bin/pip install ./tau2-bench litellm==1.82.6 openai==3.54.0 pydantic==2.14.3
    python recipes/benchmarks/tau2.py tau2-bench --venv venvs/tau2 --domain airline \\
        --base_url http://localhost:8000/v1 --model limi --user_model gpt-4.1-2025-04-14 \\
        --user_base_url https://YOUR-ENDPOINT/v1 --output_dir results/tau2-airline

tau2-bench is a clone of github.com/sierra-research/tau2-bench at fc0055dc (1.0.1). Keys come from
OPENAI_API_KEY and USER_API_KEY. The agent has the domain's tools (the harness simulates them: nothing
that the model writes runs here); the user model also judges retail's natural-language assertions, as the
harness has it. The same command goes on where it stopped; with another model, user or number of trials it
is an error.

A fault is never a score: pass^k is only said when every conversation ended; an endpoint that stays away
ends the run. What the model did wrong is its own: an answer without text or call, a call whose arguments
are no JSON, and a context that is full would be "infrastructure errors" to the harness, again at each
try. Here the first becomes EMPTY, the second a call without arguments, the third EMPTY as well;
summary.json counts all three. Writes OUTPUT_DIR/summary.json {"model", "settings", "versions", "tasks",
"metrics", "not_run"}, requests.jsonl, and the harness's own results/results.json.
"""

import argparse
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import common
from tau2_relay import LONGEST_ANSWER, Relay, is_object

COMMIT = "fc0055dc4e0a316c3f83133267fbd6faaa770992"
TASKS = {"airline": 50, "retail": 114, "mock": 10}  # the last is the harness's own, to try things out


def read_options():
    shape = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=shape)
    parser.error = lambda text: common.fail(f"tau2.py: {text.removeprefix('argument ')}")
    add = parser.add_argument
    add("clone", type=Path)
    add("--venv", type=Path, required=True, help="environment with tau2, made as above")
    add("--domain", choices=TASKS, required=True)
    add("--base_url", type=address, required=True, help="endpoint of the agent's model")
    add("--model", required=True)
    add("--user_base_url", type=address, help="endpoint of the user's model; left out, --base_url")
    add("--user_model", required=True, help="plays the user")
    add("--output_dir", type=Path, required=True)
    add("--trials", type=above_0, default=4, help="conversations a task (default 4)")
    add("--temperature", type=float, default=0.0, help="of agent and user (default 0)")
    add("--request", type=json_object, default={}, help="JSON that joins the agent's requests")
    add("--concurrency", type=above_0, default=16, help="conversations at a time (default 16)")
    add("--patience", type=float, default=600, help="seconds to wait for an endpoint (600)")
    add("--limit", type=above_0, help="only the first N tasks, to try things out")
    return parser.parse_args()


def above_0(text):
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is no number above 0")
    return int(text)


def address(text):
    if not text.startswith(("http://", "https://")):
        raise argparse.ArgumentTypeError(f"{text} is no http address")
    return text


def json_object(text):
    if not is_object(text):
        raise argparse.ArgumentTypeError(f"{text} is no JSON object")
    return json.loads(text)


def read_json(path):
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        common.fail(f"{path}: {error}: name another --output_dir")


def check_options(options):
    """Refuse, before anything is asked, what cannot give a score."""
    if not (options.clone / "src/tau2").is_dir():
        common.fail(f"{options.clone}: no clone of tau2-bench (see --help)")
    common.unchanged(options.clone, COMMIT, "src", f"data/tau2/domains/{options.domain}")
    common.installed(options.venv, "tau2==1.0.1", "litellm==1.82.6")
    try:
        options.output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        common.fail(f"--output_dir: {error}")
    path = options.output_dir / "settings.json"
    names = ("domain", "model", "user_model", "trials", "temperature", "request", "limit")
    settings = {name: getattr(options, name) for name in names}
    if not path.exists():
        path.write_text(json.dumps(settings))
    before = read_json(path)
    for name in names:
        if before.get(name) != settings[name]:
            was = f"{before.get(name)!r}, is {settings[name]!r}"
            common.fail(f"{path}: {name} was {was}: name another --output_dir")
    return settings


# ---- The harness, and what it found ----


def run_harness(options, relay):
    """The exit status of `tau2 run`; the harness is ended once an endpoint is dead."""
    flags = {
        "--domain": options.domain,
        "--num-trials": options.trials,
        "--max-concurrency": options.concurrency,
        "--save-to": options.output_dir.absolute() / "results",
    }
    if options.limit:
        flags["--num-tasks"] = options.limit
    for who in ("agent", "user"):
        arguments = {"api_base": f"{relay.url}/{who}/v1", "temperature": options.temperature}
        arguments |= {"timeout": 10 * LONGEST_ANSWER, "num_retries": 0}
        flags[f"--{who}-llm"] = f"openai/{who}"
        flags[f"--{who}-llm-args"] = json.dumps(arguments)
    command = [str(options.venv.absolute() / "bin/tau2"), "run", "--auto-resume"]
    for name, value in flags.items():
        command += [name, str(value)]
    environment = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
    environment |= {"TAU2_DATA_DIR": str(options.clone.absolute() / "data"), "OPENAI_API_KEY": "none"}
    environment |= {"OPENAI_API_BASE": f"{relay.url}/user/v1", "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    with (options.output_dir / "log.txt").open("a") as log:
        harness = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        try:
            while harness.poll() is None and not relay.dead:
                time.sleep(0.2)
        finally:
            harness.terminate()
    return harness.wait()


def summarize(results, count, trials):
    """({metric: fraction}, {reason: conversations not run}, {reason: conversations}).

    pass^k is the mean of C(solved, k) / C(trials, k) over all `count` tasks, as in tau2's own
    agent_metrics.py; None while a conversation is missing.
    """
    solved = Counter()
    ended = Counter()
    for run in results["simulations"]:
        ended[run["termination_reason"]] += 1
        if run["termination_reason"] != "infrastructure_error":
            solved[run["task_id"]] += abs(run["reward_info"]["reward"] - 1) <= 1e-6
    faults = ended["infrastructure_error"]
    missing = count * trials - sum(ended.values())
    not_run = {reason: number for reason, number in (("fault", faults), ("missing", missing)) if number}
    metrics = {}
    for k in range(1, trials + 1):
        total = sum(math.comb(times, k) for times in solved.values())
        metrics[f"pass^{k}"] = None if not_run else round(total / math.comb(trials, k) / count, 4)
    return metrics, not_run, dict(ended)


def main():
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the harness ends as well
    options = read_options()
    settings = check_options(options)
    relay = Relay(options)
    whole = TASKS[options.domain]
    count = min(options.limit or whole, whole)
    print(f"tau2-bench {options.domain}: {count} of {whole} tasks, {options.trials} trials each", flush=True)
    status = run_harness(options, relay)
    if relay.dead or status:
        why = relay.dead or f"the harness ended with status {status}: see {options.output_dir / 'log.txt'}"
        sys.exit(f"{why}\nNo score. The same command goes on from here.")
    results = read_json(options.output_dir / "results/results.json")
    assert len(results["tasks"]) == count, f"{len(results['tasks'])} tasks, not {count}"
    metrics, not_run, ended = summarize(results, count, options.trials)
    mended = {kind: len(requests) for kind, requests in relay.mended.items()}
    summary = {
        "model": options.model,
        "settings": settings,
        "versions": {"tau2": COMMIT},
        "tasks": count,
        "metrics": metrics,
        "not_run": not_run,
        "ended_by": ended,
        "answers": mended,
    }
    (options.output_dir / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    for name, value in metrics.items():
        print(f"{name}: " + (f"- (not run: {not_run})" if value is None else f"{value:.1%} of {count} tasks"))
    print(f"ended by: {ended}; answers mended, or cut by their length, in this run: {mended}")
    sys.exit(1 if not_run else 0)


if __name__ == "__main__":
    main()
