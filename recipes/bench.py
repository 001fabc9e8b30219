"""Speed of what is ours: formatting, tokenising, the agent loop, the sandbox, --help. Prints a table; asserts nothing.

    python recipes/bench.py                  # data and agent: about two minutes
    python recipes/bench.py data --limi LIMI # a clone of GAIR-NLP/LIMI: also its two data scripts on the same logs
    python recipes/bench.py agent --inspect_python ENV/bin/python   # an environment with inspect-ai 0.3.285 and openai
    python recipes/bench.py vllm --model outputs/demo/tuned         # 04 against raw requests; after the demo, minutes
    python recipes/bench.py kill             # a run of 100 episodes killed five times: is anything lost, or run twice?

data and agent run on one core. A loop's time is its own CPU time, beside an endpoint and sandboxes in other
processes; the sandbox is timed by the clock.
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
sys.path.insert(0, str(ROOT))
RNG = random.Random(0)
WORDS = ["".join(RNG.choices("abcdefghijklmnopqrstuvwxyz", k=RNG.randint(2, 9))) for _ in range(5000)]
TOOL = {"name": "run_shell_command", "description": "Run a command.", "parameters": {
    "type": "object", "properties": {"command": {"type": "string"}}, "required": ["command"]}}  # fmt: skip


def prose(n):
    return " ".join(RNG.choices(WORDS, k=n))


def trajectory(tokens):
    """Messages of about `tokens` tokens (4.7 characters each): steps of one call and its result, then an answer."""
    messages, size = [{"role": "system", "content": prose(300)}, {"role": "user", "content": prose(80)}], 2200
    while size < 4.7 * tokens:
        call = {"type": "function", "function": {"name": TOOL["name"], "arguments": {"command": prose(20)}}}
        call["id"] = f"c{len(messages)}"
        output = "\n".join(prose(8) for _ in range(20))
        messages += [{"role": "assistant", "content": prose(20), "tool_calls": [call]},
                     {"role": "tool", "tool_call_id": call["id"], "content": output}]  # fmt: skip
        size += len(output) + 320
    return [*messages, {"role": "assistant", "content": prose(40)}]


def sii_log(name, messages):
    """The same as a log of SII CLI: its last two requests, and the next-speaker check that holds the answer."""
    contents = []
    for message in messages[1:]:
        if message["role"] == "tool":
            response = {
                "name": TOOL["name"],
                "id": message["tool_call_id"],
                "response": {"output": message["content"]},
            }
            contents.append({"role": "user", "parts": [{"functionResponse": response}]})
            continue
        parts = [{"text": message["content"]}]
        for call in message.get("tool_calls", []):
            parts.append({"functionCall": {"name": TOOL["name"], "args": call["function"]["arguments"]}})
        contents.append({"role": "user" if message["role"] == "user" else "model", "parts": parts})
    question = "Analyze *only* the content and structure of your immediately preceding response"
    check = [*contents, {"role": "user", "parts": [{"text": question}]}]
    events = []
    for part, tools in ((contents[:-3], [TOOL]), (contents[:-1], [TOOL]), (check, [])):
        request = {"system_instruction": messages[0]["content"], "messages": part}
        request["tools"] = [{"functionDeclarations": tools}] if tools else []
        events.append({"type": "api_request_full", "data": {"full_request": request}})
    return {"id": name, "model": "m", "events": events}


def timed(*command):
    """(seconds, peak GB) of a process."""
    started = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, *map(str, command)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(map(str, command))} failed")
    return time.perf_counter() - started, usage.ru_maxrss / 1e6


def bench_data(folder, limi):
    make_model = load("recipes/demo/make_model.py")
    (folder / "logs").mkdir()
    for number in range(78):
        log = sii_log(f"session{number:02d}", trajectory(42_000))
        (folder / f"logs/session{number:02d}.json").write_text(json.dumps(log))
    with open(folder / "rows.jsonl", "w") as file:
        for number in range(10_000):
            row = {
                "query_id": str(number),
                "messages": trajectory(4_000),
                "tools": [{"type": "function", "function": TOOL}],
            }
            file.write(json.dumps(row) + "\n")
    tok = make_model.make_tokenizer([prose(100_000)], vocab_size=16_000)
    tok.save_pretrained(folder / "tokenizer")

    seconds, memory = timed(
        ROOT / "02_format_trajectories.py", folder / "rows.jsonl", "--output_file", folder / "b.jsonl"
    )
    yield "02: 10,000 rows of 4k tokens", f"{seconds:.1f} s, {memory:.2f} GB"
    two = [ROOT / "02_format_trajectories.py", folder / "logs", "--output_file", folder / "train.jsonl"]
    seconds, memory = timed(*two, "--tokenizer", folder / "tokenizer")
    yield "02: 78 logs of 42k tokens, tokens counted", f"{seconds:.1f} s, {memory:.2f} GB"
    if limi:
        scripts, told = Path(limi, "scripts/data_prepare"), seconds
        seconds, _ = timed(
            scripts / "events2messages.py", "--raw_dir", folder / "logs", "--output_dir", folder / "limi"
        )
        again = [scripts / "messages_json2parquet_128k.py", "--tokenizer_path", folder / "tokenizer"]
        again += ["--input_json", folder / "limi/openai_training_data.json", "--output_parquet", folder / "t.parquet"]
        again, _ = timed(*again, "--max_tokens", 125_000, "--duplicate_times", 2)
        seconds += again
        yield "LIMI's two scripts on the same logs, and 02's time as a share", f"{seconds:.1f} s, {told / seconds:.2f}"

    sft = importlib.import_module("03_sft")
    tok.stop_ids, tok.end_id = set(tok.convert_tokens_to_ids(make_model.STOPS)), tok.convert_tokens_to_ids("<|user|>")
    started = time.perf_counter()
    rows, _ = sft.read_rows(folder / "train.jsonl")
    samples = sft.tokenize(tok, rows, 125_000)[0]
    mean = sum(len(sample["input_ids"]) for sample in samples) / len(samples)
    seconds, memory = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    yield f"03: ids and labels of {len(samples)} rows, mean {mean:,.0f} tokens", f"{seconds:.1f} s, {memory:.2f} GB"


# A call in every step but the last; arguments: steps, seconds until it answers, file that gets each episode asked for
ENDPOINT = r"""
import asyncio, json, sys
STEPS, DELAY, TEXT, LOG = int(sys.argv[1]), float(sys.argv[2]), "x" * 500, open(sys.argv[3], "a", buffering=1)
def reply(body):
    done = sum(message["role"] == "assistant" for message in body["messages"])
    LOG.write([message["content"] for message in body["messages"] if message["role"] == "user"][0] + "\n")
    function = {"name": "read_file", "arguments": json.dumps({"absolute_path": "/workspace/a"})}
    calls = {"tool_calls": [{"id": f"c{done}", "type": "function", "function": function}]} if done < STEPS - 1 else {}
    message = {"role": "assistant", "content": TEXT} | calls
    usage = {"prompt_tokens": 9, "completion_tokens": 9, "total_tokens": 18}
    choice = {"index": 0, "message": message, "finish_reason": "tool_calls" if calls else "stop"}
    reply = {"id": "x", "object": "chat.completion", "created": 0, "model": "x", "choices": [choice], "usage": usage}
    return json.dumps(reply).encode()
