"""An episode of AgencyBench v2: the grader runs in a sandbox of its own and asks for the agent, and for
judges, through sockets of ours in the folder /bridge, where start.sh and what it starts lie too."""

import asyncio
import contextlib
import importlib
import json
import math
import re
import shutil
import subprocess
import tempfile
from dataclasses import replace as with_changes
from pathlib import Path

HERE = Path(__file__).resolve().parent
stage = importlib.import_module("04_eval")
NotRun = stage.NotRun
PLAYWRIGHT = "lib/python3*/site-packages/playwright/driver/package/browsers.json"
FOREVER = 30 * 86_400  # seconds
SCORES = "python3 -I /bridge/scores.py meta_eval.json"
OURS = shutil.ignore_patterns("__pycache__", "episode.py", "*.yaml", "requirements.txt")


class Crash(Exception):
    """The grader ended without a score, after the agent had worked."""


class Scenario(stage.Episode):
    """One scenario, from its grader's start to its end; all prompts are one conversation."""

    def begin_again(self):
        self.home = f"/workspace/{self.task['workspace'].name}"  # the grader's folder, as it sees it
        self.talk = stage.Talk()
        self.stats = stage.Counter({key: 0 for key in stage.STATS})
        self.served = []
        self.asked = []  # (folder, why the round ended) of each prompt
        self.begun = False
        self.fault = None  # why there can be no score
        self.handlers = []

    async def run(self):
        """The episode's row; raises NotRun. A grader that crashes twice on what the agent left is a score of
        0: else the model could take a scenario out of its own mean."""
        started = stage.time.monotonic()
        for _ in range(2):
            self.begin_again()
            try:
                table = await self.grade_scenario()
                self.rounds = self.rounds_of(table)
                break
            except Crash as crash:
                print(f"{self.name}: grader crashed: {crash}", flush=True)
                turns = range(len(self.task["turns"]))
                self.rounds = [record_of(turn, 1, "grader crashed", 0) for turn in turns]
        row = self.row(round(stage.time.monotonic() - started, 2))
        row["meta"]["solved"] = scenario_scores(self.rounds)["Pass@2"] == 1
        return row

    def rounds_of(self, table):
        stops = iter([stop for _, stop in self.asked])
        rounds = []
        for turn in range(len(self.task["turns"])):
            scores = table[turn] if turn < len(table) else []
            for attempt, score in enumerate(scores, 1):
                rounds.append(record_of(turn, attempt, next(stops), score / 10))
            if not scores:  # after one that failed
                rounds.append(record_of(turn, 1, "skipped", 0))
        return rounds

    async def grade_scenario(self):
        """[[score from 0 to 10 of each attempt] of each subtask]; raises Crash, NotRun."""
        with tempfile.TemporaryDirectory() as bridge:  # no other user reaches the sockets in it
            grader = self.open_grader(Path(bridge))
            servers = [await self.listen(bridge, "agent", self.serve_agent, grader)]
            if self.task["meta"]["judge"]:  # else nobody but what the model wrote would ask it
                servers.append(await self.listen(bridge, "judge", self.serve_judge, grader))
            try:
                command = f"bash /bridge/start.sh {'browser' * self.task['meta']['browser']}"
                reply = await grader.call("check", {"command": command}, FOREVER)
            finally:
                for server in servers:
                    server.close()
                for handler in self.handlers:  # a grader that ended before its agent did
                    handler.cancel()
                await grader.stop()
            if self.fault:
                raise self.fault
            code, output = outcome(reply, self.begun)
            if code == 0:
                reply = await grader.call("check", {"command": SCORES}, 60)
                code, output = outcome(reply, self.begun)
                await grader.stop()
        table = json.loads(output) if code == 0 else []
        count = sum(map(len, table))
        if code == 0 and 0 < count == len(self.asked):
            return table
        said = f"{count} attempts scored" if code == 0 else output.strip().rpartition("\n")[2][:300]
        said = f"the agent was asked {len(self.asked)} times, {said}"
        if self.begun:
            raise Crash(said)
        raise NotRun("check_not_started", said)

    def open_grader(self, bridge):
        """The grader's sandbox, with a fresh copy of its folder. Writable is what it makes, `agent` in that
        folder: nothing that the model wrote changes the grader, or is imported in the place of a module."""
        copy = self.folder.with_name(f"{self.name}.grader")
        stage.remove(copy)
        shutil.copytree(self.task["workspace"], copy, symlinks=True)
        shutil.rmtree(copy / "claude", ignore_errors=True)  # the authors' own run
        copy.joinpath("agent").mkdir()
        with open(copy / ".env", "a") as file:
            file.write(HERE.joinpath("env").read_text())
        subprocess.run(["chmod", "-R", "a+rX", copy], check=True)
        shutil.copytree(HERE, bridge, dirs_exist_ok=True, ignore=OURS)
        bridge.chmod(0o755)
        for version in self.task["venv"].glob(PLAYWRIGHT):  # the folder where it looks for its ffmpeg
            entries = stage.read_json(version)["browsers"]
            [revision] = [entry["revision"] for entry in entries if entry["name"] == "ffmpeg"]
            folder = bridge / "browsers" / f"ffmpeg-{revision}"
            folder.mkdir(parents=True)
            shutil.copy(HERE / "ffmpeg", folder / "ffmpeg-linux")
        settings = with_changes(self.settings, network=False)
        mounts = {self.home: copy, "/bridge": bridge}
        if self.settings.repository:
            mounts["/repository"] = self.settings.repository
        task = {"venv": self.task["venv"]}
        grader = stage.Sandbox(settings, self.bench.program, self.folder, self.bench.slot, task, mounts)
        grader.root = f"{self.home}/agent"
        grader.fill(None)
        return grader

    async def listen(self, bridge, name, answer, grader):
        """A server on the socket BRIDGE/NAME.socket. What answer raises ends the grader, without a score."""

        async def serve(reader, writer):
            self.handlers.append(asyncio.current_task())
            try:
                await answer(reader, writer)
            except (NotRun, Crash) as fault:  # the grader would swallow it, and score an empty folder
                self.fault = fault
                with contextlib.suppress(asyncio.CancelledError):  # the episode ends before it does
                    await asyncio.shield(grader.stop())
            finally:
                writer.close()

        path = Path(bridge, f"{name}.socket")
        server = await asyncio.start_unix_server(serve, path, limit=1 << 28)
        path.chmod(0o666)
        return server

    # The agent, as sii-agent-sdk asks for it

    async def serve_agent(self, reader, writer):
        while line := await reader.readline():
            try:
                events = await self.answer(**json.loads(line)["params"])
            except (ValueError, LookupError, TypeError, OSError) as error:
                events = [{"type": "error", "error": {"message": str(error)}}]
            for event in events:
                writer.write(json.dumps(event).encode() + b"\n")

    async def answer(self, prompt, options, **_):
        """The agent's work on the prompt in options["cwd"], as events for the SDK."""
        root = options["cwd"]
        place = self.folder / Path(root).relative_to(f"{self.home}/agent")
        if place.resolve() != place.absolute():
            raise ValueError(f"{root} is a link, or not a folder of the model")
        if not self.asked:
            ours = stage.SYSTEM_PROMPT.replace("/workspace", root)
            self.talk.add("system", f"{ours}\n\n{options.get('system_prompt', '')}".strip())
        elif root != self.asked[-1][0]:
            prompt = f"You work in the directory {root} now.\n\n{prompt}"
        self.talk.add("user", prompt)
        before = len(self.talk.messages)
        self.begun = True
        steps = min(self.settings.max_steps, options["max_turns"])
        limited = with_changes(self.settings, max_steps=steps)
        agent = self.open(place)
        agent.root = root
        seed = self.settings.seed + self.run_number
        parts = (limited, self.talk, self.tools, seed, self.stats, self.served)
        try:
            stop = await stage.run_agent(self.bench.endpoint, agent, *parts)
        finally:
            await agent.stop()  # and with it whatever the agent left running
        self.asked.append((root, stop))
        cleaner = self.open(place, {"/clean.py": HERE / "clean.py"})
        cleaner.root = root
        try:
            code, output = await cleaner.shell("python3 -I /clean.py", 60)
        finally:
            await cleaner.stop()
        if code:
            raise Crash(output[-300:])
        session = {"type": "completed", "metadata": {"session_id": self.name}}
        return [*events_of(self.talk.messages[before:]), session]

    # The judges, as OpenAI's chat completions

    async def serve_judge(self, reader, writer):
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
        if "\norigin:" in head or "\nsec-fetch-site:" in head:  # a page of the model, not the grader
            return
        length = int(head.partition("content-length:")[2].split()[0])
        body = json.loads(await reader.readexactly(length))
        asked = asyncio.create_task(self.judge(body["messages"]))
        left = asyncio.create_task(reader.read())
        await asyncio.wait([asked, left], return_when=asyncio.FIRST_COMPLETED)
        left.cancel()
        if not asked.done():
            asked.cancel()
            raise NotRun("endpoint_error", "the judge takes longer than the grader waits for it")
        message = {"role": "assistant", "content": await asked}
        choice = {"index": 0, "finish_reason": "stop", "message": message}
        data = {"id": "judge", "object": "chat.completion", "created": 0, "model": body["model"]}
        content = json.dumps(data | {"choices": [choice]}).encode()
        lines = f"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {len(content)}\r\n"
        writer.write(f"{lines}connection: close\r\n\r\n".encode() + content)
        await writer.drain()

    async def judge(self, messages):
        """The judge's answer; raises NotRun where it has none, or one that the grader would count as 0
        because it cannot read it."""
        for message in messages:
            if isinstance(message["content"], list):  # a video of no length: there is no ffmpeg
                kept = [part for part in message["content"] if not str(part).endswith(";base64,'}}")]
                message["content"] = kept
        for seed in range(3):
            reply = await self.bench.judge.complete(messages, [], seed)
            text = reply.message["content"] if reply.message else ""
            if answer := as_asked(text, self.task["meta"]["judge"]):
                return answer
        raise NotRun("judge_undecided", f"no answer that the grader could read: {text[:200] or reply.stop}")


