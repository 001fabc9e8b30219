"""Speed of what is ours: formatting, tokenising, the agent loop, --help. Prints a table, asserts nothing.

    python recipes/bench.py                       # data and agent, a few minutes
    python recipes/bench.py data --limi LIMI      # also the two data scripts of a clone of GAIR-NLP/LIMI
    python recipes/bench.py agent --inspect_python PYTHON    # and Inspect, where PYTHON has it
    python recipes/bench.py share --model outputs/limi --tasks data/queries.jsonl    # on a GPU
    python recipes/bench.py kill                  # a run killed five times: is an episode lost, or doubled?

data and agent run on one core. A loop's time is its own CPU time, beside an endpoint and sandboxes in other
processes. share is wall time: episodes through 04, then the same requests sent raw to a fresh server, token
for token and as many conversations at once: what the first takes longer is the agent loop's share.
"""

import argparse
import asyncio
import contextlib
import importlib
import importlib.util
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PARTS = ROOT / "recipes" / "bench"
sys.path.insert(0, str(ROOT))

RNG = random.Random(0)
LETTERS = "abcdefghijklmnopqrstuvwxyz"
WORDS = ["".join(RNG.choices(LETTERS, k=RNG.randint(2, 9))) for _ in range(5000)]
PARAMETERS = {"type": "object", "properties": {"command": {"type": "string"}}, "required": ["command"]}
TOOL = {"name": "run_shell_command", "description": "Run a command.", "parameters": PARAMETERS}
EPISODES = 64  # of the agent loop, at once
STEPS = 30  # of each
CONVERSATIONS = 16  # of share, at once


def prose(words):
    return " ".join(RNG.choices(WORDS, k=words))


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def silent():
    with open(os.devnull, "w") as null, contextlib.redirect_stdout(null), contextlib.redirect_stderr(null):
        yield


def timed(*command):
    """(seconds, peak GB) of a process."""
    started = time.perf_counter()
    words = [sys.executable, *map(str, command)]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(words)} failed")
    return time.perf_counter() - started, usage.ru_maxrss / 1e6


# ---- data ----


def trajectory(tokens):
    """Messages of about `tokens` tokens (4.7 characters each): steps of a call and its result, an answer."""
    messages = [{"role": "system", "content": prose(300)}]
    messages.append({"role": "user", "content": prose(80)})
    size = 2200
    while size < 4.7 * tokens:
        call = {"type": "function", "id": f"c{len(messages)}"}
        call["function"] = {"name": TOOL["name"], "arguments": {"command": prose(20)}}
        output = "\n".join(prose(8) for _ in range(20))
        messages.append({"role": "assistant", "content": prose(20), "tool_calls": [call]})
        messages.append({"role": "tool", "tool_call_id": call["id"], "content": output})
        size += len(output) + 320
    return [*messages, {"role": "assistant", "content": prose(40)}]


def gemini(message):
    """A message as Gemini's API has it."""
    if message["role"] == "tool":
        response = {"name": TOOL["name"], "id": message["tool_call_id"]}
        response["response"] = {"output": message["content"]}
        return {"role": "user", "parts": [{"functionResponse": response}]}
    parts = [{"text": message["content"]}]
    for call in message.get("tool_calls", []):
        function = call["function"]
        parts.append({"functionCall": {"name": function["name"], "args": function["arguments"]}})
    return {"role": "user" if message["role"] == "user" else "model", "parts": parts}


def sii_log(name, messages):
    """The same as a log of SII CLI: its last requests, and the next-speaker check that holds the answer."""
    contents = [gemini(message) for message in messages[1:]]
    question = "Analyze *only* the content and structure of your immediately preceding response"
    check = [*contents, {"role": "user", "parts": [{"text": question}]}]
    declared = [{"functionDeclarations": [TOOL]}]
    events = []
    for part, tools in ((contents[:-3], declared), (contents[:-1], declared), (check, [])):
        request = {"system_instruction": messages[0]["content"], "messages": part, "tools": tools}
        events.append({"type": "api_request_full", "data": {"full_request": request}})
    return {"id": name, "model": "m", "events": events}


def write_data(folder):
    """78 logs of 42,000 tokens, 10,000 rows of 4,000, a tokenizer of 16,000 entries (returned)."""
    (folder / "logs").mkdir()
    for number in range(78):
        log = sii_log(f"session{number:02d}", trajectory(42_000))
        (folder / f"logs/session{number:02d}.json").write_text(json.dumps(log))
    tools = [
        {
            "type": "function",
            "function": TOOL,
        }
    ]
    with open(folder / "rows.jsonl", "w") as file:
        for number in range(10_000):
            row = {"query_id": str(number), "messages": trajectory(4_000), "tools": tools}
            file.write(json.dumps(row) + "\n")
    make_model = load(ROOT / "recipes/demo/make_model.py")
    tok = make_model.make_tokenizer([prose(100_000)], vocab_size=16_000)
    tok.save_pretrained(folder / "tokenizer")
    make_model.make_config(tok).save_pretrained(folder / "tokenizer")