async def serve(reader, writer):
    while head := await reader.readuntil(b"\r\n\r\n"):
        sizes = [line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length")]
        size = int(sizes[0].split(b":")[1])
        data = reply(json.loads(await reader.readexactly(size)))
        await asyncio.sleep(DELAY)
        kind = b"content-type: application/json\r\n"
        writer.write(b"HTTP/1.1 200 OK\r\n" + kind + b"content-length: %d\r\n\r\n" % len(data) + data)
async def main():
    server = await asyncio.start_server(serve, "127.0.0.1", 0, limit=1 << 24)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()
asyncio.run(main())
"""

# The same work in Inspect: its generate loop, its openai-api provider, and a tool that calls 04's sandbox. Arguments:
# the repository, base_url, number of episodes, the task's workspace, a scratch folder
INSPECT = r"""
import importlib, json, os, sys, time, types
from pathlib import Path
sys.path.insert(0, sys.argv[1])
sys.modules["trl"] = types.SimpleNamespace(TrlParser=None)  # 04 needs it for its command line only
stage = importlib.import_module("04_eval")
os.environ |= {"LOCAL_BASE_URL": sys.argv[2], "LOCAL_API_KEY": "x"}
from inspect_ai import Task, eval
from inspect_ai.dataset import Sample
from inspect_ai.solver import solver
from inspect_ai.tool import tool
@tool
def read_file(sandbox):
    async def execute(absolute_path: str):
        '''Read a text file.

        Args:
            absolute_path: The file.
        '''
        return (await sandbox.call("read_file", {"absolute_path": absolute_path}, 10))["output"]
    return execute
@solver
def agent():
    async def solve(state, generate):
        number = int(state.sample_id)
        sandbox = stage.Sandbox(Path(sys.argv[5], f"inspect{number}"), number, stage.Settings())
        sandbox.fill(Path(sys.argv[4]))
        state.tools = [read_file(sandbox)]
        state = await generate(state, tool_calls="loop")
        await sandbox.stop()
        return state
    return solve
count = int(sys.argv[3])
task = Task(dataset=[Sample(id=n, input="q") for n in range(count)], solver=agent())
started, cpu = time.perf_counter(), time.process_time()
(log,) = eval(task, model="openai-api/local/x", max_connections=count, max_samples=count, display="none",
              log_dir=sys.argv[5], temperature=0.6, top_p=0.95)
steps = [sum(message.role == "assistant" for message in sample.messages) for sample in log.samples]
assert log.status == "success" and len(steps) == count, log.error
print(json.dumps([time.process_time() - cpu, time.perf_counter() - started, sum(steps)]))
"""


@contextlib.contextmanager
def endpoint(log, steps, delay=0.0):
    """base_url of a scripted endpoint in a process of its own."""
    command = [sys.executable, "-c", ENDPOINT, str(steps), str(delay), str(log)]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        yield f"http://127.0.0.1:{int(server.stdout.readline())}/v1"
    finally:
        server.kill()
        server.wait()


async def openai_chat(client, settings, messages, tools, seed, *_, **__):
    """04's chat() through the openai client, on the same connections."""
    from openai import AsyncOpenAI

    if not hasattr(client, "openai"):
        client.openai = AsyncOpenAI(base_url=str(client.base_url), api_key="x", http_client=client)
    stage = importlib.import_module("04_eval")
    reply = await client.openai.chat.completions.create(
        model=settings.model, messages=[stage.to_request(message) for message in messages], seed=seed,
        temperature=settings.temperature, top_p=settings.top_p, tools=tools,
    )  # fmt: skip
    message, errors = stage.to_row(reply.choices[0].message.model_dump())
    return message, errors, reply.choices[0].finish_reason, reply.usage.model_dump() | {"seconds": 0}


def bench_agent(folder, inspect_python, episodes=64, steps=30):
    stage = importlib.import_module("04_eval")
    workspace = folder / "given"
    workspace.mkdir()
    workspace.joinpath("a").write_text("x" * 500)

    def loop_times(url, chat):
        """(CPU seconds of this process, seconds, model calls) of all episodes through 04's loop."""
        settings = stage.Settings(model="x", base_url=url, concurrency=episodes, output_dir=str(folder))
        task = {"query_id": "t", "turns": [{"query": "q", "check": "true"}], "workspace": workspace}
        real, stage.chat = stage.chat, chat
        try:
            with open(folder / "episodes.jsonl", "w") as file:
                cpu, started = time.process_time(), time.perf_counter()
                done = asyncio.run(stage.evaluate(settings, url, [(task, run) for run in range(episodes)], file))
        finally:
            stage.chat = real
        calls = sum(episode["meta"]["steps"] for episode in done)
        assert calls == episodes * steps and all(episode["meta"]["solved"] for episode in done)
        return time.process_time() - cpu, time.perf_counter() - started, calls

    async def sandbox_times():
        requests = [("write_file", {"file_path": "/workspace/a", "content": "x" * 500})]
        requests += [("run_shell_command", {"command": "true"}), ("read_file", {"absolute_path": "/workspace/a"})] * 10
        times = {"start": [], "run_shell_command": [], "read_file": []}
        for _ in range(10):
            sandbox = stage.Sandbox(folder / "sandbox", 0, stage.Settings())
            sandbox.fill(None)
            for n, (name, arguments) in enumerate(requests):
                started = time.perf_counter()
                assert "output" in await sandbox.call(name, arguments, 10)
                times[name if n else "start"].append(1000 * (time.perf_counter() - started))
            await sandbox.stop()
        return [statistics.median(values) for values in times.values()]

    with endpoint(folder / "log", steps) as url:
        for name, chat in (("httpx, as it is", stage.chat), ("the openai client", openai_chat)):
            with open(os.devnull, "w") as null, contextlib.redirect_stdout(null), contextlib.redirect_stderr(null):
                cpu, seconds, calls = loop_times(url, chat)
            yield f"04's loop, {name}: own CPU, wall time of a step", times_of(cpu, seconds, calls)
        if inspect_python:
            command = [inspect_python, "-c", INSPECT, ROOT, url, str(episodes), workspace, folder]
            result = subprocess.run(command, capture_output=True, text=True, cwd=folder)
            if result.returncode:
                raise SystemExit(f"Inspect failed: {result.stdout[-1000:]}{result.stderr[-1000:]}")
            times = times_of(*json.loads(result.stdout.splitlines()[-1]))
            yield "Inspect, the same work: own CPU, wall time of a step", times
        else:
            yield "Inspect, the same", "skipped: no --inspect_python"
    start, command, read = asyncio.run(sandbox_times())
    yield "04: sandbox start / `true` in it / read_file in it, medians", f"{start:.0f} / {command:.1f} / {read:.2f} ms"
    for script in ("01_build_queries.py", "02_format_trajectories.py", "04_eval.py"):
        yield f"{script} --help", f"{timed(ROOT / script, '--help')[0]:.2f} s"


def times_of(cpu, seconds, calls):
    return f"{1000 * cpu / calls:.2f} ms, {1000 * seconds / calls:.2f} ms ({calls} steps)"


def bench_vllm(folder, model, tasks_file, episodes=16, repeats=3):
    """Wall time of episodes through 04, and of the same requests sent raw: the recorded prompts in their order, with
    the recorded number of tokens forced, as many conversations at once. A fresh server each: no cache is warm.

    Once with the tasks' own checks, which take the processor from a model that runs on it too, once without them.
    """
    import httpx

    stage = importlib.import_module("04_eval")
    options = "--dtype bfloat16 --enforce-eager --max-model-len 8192"
    settings = stage.Settings(model=model, concurrency=episodes, max_tokens=768, max_steps=12, temperature=0.0,
                              vllm_args=options, output_dir=str(folder), patience=60)  # fmt: skip
    tasks = stage.read_tasks(tasks_file)
    light = [task | {"turns": [turn | {"check": "true"} for turn in task["turns"]]} for task in tasks]
    os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}

    def through_04(url, todo):
        """(seconds from the first episode's start, {conversation: [(request, tokens made)]}, seconds that an episode
        has waited for its commands and checks, on average)."""
        recorded, started, waited, real = {}, [], [], (stage.chat, stage.run_episode, stage.Sandbox.call)

        async def chat(client, settings, messages, tools, seed, *rest, **more):
            body = {"model": settings.model, "messages": [stage.to_request(message) for message in messages]}
            body |= {"seed": seed, "temperature": settings.temperature, "top_p": settings.top_p, "tools": tools}
            reply = await real[0](client, settings, messages, tools, seed, *rest, **more)
            recorded.setdefault(id(client), []).append((body, reply[3].get("completion_tokens")))
            return reply

        async def run_episode(*arguments):
            if not started:
                recorded.clear()  # of the probe
                started.append(time.perf_counter())
            return await real[1](*arguments)

        async def call(*arguments):
            began = time.perf_counter()
            reply = await real[2](*arguments)
            waited.append(time.perf_counter() - began)
            return reply

        stage.chat, stage.run_episode, stage.Sandbox.call = chat, run_episode, call
        try:
            with open(folder / "episodes.jsonl", "w") as file:
                asyncio.run(stage.evaluate(settings, url, todo, file))
        finally:
            stage.chat, stage.run_episode, stage.Sandbox.call = real
        return time.perf_counter() - started[0], recorded, sum(waited) / episodes

    async def raw(url, recorded):
        """Seconds, and tokens made, of the recorded requests without anything around them."""
        made = 0

        async def conversation(client, requests):
            nonlocal made
            for body, tokens in requests:
                forced = {"max_tokens": tokens, "min_tokens": tokens, "ignore_eos": True}
                reply = await client.post("chat/completions", json=body | forced)
                made += reply.raise_for_status().json()["usage"]["completion_tokens"]

        async with httpx.AsyncClient(base_url=url, timeout=600) as client:
            probe = {"model": model, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 100}
            await client.post("chat/completions", json=probe | {"tools": stage.TOOLS})
            started = time.perf_counter()
            await asyncio.gather(*(conversation(client, requests) for requests in recorded.values()))
            return time.perf_counter() - started, made

    ratios = {"own checks": [], "no checks": []}
    for name, tasks in [("own checks", tasks), ("no checks", light)] * repeats:
        todo = [(tasks[n % len(tasks)], n // len(tasks)) for n in range(episodes)]
        with open(os.devnull, "w") as null, contextlib.redirect_stdout(null), contextlib.redirect_stderr(null):
            with stage.vllm_server(stage.vllm_command(settings), folder / "vllm.log") as url:
                ours, recorded, waited = through_04(url, todo)
            with stage.vllm_server(stage.vllm_command(settings), folder / "vllm.log") as url:
                theirs, made = asyncio.run(raw(url, recorded))
        calls = sum(map(len, recorded.values()))
        expected = sum(tokens for requests in recorded.values() for _, tokens in requests)
        assert made == expected, (made, expected)
        ratios[name].append(ours / theirs)
        figures = f"{ours:.1f} s, {theirs:.1f} s, ratio {ours / theirs:.2f}; in the sandbox {waited:.1f} s an episode"
        yield f"{name}, {episodes} episodes, {calls} calls, {made:,} tokens: 04, raw", figures
    yield "median ratios", ", ".join(f"{name} {statistics.median(values):.2f}" for name, values in ratios.items())


def bench_kill(folder, episodes=100, kills=5):
    """A run killed at random moments: each episode is there once, and none that was finished is asked for again."""
    path, out, log = folder / "queries.jsonl", folder / "out", folder / "log"
    rows = [{"query_id": f"t{n}", "turns": [{"query": f"t{n}", "check": "test -e a"}], "workspace": "given"}
            for n in range(episodes)]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder.joinpath("given").mkdir()
    folder.joinpath("given/a").write_text("x" * 500)
    again, moments = 0, random.Random()
    with endpoint(log, 5, 0.05) as url:
        command = [sys.executable, ROOT / "04_eval.py", "--base_url", url, "--model", "x", "--tasks", path]
        command += ["--output_dir", out, "--concurrency", "8"]
        for number in range(kills + 1):
            lines = out.joinpath("episodes.jsonl").read_text().splitlines(keepends=True) if out.exists() else []
            finished = {json.loads(line)["query_id"] for line in lines if line.endswith("\n")}
            asked = len(log.read_text())
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            if number < kills:
                while len(log.read_text()) == asked:
                    time.sleep(0.01)
                time.sleep(moments.uniform(0, 3))
                process.kill()
            code = process.wait()
            new = log.read_text()[asked:].split()
            again += len(finished & set(new))
            asked_for = len({name for name in new if name[1:].isdigit()})  # not the probe
            yield f"start {number + 1}: finished before, asked for, exit code", f"{len(finished)}, {asked_for}, {code}"
    done = [json.loads(line)["query_id"] for line in out.joinpath("episodes.jsonl").read_text().splitlines()]
    yield "episodes, distinct", f"{len(done)}, {len(set(done))}"
    yield "finished episodes that were asked for again", str(again)


def load(path):
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help="data, agent, vllm, kill; left out: the first two")
    parser.add_argument("--limi", help="a clone of github.com/GAIR-NLP/LIMI")
    parser.add_argument("--inspect_python", help="Python of an environment with inspect-ai and openai")
    parser.add_argument("--model", default="outputs/demo/tuned", help="for vllm")
    parser.add_argument("--tasks", default="data/demo/queries.jsonl", help="for vllm")
    arguments = parser.parse_args()
    parts = {"data": lambda folder: bench_data(folder, arguments.limi),
             "agent": lambda folder: bench_agent(folder, arguments.inspect_python),
             "vllm": lambda folder: bench_vllm(folder, arguments.model, arguments.tasks),
             "kill": bench_kill}  # fmt: skip
    for part in arguments.parts or ["data", "agent"]:
        if part in ("data", "agent"):
            os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        with tempfile.TemporaryDirectory(prefix="bench") as temporary:
            os.chmod(temporary, 0o755)  # the sandbox's user must get in
            for name, value in parts[part](Path(temporary)):
                print(f"{name:64} {value}", flush=True)