def outcome(reply, begun):
    """(exit code, output) of a command. Memory and processes are limits for what the model wrote; raises
    NotRun where the disk is nearly full, which may be anybody's doing, or where the agent has not begun."""
    killed = reply.get("killed")
    if killed == "disk" or killed and not begun:
        raise NotRun("killed", f"the limit of {killed} ended the grader")
    code, _, output = reply.get("output", f"1\n{reply.get('error')}").partition("\n")
    return int(code), output


def as_asked(text, kind):
    """A judge's answer, bare, in the form that its grader asks for; None if it is not: the grader would read
    a 0 in it, or a "yes" anywhere, or more than full marks. kind: as in scenarios.yaml."""
    if kind == "yes or no":
        found = re.match(r"\W*(yes|no)\b\W*(.*)", text, re.IGNORECASE | re.DOTALL)
        return f"{found[1].lower()}: {found[2]}" if found else None
    if kind == "text":
        return text.strip() or None
    answer = json_in(text)
    with contextlib.suppress(TypeError, ValueError):
        score = float(answer["score"])
        if 0 <= score <= float(kind.removeprefix("score of ")) and answer["score"] is not True:
            return json.dumps(answer)
    return None


def json_in(text):
    """The first JSON object in the text, or {"score": None}."""
    start = text.find("{")
    while start >= 0:
        with contextlib.suppress(ValueError):
            return {"score": None} | json.JSONDecoder().raw_decode(text, start)[0]
        start = text.find("{", start + 1)
    return {"score": None}