def limi_scripts(folder, limi):
    """Seconds of the clone's two scripts on the logs."""
    scripts = Path(limi, "scripts/data_prepare")
    logs = ["--raw_dir", folder / "logs", "--output_dir", folder / "limi"]
    first, _ = timed(scripts / "events2messages.py", *logs)
    again = ["--max_tokens", 125_000, "--duplicate_times", 2]
    again += ["--tokenizer_path", folder / "tokenizer"]
    again += ["--input_json", folder / "limi/openai_training_data.json"]
    again += ["--output_parquet", folder / "limi.parquet"]
    second, _ = timed(scripts / "messages_json2parquet_128k.py", *again)
    return first + second


def bench_data(folder, options):
    write_data(folder)
    script = ROOT / "02_format_trajectories.py"
    seconds, memory = timed(script, folder / "rows.jsonl", "--output_file", folder / "rows02.jsonl")
    yield "02: 10,000 rows of 4k tokens", f"{seconds:.1f} s, {memory:.2f} GB"
    counted = ["--output_file", folder / "train.jsonl", "--tokenizer", folder / "tokenizer"]
    seconds, memory = timed(script, folder / "logs", *counted)
    yield "02: 78 logs of 42k tokens, tokens counted", f"{seconds:.1f} s, {memory:.2f} GB"
    if options.limi:
        theirs = limi_scripts(folder, options.limi)
        share = f"{theirs:.1f} s, {seconds / theirs:.2f}"
        yield "LIMI's two scripts on the same logs, 02's share of it", share
    sft = importlib.import_module("03_sft")
    tok = sft.load_tokenizer(str(folder / "tokenizer"))
    started = time.perf_counter()
    rows, _ = sft.read_rows(folder / "train.jsonl")
    samples = sft.tokenize(tok, rows, 125_000)[0]
    seconds = time.perf_counter() - started
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    mean = statistics.mean(len(sample["input_ids"]) for sample in samples)
    name = f"03: ids and labels of {len(samples)} rows, {mean:,.0f} tokens in the mean"
    yield name, f"{seconds:.1f} s, {memory:.2f} GB"


# ---- agent ----


@contextlib.contextmanager
def endpoint(log, steps, delay=0.0):
    """base_url of a scripted endpoint in a process of its own."""
    command = [sys.executable, PARTS / "endpoint.py", str(steps), str(delay), str(log)]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        yield f"http://127.0.0.1:{int(server.stdout.readline())}/v1"
    finally:
        server.kill()
        server.wait()


def write_tasks(folder, number):
    """Tasks that each find a file of 500 characters in their folder, and are done."""
    (folder / "given").mkdir()
    (folder / "given/a").write_text("x" * 500)
    path = folder / "queries.jsonl"
    with path.open("w") as file:
        for place in range(number):
            task = {"query_id": f"t{place}", "domain": "vibe_coding", "workspace": "given"}
            task["turns"] = [{"query": f"t{place}", "check": "test -e a"}]
            file.write(json.dumps(task) + "\n")
    return path


def run_04(stage, **settings):
    """(own CPU seconds, seconds, summary) of a run in this process."""
    cpu = time.process_time()
    started = time.perf_counter()
    with silent():
        stage.main(stage.Settings(**settings))
    cpu = time.process_time() - cpu
    seconds = time.perf_counter() - started
    path = Path(settings["output_dir"], "summary.json")
    return cpu, seconds, json.loads(path.read_text())


def bench_agent(folder, options):
    stage = importlib.import_module("04_eval")
    tasks = write_tasks(folder, EPISODES)
    work = {"model": "x", "tasks": [str(tasks)], "concurrency": EPISODES}
    work |= {"rounds": 1, "max_steps": STEPS}
    with endpoint(folder / "log", STEPS) as url:
        cpu, seconds, summary = run_04(stage, base_url=[url], output_dir=str(folder / "out"), **work)
        steps = summary["metrics"]["steps"]
        assert summary["metrics"]["FTFC"] == 1 and steps == EPISODES * STEPS, summary
        yield "04's loop: own CPU, wall time of a step", times_of(cpu, seconds, steps)
        if options.inspect_python:
            command = [options.inspect_python, PARTS / "inspect_loop.py", url, EPISODES, folder / "given"]
            words = [str(word) for word in command]
            result = subprocess.run(words, capture_output=True, text=True, cwd=folder)
            if result.returncode:
                raise SystemExit(f"Inspect failed: {result.stdout[-1000:]}{result.stderr[-1000:]}")
            times = json.loads(result.stdout.splitlines()[-1])
            yield "Inspect, the same without a sandbox: own CPU, wall time", times_of(*times)
    for script in ("01_build_queries.py", "02_format_trajectories.py", "04_eval.py"):
        yield f"{script} --help", f"{timed(ROOT / script, '--help')[0]:.2f} s"


def times_of(cpu, seconds, steps):
    return f"{1000 * cpu / steps:.2f} ms, {1000 * seconds / steps:.2f} ms ({steps} steps)"


# ---- share ----


def requests_of(row):
    """[(prompt's token ids, number of tokens made)] of an episode, from 04's "served"."""
    requests = []
    prompt = []
    for step in reversed(row["served"]):
        ids = step["prompt_token_ids"]
        prompt = prompt[:ids] if isinstance(ids, int) else ids  # a number: as long a beginning of the next
        requests.append((prompt, len(step["token_ids"])))
    return requests[::-1]


async def send_raw(url, model, conversations):
    """Seconds of the conversations, as many at once as there are, their requests one after the other."""
    import httpx

    async def conversation(client, requests):
        for prompt, made in requests:
            body = {"model": model, "prompt": prompt, "temperature": 0, "ignore_eos": True}
            body |= {"max_tokens": made, "min_tokens": made}
            (await client.post("/completions", json=body)).raise_for_status()

    async with httpx.AsyncClient(base_url=url, timeout=3600) as client:
        warm_up = {"model": model, "prompt": "Hello", "max_tokens": 20}
        await client.post("/completions", json=warm_up)
        started = time.perf_counter()
        await asyncio.gather(*(conversation(client, requests) for requests in conversations))
        return time.perf_counter() - started


def bench_share(folder, options):
    """A fresh server for each: no cache is warm."""
    stage = importlib.import_module("04_eval")
    settings = stage.Settings(model=options.model, vllm_args=options.vllm_args)
    work = {"tasks": options.tasks, "model": options.model, "limit": CONVERSATIONS, "rounds": 1}
    work |= {"concurrency": CONVERSATIONS, "temperature": 0.0, "output_dir": str(folder / "out")}
    with silent(), stage.vllm_server(settings, folder / "04.log") as (url, _):
        _, ours, summary = run_04(stage, base_url=[url], **work)
    conversations = []
    for line in (folder / "out/episodes.jsonl").read_text().splitlines():
        conversations.append(requests_of(json.loads(line)))
    with silent(), stage.vllm_server(settings, folder / "raw.log") as (url, _):
        raw = asyncio.run(send_raw(url, options.model, conversations))
    calls = sum(map(len, conversations))
    made = summary["metrics"]["completion_tokens"]
    yield f"{len(conversations)} episodes, {calls} calls, {made:,} tokens", f"{ours:.1f} s, raw {raw:.1f} s"
    yield "the agent loop's share", f"{1 - raw / ours:.0%}"


# ---- kill ----


def finished_in(out):
    path = out / "episodes.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line)["query_id"] for line in lines if line.endswith("\n")]


def bench_kill(folder, options, kills=5):
    """A run killed at random moments: each episode is there once, no finished one is asked for again."""
    tasks = write_tasks(folder, 100)
    out = folder / "out"
    log = folder / "log"
    again = 0
    with endpoint(log, 5, 0.05) as url:
        command = [sys.executable, ROOT / "04_eval.py", "--base_url", url, "--model", "x"]
        command += ["--tasks", tasks, "--output_dir", out, "--concurrency", "8"]
        for number in range(kills + 1):
            finished = set(finished_in(out))
            asked = len(log.read_text())
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            if number < kills:
                while len(log.read_text()) == asked:
                    time.sleep(0.01)
                time.sleep(random.uniform(0, 3))
                process.kill()
            code = process.wait()
            asked_for = set(log.read_text()[asked:].split())
            again += len(finished & asked_for)
            yield f"start {number + 1}: finished before, exit code", f"{len(finished)}, {code}"
    done = finished_in(out)
    yield "episodes, distinct", f"{len(done)}, {len(set(done))}"
    yield "finished episodes that were asked for again", str(again)


BENCHES = {"data": bench_data, "agent": bench_agent, "share": bench_share, "kill": bench_kill}


def main(options):
    if wrong := [part for part in options.parts if part not in BENCHES]:
        print(f"bench.py: {wrong[0]}: no such part; there are {', '.join(BENCHES)}", file=sys.stderr)
        sys.exit(2)
    for part in options.parts or ["data", "agent"]:
        if part in ("data", "agent"):
            os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        with tempfile.TemporaryDirectory(prefix="bench") as temporary:
            os.chmod(temporary, 0o755)  # the sandbox's user must get in
            for name, value in BENCHES[part](Path(temporary), options):
                print(f"{name:64} {value}", flush=True)


if __name__ == "__main__":
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("parts", nargs="*", help=f"{', '.join(BENCHES)}; left out: the first two")
    parser.add_argument("--limi", help="a clone of github.com/GAIR-NLP/LIMI")
    parser.add_argument("--inspect_python", help="Python of an environment with inspect-ai and openai")
    parser.add_argument("--model", default="outputs/demo/tuned", help="for share (default: %(default)s)")
    parser.add_argument("--tasks", nargs="+", default=["data/demo/queries.jsonl"], help="for share")
    parser.add_argument("--vllm_args", default="", help="for share, as 04's")
    main(parser.parse_args())