def record_of(turn, attempt, stop, score):
    """A record of "rounds"; what is missing stands in the grader's next prompt."""
    record = {"turn": turn, "round": attempt, "stop": stop, "checks": [], "score": score}
    return record | {"feedback": ""}


def events_of(messages):
    """What the agent did, in the words that the SDK expects of its bridge."""
    for message in messages:
        if message["role"] == "tool":
            answered = {"tool_use_id": message["tool_call_id"], "content": message["content"]}
            yield {"type": "tool_result"} | answered
        elif message["content"]:
            yield {"type": "assistant_message", "content": [{"type": "text", "text": message["content"]}]}
        for call in message.get("tool_calls", []):
            made = {"tool_name": call["function"]["name"], "args": call["function"]["arguments"]}
            yield {"type": "tool_call", "tool_call_id": call["id"]} | made


def scenario_scores(rounds, max_rounds=None):
    """{"S_avg", "Pass@1", "Pass@2"} of a scenario, in [0, 1]: mean over its subtasks of the best score,
    share of its subtasks that score 60 % within k attempts."""
    turns = {record["turn"] for record in rounds}

    def best(attempts):
        scores = {turn: [] for turn in turns}
        for record in rounds:
            if record["round"] <= attempts:
                scores[record["turn"]].append(record["score"])
        return [max(of_turn) for of_turn in scores.values()]

    scores = {"S_avg": sum(best(math.inf)) / len(turns)}
    for attempts in (1, 2):
        passed = [score for score in best(attempts) if score >= 0.6]
        scores[f"Pass@{attempts}"] = len(passed) / len(turns)
    return scores


