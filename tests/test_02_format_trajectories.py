"""Stage 2: logs become rows exactly, or rejects with a reason; a mistake of the user is one line and exit code 2."""
import argparse
import copy
import html
import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

stage = importlib.import_module("02_format_trajectories")
SCRIPT = Path(stage.__file__)

READ_FILE = {"type": "function", "function": {
    "name": "read_file", "description": "Read a file.",
    "parameters": {"type": "object", "properties": {"path": {"type": "string"}}, "required": ["path"]}}}


def call(path="a.txt", name="read_file", id="c1"):
    return {"id": id, "type": "function", "function": {"name": name, "arguments": {"path": path}}}


def row(**changes):
    """A row that passes every check, with some keys changed."""
    messages = [
        {"role": "system", "content": "You are an agent."},
        {"role": "user", "content": "What does a.txt say?"},
        {"role": "assistant", "content": "I look.", "reasoning_content": "Read it.", "tool_calls": [call()]},
        {"role": "tool", "tool_call_id": "c1", "content": "42"},
        {"role": "assistant", "content": "It says 42."},
    ]
    return {"query_id": "q1", "messages": messages, "tools": [READ_FILE]} | changes


def edited(index, **changes):
    """row() with one message changed."""
    good = row()
    good["messages"][index] |= changes
    return good


def run(*arguments, cwd):
    return subprocess.run([sys.executable, str(SCRIPT), *map(str, arguments)], cwd=cwd, capture_output=True, text=True)


def write(path, *records):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def run_here(folder, *inputs, **settings):
    """The stage in this process, writing to folder/data; returns the rows."""
    options = {"output_file": str(folder / "data/train.jsonl")} | settings
    stage.main(stage.Settings(**options), argparse.Namespace(inputs=[str(path) for path in inputs]))
    return read(folder / "data/train.jsonl")


def format_rows(folder, *records, good=True, **settings):
    """Run the stage on the records and one good row; returns (rows but the good one, {line: reasons})."""
    extra = [
        row(query_id="good", messages=edited(1, content="A different question: what is in a.txt?")["messages"])
    ] * good
    rows = run_here(folder, write(folder / "in.jsonl", *records, *extra), **settings)
    rejects = read(folder / "data/rejected_trajectories.jsonl")
    return ([r for r in rows if r["query_id"] != "good"],
            {int(r["source"].rsplit(":", 1)[1]): r["reasons"] for r in rejects})


def assert_one_line_error(result, *parts):
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1, result.stderr
    for part in parts:
        assert part in result.stderr


# Logs with a known truth
def turns_of(row):
    """A row's assistant turns as the ground truth writes them; checks the pairing on the way."""
    turns, waiting = [], []
    for message in row["messages"]:
        if message["role"] == "assistant":
            assert not waiting
            calls = message.get("tool_calls", [])
            waiting = [call["id"] for call in calls]
            turns.append({"content": message["content"], "reasoning": message.get("reasoning_content", ""),
                          "tool_calls": [call["function"] for call in calls]})
        elif message["role"] == "tool":
            assert message["tool_call_id"] == waiting.pop(0)
    assert not waiting
    return turns


def truth(path, reasoning=True):
    return [{"content": t["content"], "reasoning": t["reasoning"] if reasoning else "",
             "tool_calls": t.get("tool_calls", [])} for t in json.loads(path.read_text())]


def test_real_logs_equal_their_ground_truth(shared, tmp_path):
    logs = shared / "logs"
    result = run(
        logs / "qwen-code",
        *(logs / "sii-cli").glob("*.json"),
        *(logs / "mini-swe-agent").glob("*.traj.json"),
        cwd=tmp_path,
    )
    assert result.returncode == 0, result.stderr
    rows = {r["meta"]["format"]: r for r in read(tmp_path / "data/train.jsonl")}
    assert len(rows) == len(read(tmp_path / "data/train.jsonl")) == 3
    qwen = truth(logs / "qwen-code/ground_truth_script.json")
    assert turns_of(rows["openai_dump"]) == qwen
    assert turns_of(rows["mini_swe_agent"]) == truth(logs / "mini-swe-agent/ground_truth_script.json")
    # the same script through Gemini CLI: its history holds no reasoning, its read_file says absolute_path
    sii = truth(logs / "qwen-code/ground_truth_script.json", reasoning=False)
    sii[1]["tool_calls"][1]["arguments"] = {"absolute_path": "/home/user/work/does_not_exist.txt"}
    assert turns_of(rows["sii"]) == sii
    for name in ("openai_dump", "sii"):
        system, user, *rest = rows[name]["messages"]
        assert user == {
            "role": "user",
            "content": "Write a hello.py with a greet function, run it, and report its output.",
        }
        assert "setting up the context for our chat" in system["content"]
        assert [m["role"] for m in rest] == [
            "assistant",
            "tool",
            "assistant",
            "tool",
            "tool",
            "assistant",
            "tool",
            "assistant",
        ]
    assert "File not found" in rows["sii"]["messages"][6]["content"]
    types = {t["function"]["parameters"]["type"] for t in rows["sii"]["tools"]}
    assert types == {"object"} and len(rows["sii"]["tools"]) == 11


def test_files_that_are_no_logs_are_counted(shared, tmp_path):
    run(shared / "logs/qwen-code", cwd=tmp_path)
    rejects = read(tmp_path / "data/rejected_trajectories.jsonl")
    assert sorted(Path(r["source"]).name for r in rejects) == ["SOURCES.txt", "ground_truth_script.json"]
    assert all(r["reasons"][0].startswith("not_a_log") for r in rejects)
    result = run(shared / "logs/qwen-code/ground_truth_script.json", cwd=tmp_path / "data")
    assert_one_line_error(result, "ground_truth_script.json", "not a log")


# The normal form
def test_a_good_row_passes_unchanged(tmp_path):
    rows, rejects = format_rows(tmp_path, row())
    assert rejects == {}
    assert rows[0] == row() | {"meta": {"source": f"{tmp_path}/in.jsonl:1", "format": "row"}}


def test_normal_form_of_loose_messages():
    messages = stage.normalise([
        {"role": "developer", "content": [{"type": "text", "text": "Be brief."}]},
        {"role": "user", "content": "Go."},
        {"role": "assistant", "content": None, "reasoning_content": " ", "tool_calls": [
            {"function": {"name": "a", "arguments": '{"x": {"y": null, "z": [1]}, "w": null}'}},
            {"function": {"name": "b", "arguments": ""}}]},
        {"role": "tool", "name": "b", "content": "B"},
        {"role": "tool", "name": "a", "content": None},
        {"role": "assistant", "content": "Do"},
        {"role": "assistant", "content": "ne."},
    ])
    assert messages == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Go."},
        {"role": "assistant", "content": "", "tool_calls": [
            {"id": "call_0", "type": "function", "function": {"name": "a", "arguments": {"x": {"z": [1]}}}},
            {"id": "call_1", "type": "function", "function": {"name": "b", "arguments": {}}}]},
        {"role": "tool", "tool_call_id": "call_0", "content": ""},
        {"role": "tool", "tool_call_id": "call_1", "content": "B"},
        {"role": "assistant", "content": "Do\nne."},
    ]


def test_ids_are_unique_over_a_row():
    def turn(id):  # an empty result is a result: the next turn stays its own
        return [
            {"role": "assistant", "tool_calls": [call(id=id)]},
            {"role": "tool", "tool_call_id": id, "content": ""},
        ]

    messages = stage.normalise([{"role": "user", "content": "Go."}, *turn("call_1"), *turn("call_1"), *turn(None)])
    assert [m.get("tool_call_id") for m in messages] == [None, None, "call_1", None, "call_2", None, "call_3"]
    messages = stage.normalise([{"role": "user", "content": "Go."}, *turn("call_1"), *turn(""), *turn("a")])
    assert [m["tool_call_id"] for m in messages if m["role"] == "tool"] == ["call_1", "call_2", "a"]


def test_dumps_of_two_sessions_with_the_same_query(tmp_path):
    """Requests are grouped by their whole conversation, not by its first message; helpers have no tools."""
    system, user, look, result, answer = row()["messages"]
    other = {"role": "assistant", "content": "I cannot."}

    def dump(messages, response, tools=(READ_FILE,)):
        return {"request": {"model": "m", "messages": messages, "tools": list(tools)},
                "response": {"choices": [{"message": response}]}}

    folder = tmp_path / "dumps"
    write(folder / "1.json", dump([system, user], look))
    write(folder / "2.json", dump([system, user], other))
    write(folder / "3.json", dump([system, user, look, result], answer))
    write(folder / "4.json", dump([system, user, look, result, answer, user], other, tools=[]))
    assert run(folder, cwd=tmp_path).returncode == 0
    rows = read(tmp_path / "data/train.jsonl")
    assert [[m["content"] for m in r["messages"]] for r in rows] == [
        ["You are an agent.", "What does a.txt say?", "I cannot."],
        ["You are an agent.", "What does a.txt say?", "I look.", "42", "It says 42."]]
    rejects = read(tmp_path / "data/rejected_trajectories.jsonl")
    assert [(Path(r["source"]).name, r["reasons"]) for r in rejects] == [("4.json:1", ["request_without_tools"])]


# Rejects: one planted fault, one reason
BAD_CALL = {"id": "c1", "type": "function", "function": {"name": "read_file", "arguments": "{cut"}}
FAULTS = {
    "unknown_role: robot": edited(1, role="robot"),
    "unknown_role: ['user']": edited(1, role=["user"]),
    "call_without_result: read_file": row(messages=row()["messages"][:3] + row()["messages"][4:]),
    "result_without_call": edited(3, tool_call_id="c9"),
    "undeclared_tool: rm": edited(2, tool_calls=[call(name="rm")]),
    "missing_argument: read_file path": edited(2, tool_calls=[call(path=None)]),
    "arguments_not_json: read_file": edited(2, tool_calls=[BAD_CALL]),
    "arguments_not_an_object: read_file": edited(
        2, tool_calls=[call() | {"function": {"name": "read_file", "arguments": [1]}}]
    ),
    "system_message_after_the_start": edited(4, role="system"),
    "no_final_answer: ends with tool": row(messages=row()["messages"][:4]),
    "no_final_answer: ends with user": row(messages=row()["messages"] + [{"role": "user", "content": "More."}]),
    "starts_with: assistant": row(messages=row()["messages"][:1] + row()["messages"][2:]),
    "empty_assistant_message": edited(4, content=""),
    "no_tool_schemas": row(tools=None),
    "not_solved": row(meta={"solved": False}),
    "compacted": edited(1, content="<state_snapshot>so far</state_snapshot>"),
    "non_text_content: image_url": edited(1, content=[{"type": "image_url", "image_url": {"url": "x"}}]),
    "non_text_content: int": edited(1, content=[7]),
    "malformed": row(messages=7),
}


def test_each_fault_is_rejected_with_its_reason(tmp_path):
    rows, rejects = format_rows(tmp_path, *FAULTS.values())
    assert rows == []
    for line, reason in enumerate(FAULTS, 1):
        assert [why for why in rejects[line] if why.startswith(reason)], (reason, rejects[line])
        assert len(rejects[line]) == 1, rejects[line]


def test_a_submission_ends_a_trajectory():
    submit = {"type": "function", "function": {"name": "submit", "description": "", "parameters": {"type": "object"}}}
    end = {"role": "assistant", "content": "", "tool_calls": [call(name="submit", id="c2")]}
    answered = [end, {"role": "tool", "tool_call_id": "c2", "content": "submitted"}]
    for last in ([end], answered):
        entry = format_one("row", row(messages=row()["messages"][:4] + last, tools=[READ_FILE, submit]))
        assert entry["row"]["messages"][-1]["role"] == last[-1]["role"]
    early = row()["messages"][:2] + answered + edited(2, tool_calls=[call(id="c3")])["messages"][2:3]
    early += [{"role": "tool", "tool_call_id": "c3", "content": "42"}]
    assert format_one("row", row(messages=early, tools=[READ_FILE, submit]))["reasons"] == [
        "no_final_answer: ends with tool"
    ]


def test_a_bad_call_that_the_agent_repaired_stays(tmp_path):
    messages = row()["messages"]
    wrong = [{"role": "assistant", "content": "", "tool_calls": [call(name="cat", id="c0")]},
             {"role": "tool", "tool_call_id": "c0", "content": "Error: no tool named cat"}]
    rows, rejects = format_rows(tmp_path, row(messages=messages[:2] + wrong + messages[2:]),
                                row(messages=messages[:2] + wrong + messages[4:]))
    assert len(rows) == 1 and rejects == {2: ["undeclared_tool: cat"]}


def test_loops_are_identical_failing_calls_in_a_row(tmp_path):
    messages = row()["messages"]

    def repeated(times, result):
        steps = [({"role": "assistant", "content": "", "tool_calls": [call(id=f"r{n}")]},
                  {"role": "tool", "tool_call_id": f"r{n}", "content": result}) for n in range(times)]
        return row(messages=messages[:2] + [m for step in steps for m in step] + messages[4:])

    rows, rejects = format_rows(tmp_path, repeated(3, "Error: no such file"), repeated(2, "Error: no such file"),
                                repeated(5, "Output: ok\nError: (none)\nExit Code: 0"))
    assert len(rows) == 2 and rejects == {1: ["loop: read_file"]}


def test_keep_flags_and_duplicates(tmp_path):
    records = (
        row(meta={"solved": False, "domain": "research"}),
        row(messages=row()["messages"][:4]),
        row(query_id="q2"),
    )
    rows, rejects = format_rows(tmp_path, *records, keep_failed=True, keep_unfinished=True)
    assert [r["query_id"] for r in rows] == ["q1", "q1"] and rows[0]["meta"]["domain"] == "research"
    assert rejects == {3: [f"duplicate: of {tmp_path}/in.jsonl:1"]}


# One session in every format: what the adapters must make of it
def script(**differences):
    """user, two parallel calls (one fails), answer; as rows hold it."""
    first = {"role": "assistant", "content": "I look.", "reasoning_content": "Read both.", "tool_calls": [
        call("a.txt", id="c1"), call("b.txt", id="c2")]}
    return [{"role": "user", "content": "What does a.txt say?"}, first,
            {"role": "tool", "tool_call_id": "c1", "content": "42"},
            {"role": "tool", "tool_call_id": "c2", "content": "Error: no such file"},
            {"role": "assistant", "content": "It says 42."}]


def text(value, type="text"):
    return {"type": type, "text": value}


def claude(id, parent, role, *blocks, message="m1", **more):
    content = {"role": role, "content": list(blocks)} | (
        {"id": message, "model": "claude-x"} if role == "assistant" else {}
    )
    return {"type": role, "uuid": id, "parentUuid": parent, "sessionId": "s", "message": content} | more


def use(id, path):
    return {"type": "tool_use", "id": id, "name": "read_file", "input": {"path": path}}


def answer(id, content):
    return {"type": "tool_result", "tool_use_id": id, "content": content}


CLAUDE = [
    {"type": "summary", "summary": "x", "leafUuid": "u9"},
    claude("u0", None, "user", text("What does a.txt say?")),
    claude("u1", "u0", "assistant", text("I try.")),  # rewound: another branch
    claude("v1", "u1", "user", text("Not so.")),
    claude("u2", "u0", "assistant", {"type": "thinking", "thinking": "Read both.", "signature": "s"}, message="m2"),
    claude("u3", "u2", "assistant", text("I look."), message="m2"),
    claude("u4", "u3", "assistant", use("c1", "a.txt"), message="m2"),
    claude("u5", "u4", "user", answer("c1", "42")),  # off the branch: its call ran in parallel
    claude("u6", "u4", "assistant", use("c2", "b.txt"), message="m2"),
    claude(
        "u7", "u6", "user", answer("c2", [text("Error:"), {"type": "tool_reference", "tool_name": "no such file"}])
    ),
    claude("u8", "u7", "assistant", text("It says 42."), message="m3"),
    claude("s1", "u7", "assistant", text("sub-agent"), message="m8", isSidechain=True),
]


def codex(type, **payload):
    return {"type": "response_item", "payload": {"type": type} | payload}


CODEX = [
    {
        "timestamp": "t",
        "type": "session_meta",
        "payload": {"id": "s", "base_instructions": {"text": "You are an agent."}},
    },
    codex("message", role="user", content=[text("What does a.txt say?", "input_text")]),
    {"type": "event_msg", "payload": {"type": "agent_message", "message": "I look."}},
    codex("function_call", name="read_file", arguments='{"path": "a.txt"}', call_id="c1"),
    codex("reasoning", summary=[text("Read both.", "summary_text")], content=None),
    codex("message", role="assistant", content=[text("I look.", "output_text")]),
    codex("function_call", name="read_file", arguments='{"path": "b.txt"}', call_id="c2"),
    codex("function_call_output", call_id="c2", output="Error: no such file"),
    codex("function_call_output", call_id="c1", output=[text("42", "input_text")]),
    codex("message", role="assistant", content=[text("It says 42.", "output_text")]),
]


def gemini_call(id, path, **response):
    return {"id": id, "name": "read_file", "args": {"path": path}, "status": "success",
            "result": [{"functionResponse": {"id": id, "name": "read_file", "response": response}}]}


GEMINI = [
    {"sessionId": "s", "projectHash": "p", "kind": "main"},
    {"id": "0", "type": "user", "content": "Never mind."},
    {"$rewindTo": "0"},
    {"id": "1", "type": "user", "content": [{"text": "What does a.txt say?"}]},
    {"id": "2", "type": "gemini", "content": "I look."},
    {"$set": {"lastUpdated": "now"}},
    {
        "id": "2",
        "type": "gemini",
        "content": "I look.",
        "thoughts": [{"subject": "Read", "description": "both."}],
        "toolCalls": [
            gemini_call("c1", "a.txt", output="42"),
            gemini_call("c2", "b.txt", error="Error: no such file"),
        ],
    },
    {"id": "3", "type": "user", "content": gemini_call("c1", "a.txt", output="42")["result"]},
    {"id": "4", "type": "gemini", "content": "It says 42."},
]


def opencode_tool(id, path, **state):
    return {"type": "tool", "callID": id, "tool": "read_file", "state": {"input": {"path": path}} | state}


OPENCODE = {"info": {"id": "s"}, "messages": [
    {"info": {"role": "user"}, "parts": [text("What does a.txt say?")]},
    {"info": {"role": "assistant"}, "parts": [
        {"type": "step-start"}, {"type": "reasoning", "text": "Read both."}, text("I look."),
        opencode_tool("c1", "a.txt", status="completed", output="42"),
        opencode_tool("c2", "b.txt", status="error", error="Error: no such file"), {"type": "step-finish"},
        {"type": "step-start"}, text("It says 42."), {"type": "step-finish"}]}]}

RESPONSE = {"id": "r1", "choices": [{"message": script()[1]}]}


def v0(action, id, **more):
    return {"action": action, "args": {}, "source": "agent",
            "tool_call_metadata": {"tool_call_id": id, "model_response": RESPONSE}} | more


def v0_result(id, content):
    return {"observation": "read", "content": content, "source": "environment",
            "tool_call_metadata": {"tool_call_id": id, "model_response": RESPONSE}}


OPENHANDS = {
    "instance_id": "s",
    "history": [
        {"action": "system", "source": "agent", "args": {"content": "You are an agent.", "tools": [READ_FILE]}},
        {"action": "message", "source": "user", "args": {"content": "What does a.txt say?"}},
        {"action": "recall", "source": "user", "args": {"query": "x"}},
        {"observation": "recall", "content": "", "source": "x"},
        v0("read", "c1"),
        v0_result("c1", "42"),
        v0("read", "c2"),
        v0_result("c2", "Error: no such file"),
        {"action": "message", "source": "agent", "args": {"content": "It says 42."}},
    ],
}


def v1(kind, **more):
    return {"id": "e", "kind": kind, "source": "agent"} | more


def v1_call(id, path, **more):
    return v1("ActionEvent", llm_response_id="r1",
              tool_call={"id": id, "name": "read_file", "arguments": json.dumps({"path": path})}, **more)


OPENHANDS_EVENTS = [
    v1("SystemPromptEvent", system_prompt=text("You are an agent."), tools=[READ_FILE]),
    v1("MessageEvent", llm_message={"role": "user", "content": [text("What does a.txt say?")]}),
    v1_call("c1", "a.txt", thought=[text("I look.")], reasoning_content="Read both."),
    v1_call("c2", "b.txt", thought=[]),
    v1("ObservationEvent", tool_call_id="c1", observation={"content": [text("42")]}),
    v1("AgentErrorEvent", tool_call_id="c2", error="Error: no such file"),
    v1("MessageEvent", llm_message={"role": "assistant", "content": [text("It says 42.")]}),
]
SWE_AGENT = {"info": {"exit_status": "submitted"}, "history": [
    {"role": "user", "content": "a demonstration", "is_demo": True}, script()[0],
    {k: v for k, v in script()[1].items() if k != "reasoning_content"}
    | {"thought": "I look.", "thinking_blocks": [{"type": "thinking", "thinking": "Read both."}]},
    {"role": "tool", "content": "42", "tool_call_ids": ["c1"]},
    {"role": "tool", "content": "Error: no such file", "tool_call_ids": ["c2"]}, script()[4]]}
ATIF = {
    "schema_version": "ATIF-v1.8",
    "session_id": "s",
    "agent": {"name": "x", "tool_definitions": [READ_FILE]},
    "steps": [
        {"source": "user", "message": "copied", "is_copied_context": True},
        {"source": "user", "message": "What does a.txt say?"},
        {
            "source": "agent",
            "message": "I look.",
            "reasoning_content": "Read both.",
            "tool_calls": [
                {"tool_call_id": id, "function_name": "read_file", "arguments": {"path": path}}
                for id, path in (("c1", "a.txt"), ("c2", "b.txt"))
            ],
            "observation": {
                "results": [
                    {"source_call_id": "c1", "content": "42"},
                    {"source_call_id": "c2", "content": [text("Error: no such file")]},
                ]
            },
        },
        {"source": "agent", "message": "It says 42."},
    ],
}
CC_BENCH = {"task_id": 7, "trajectory": json.dumps(CLAUDE), "task_category": "data_analysis", "model_name": "GLM-4.5"}
ALPACA = {
    "instruction": "What does a.txt say?",
    "output": "<read>a.txt</read><observation>42</observation>It says 42.",
}
SII_MESSAGES = [
    {"role": "user", "parts": [{"text": "This is the SII Cli."}]},
    {"role": "model", "parts": [{"text": "Got it. Thanks for the context!"}]},
    {"role": "user", "parts": [{"text": "What does a.txt say?"}]},
    {"role": "model", "parts": [{"text": "Read both.", "thought": True}, {"text": "I look."}]},
    {"role": "model", "parts": [{"functionCall": {"name": "read_file", "args": {"path": "a.txt"}}},
                                {"functionCall": {"name": "read_file", "args": {"path": "b.txt"}}}]},
    {"role": "user", "parts": [
        {"functionResponse": {"name": "read_file", "response": {"output": "42"}}},
        {"functionResponse": {"id": "x", "name": "read_file", "response": {"error": "Error: no such file"}}}]},
    {"role": "model", "parts": [{"text": "It says 42."}]}]
NEXT_SPEAKER = {"role": "user", "parts": [{"text": stage.NEXT_SPEAKER + " (your last turn)"}]}


def sii_request(messages, *functions):
    return {
        "type": "api_request_full",
        "data": {
            "full_request": {
                "system_instruction": "You are an agent.",
                "messages": messages,
                "tools": [{"functionDeclarations": functions}][: len(functions)],
            }
        },
    }


FUNCTION = READ_FILE["function"] | {"parameters": {
    "type": "OBJECT", "properties": {"path": {"type": "STRING"}}, "required": ["path"]}}
SII = {"id": "s", "events": [
    {"type": "start"}, sii_request(SII_MESSAGES[:3], FUNCTION), sii_request(SII_MESSAGES[:6], FUNCTION),
    sii_request([*SII_MESSAGES, NEXT_SPEAKER]), sii_request([NEXT_SPEAKER] * 20)]}
DUMP = {
    "request": {"messages": script()[:4], "tools": [READ_FILE]},
    "response": {"choices": [{"message": script()[4]}]},
}
MINI = {
    "trajectory_format": "mini-swe-agent-1.1",
    "info": {"exit_status": "Submitted", "config": {"model": {"model_name": "m"}}},
    "messages": [*script(), {"role": "exit", "content": ""}],
}
LOGS = {
    "row": {"messages": script(), "tools": [READ_FILE]},
    "claude_code": CLAUDE,
    "codex": CODEX,
    "gemini_cli": GEMINI,
    "opencode": OPENCODE,
    "openhands": OPENHANDS,
    "openhands_events": OPENHANDS_EVENTS,
    "swe_agent": SWE_AGENT,
    "atif": ATIF,
    "cc_bench": CC_BENCH,
    "alpaca": ALPACA,
    "sii": SII,
    "openai_dump": DUMP,
    "mini_swe_agent": MINI,
}


def format_one(name, log, **settings):
    return stage.format_record("log", name, log, stage.clean_tools([READ_FILE]), None, {}, stage.Settings(**settings))


@pytest.mark.parametrize("name", LOGS)
def test_every_format_gives_the_same_session(name):
    log = LOGS[name]
    first = log[0] if isinstance(log, list) else log
    assert stage.detect(first) == name and stage.READERS[name][2] == isinstance(log, list)
    entry = format_one(name, log)
    if name == "mini_swe_agent":
        assert entry["reasons"] == ["undeclared_tool: read_file"]  # its one tool is bash
        return
    messages = [message for message in entry["row"]["messages"] if message["role"] != "system"]
    expected = script()
    if name in ("claude_code", "cc_bench"):
        expected[3]["content"] = "Error:\nno such file"
    if name == "gemini_cli":
        expected[1]["reasoning_content"] = "Read\nboth."
    if name == "sii":  # no ids in the log: made here
        assert entry["row"]["tools"] == [READ_FILE]
        assert entry["row"]["messages"][0]["content"] == "You are an agent.\n\nThis is the SII Cli."
        for number, id in enumerate(("call_0", "call_1")):
            expected[1]["tool_calls"][number]["id"] = expected[2 + number]["tool_call_id"] = id
    if name == "alpaca":
        expected = [
            expected[0],
            {"role": "assistant", "content": "<read>a.txt</read>"},
            {"role": "user", "content": "42"},
            expected[-1],
        ]
    assert messages == expected
    if name == "cc_bench":
        assert entry["row"]["meta"]["domain"] == "data_analysis" and entry["row"]["meta"]["model"] == "GLM-4.5"


# Whatever a log holds: a row that keeps the contract, or reasons
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
)


def mutate(data, value):
    """value with one place replaced, removed or repeated."""
    if not isinstance(value, dict | list) or not value or data.draw(st.integers(0, 7)) == 0:
        return data.draw(JSON)
    value = copy.copy(value)
    key = data.draw(st.sampled_from(sorted(value) if isinstance(value, dict) else range(len(value))))
    choice = data.draw(st.integers(0, 9))
    if choice == 0:
        del value[key]
    elif choice == 1 and isinstance(value, list):
        value.insert(key, value[key])
    else:
        value[key] = mutate(data, value[key])
    return value


def has_null(value):
    """Is any value of an object null?"""
    if isinstance(value, dict):
        return any(item is None or has_null(item) for item in value.values())
    return isinstance(value, list) and any(map(has_null, value))


def assert_contract(row):
    waiting = []
    assert isinstance(row["query_id"], str)
    assert not has_null(row["messages"]) and not has_null(row["tools"])
    for before, message in zip([None, *row["messages"]], row["messages"]):
        assert isinstance(message["content"], str) and message["role"] in ("system", "user", "assistant", "tool")
        if message["role"] == "tool":
            assert message["tool_call_id"] == waiting.pop(0)
        else:
            assert not waiting and not (before and before["role"] == message["role"] == "assistant")
        for call in message.get("tool_calls", []):
            assert isinstance(call["function"]["name"], str) and isinstance(call["function"]["arguments"], dict)
            waiting.append(call["id"])
    assert all(isinstance(tool["function"]["parameters"], dict) for tool in row["tools"])


@settings(max_examples=200, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(data=st.data(), name=st.sampled_from(sorted(LOGS)))
def test_fuzzed_logs_become_rows_or_reasons(name, data):
    log = LOGS[name]
    for _ in range(data.draw(st.integers(1, 3))):
        log = mutate(data, log)
    entry = format_one(name, log, redact=data.draw(st.booleans()))
    assert bool(entry["reasons"]) != ("row" in entry) and all(isinstance(reason, str) for reason in entry["reasons"])
    if "row" in entry:
        assert_contract(entry["row"])
    json.dumps(entry, default=str)
    stage.detect(log)


@settings(max_examples=200, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(data=st.data(), name=st.sampled_from(sorted(LOGS)))
def test_fuzzed_files_are_read_or_refused(name, data, tmp_path_factory):
    log = LOGS[name]
    lines = log if isinstance(log, list) else [log]
    content = bytearray("\n".join(map(json.dumps, lines)).encode())
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(content)))
        content[place : place + data.draw(st.integers(0, 20))] = data.draw(st.binary(max_size=10))
    path = tmp_path_factory.getbasetemp() / "fuzz.jsonl"
    path.write_bytes(content)
    for source, name, record in stage.load_records({path: False}):
        assert name or isinstance(record, str)
        assert name is None or format_one(name, record)


# Checks that need more than one row, or a setting
SHAPES = {
    "aws_access_key": "AKIA" + "Q" * 16,
    "github_token": "ghp_" + "a1" * 18,
    "github_pat": "github_pat_" + "a1" * 20,
    "gitlab_token": "glpat-" + "a1" * 10,
    "anthropic_key": "sk-ant-api03-" + "a1" * 20,
    "openrouter_key": "sk-or-v1-" + "a1" * 20,
    "openai_key": "sk-proj-" + "a1" * 24,
    "huggingface_token": "hf_" + "aB" * 17,
    "google_key": "AIza" + "a1-_x" * 7,
    "slack_token": "xoxb-" + "1" * 12 + "-abc",
    "npm_token": "npm_" + "a1" * 18,
    "jwt": "eyJ" + "a" * 10 + ".eyJ" + "b" * 10 + "." + "c" * 20,
    "private_key": "-----BEGIN RSA PRIVATE KEY-----\nMIIE\n-----END RSA PRIVATE KEY-----",
    "password_in_url": "https://me:hunter2@host/x",
}


@pytest.mark.parametrize("shape", SHAPES)
def test_a_key_of_each_shape_is_found_and_redacted(shape):
    key = SHAPES[shape]
    for place in (edited(1, content=f"export TOKEN={key}\n"), edited(3, content=f'"Authorization: Bearer {key}"'),
                  edited(2, tool_calls=[call(path=f"x\n{key}")])):
        assert format_one("row", place)["reasons"] == [f"secret: {shape}"]
        redacted = format_one("row", place, redact=True)["row"]
        assert f"<{shape}>" in json.dumps(redacted) and json.dumps(key)[1:-1] not in json.dumps(redacted)


def test_ordinary_text_is_no_secret_and_private_names_go_everywhere():
    harmless = (
        "task-list-for-the-whole-project-in-2025 sk-learn hf_hub npm_config https://host:80/a@b 6f1ed002ab559585901"
    )
    assert format_one("row", edited(1, content=harmless))["reasons"] == []
    place = edited(
        2, content="ask ann.b@corp.example or git@github.com:a/b, react@18.2.0", tool_calls=[call("/home/ann/a.txt")]
    )
    place["messages"][3]["content"] = r"C:\Users\ann\a.txt /Users/ann/b"
    place["meta"] = {"source": "/home/ann/logs/1.json"}
    redacted = format_one("row", place, redact=True)["row"]
    assert redacted["messages"][2]["content"] == "ask user@example.com or git@github.com:a/b, react@18.2.0"
    assert redacted["messages"][2]["tool_calls"][0]["function"]["arguments"] == {"path": "/home/user/a.txt"}
    assert redacted["messages"][3]["content"] == r"C:\Users\user\a.txt /Users/user/b"
    assert "ann" not in json.dumps(redacted)


def test_benchmark_prompts_are_rejected_by_name(shared, tmp_path):
    task = "AgencyBench-v1/task8/Task8_Scientific_System_Function_Discovery.json"
    prompt = json.loads((shared / "agencybench" / task).read_text())["query"]
    words = re.findall(r"\w+", prompt)
    leaked, near = ", ".join(words[5:18]).upper(), " ".join(words[5:17])  # 13 words, 12 words
    rows, rejects = format_rows(tmp_path, edited(1, content=f"Hi. {leaked}!"), edited(1, content=f"Hi. {near} now"),
                                benchmark=[str(shared / "agencybench")])
    assert rejects == {1: [f"benchmark_overlap: {task}"]} and len(rows) == 1
    (tmp_path / "own.txt").write_text("Count the green bottles, please.")
    rows, rejects = format_rows(tmp_path, edited(1, content="count the green bottles please"),
                                benchmark=[str(tmp_path / "own.txt")])
    assert rejects == {1: ["benchmark_overlap: own.txt"]}


def test_near_duplicates_share_what_the_assistant_wrote(tmp_path):
    def essay(start, last):
        return edited(4, content="\n".join([f"line {n}" for n in range(start, start + 18)] + [last]))

    rows, rejects = format_rows(
        tmp_path, essay(0, "a"), essay(0, "b"), essay(9, "c")
    )  # 20 lines with the first turn's 2
    assert len(rows) == 2 and rejects == {2: [f"near_duplicate: of {tmp_path}/in.jsonl:1"]}
    assert len(format_rows(tmp_path, essay(0, "a"), essay(0, "b"), near_duplicate=2)[0]) == 2


def selected(folder, **settings):
    records = [edited(4, content=f"It says {n}.") | {"query_id": f"q{n}", "meta": {
        "domain": "research" if n % 3 == 0 else "vibe_coding", "difficulty": n % 2}} for n in range(30)]
    return {r["query_id"] for r in format_rows(folder, *records, good=False, **settings)[0]}


def test_selection_is_nested_stratified_and_seeded(tmp_path):
    six, twelve = selected(tmp_path, max_samples=6), selected(tmp_path, max_samples=12)
    assert six < twelve and six == selected(tmp_path, max_samples=6)
    assert [sum(int(id[1:]) % 3 == 0 for id in ids) for ids in (six, twelve)] == [2, 4]
    assert twelve != selected(tmp_path, max_samples=12, seed=1)
    assert selected(tmp_path, domain=["research"]) == {f"q{n}" for n in range(0, 30, 3)}
    assert selected(tmp_path, where=["difficulty=1", "domain=research"]) == {f"q{n}" for n in range(3, 30, 6)}


def test_tools_file_serves_logs_without_schemas(tmp_path):
    (tmp_path / "tools.json").write_text(json.dumps({"tools": [READ_FILE]}))
    rows, rejects = format_rows(tmp_path, row(tools=None), row(tools=[]), tools=str(tmp_path / "tools.json"))
    assert rows[0]["tools"] == [READ_FILE] and rejects == {2: ["undeclared_tool: read_file"]}


def test_rows_as_limi_released_them_are_corrected():
    """Tools in the system prompt, no call ids, one turn in two, a turn no model wrote, a helper's question."""
    user, look, first, second, final = script()
    tools = (
        "\n\nYou have access to the following tools:\n\n1. **read_file**: Read a file.\n   Parameters:\n   - path\n"
    )
    calls = [{"id": ""} | {key: call[key] for key in ("type", "function")} for call in look["tool_calls"]]
    messages = [
        {"role": "system", "content": "Be brief." + tools},
        {"role": "user", "content": "This is the SII Cli."},
        {"role": "assistant", "content": stage.CONTEXT_ANSWER},
        user,
        {"role": "assistant", "content": "I look."},
        {"role": "assistant", "content": "", "tool_calls": calls},
        first | {"tool_call_id": "read_file-1"},
        second | {"tool_call_id": "read_file-2"},
        final,
        {"role": "user", "content": stage.NEXT_SPEAKER + "..."},
    ]
    entry = format_one("row", {"messages": messages, "tools": [READ_FILE]})
    expected = script()
    del expected[1]["reasoning_content"]
    for number, id in enumerate(("call_0", "call_1")):
        expected[1]["tool_calls"][number]["id"] = expected[2 + number]["tool_call_id"] = id
    system = {"role": "system", "content": "Be brief.\n\nThis is the SII Cli."}
    assert entry["row"]["messages"] == [system, *expected]


def test_the_longest_request_of_an_sii_log_counts():
    log = {"events": [sii_request(SII_MESSAGES, FUNCTION), sii_request(SII_MESSAGES[2:3], FUNCTION)]}
    assert format_one("sii", log)["row"]["messages"][-1]["content"] == "It says 42."
    log = {"events": SII["events"][:3]}
    assert format_one("sii", log)["reasons"] == ["no_final_answer: ends with tool"]


def test_half_an_emoji_is_replaced():
    entry = format_one("row", edited(3, content="a\ud83d b \ud83d\ude00"))
    assert entry["row"]["messages"][3]["content"] == "a\ufffd b \U0001f600"
    assert format_one("row", edited(3, role="\ud83d"))["reasons"] == ["unknown_role: \ufffd"]


def test_a_killed_run_resumes(tmp_path, monkeypatch):
    records = [row(query_id=f"q{n}", messages=edited(4, content=f"It says {n}.")["messages"]) for n in range(6)]
    write(tmp_path / "in.jsonl", *records)
    whole = format_rows(tmp_path, *records, good=False)[0]
    formatted, real = [], stage.format_record

    def killed(source, *rest):
        if len(formatted) == 3:
            raise KeyboardInterrupt
        formatted.append(source)
        return real(source, *rest)

    monkeypatch.setattr(stage, "format_record", killed)
    (tmp_path / "data/train.jsonl").unlink()
    with pytest.raises(KeyboardInterrupt):
        run_here(tmp_path, tmp_path / "in.jsonl")
    assert not (tmp_path / "data/train.jsonl").exists()
    journal = tmp_path / "data/train.jsonl.journal"
    journal.write_bytes(journal.read_bytes()[:-20])  # the kill came in the middle of the third record
    again = []
    monkeypatch.setattr(stage, "format_record", lambda source, *rest: again.append(source) or real(source, *rest))
    run_here(tmp_path, tmp_path / "in.jsonl")
    assert again == [f"{tmp_path}/in.jsonl:{n}" for n in (3, 4, 5, 6)]
    assert read(tmp_path / "data/train.jsonl") == whole and not journal.exists()


def test_other_settings_do_not_resume(tmp_path, monkeypatch):
    write(tmp_path / "in.jsonl", row(), row(meta={"solved": False}, query_id="failed"))
    monkeypatch.setattr(stage, "compare_rows", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run_here(tmp_path, tmp_path / "in.jsonl")
    monkeypatch.undo()
    run_here(tmp_path, tmp_path / "in.jsonl", keep_failed=True, near_duplicate=2.0)
    assert [r["reasons"] for r in read(tmp_path / "data/rejected_trajectories.jsonl")] == [
        [f"duplicate: of {tmp_path}/in.jsonl:1"]]


# Where logs come from
def test_folders_mix_formats_and_hold_event_files_and_compressed_logs(tmp_path):
    import pyarrow

    folder = tmp_path / "logs"
    for name, log in LOGS.items():
        if name not in ("openhands_events", "mini_swe_agent"):
            write(folder / f"{name}.jsonl", *(log if isinstance(log, list) else [log]))
    (folder / "row.json").write_text(json.dumps([LOGS["row"] | {"query_id": "indented"}], indent=2))
    for number, event in enumerate(OPENHANDS_EVENTS):
        write(folder / f"conversation/events/event-{number:05}-x.json", event)
    with pyarrow.CompressedOutputStream(str(folder / "rollout.jsonl.zst"), "zstd") as file:
        file.write((folder / "codex.jsonl").read_bytes().replace(b'"id": "s"', b'"id": "zst"'))
    (folder / "codex.jsonl").unlink()
    (folder / "notes.md").write_text("no log")
    write(tmp_path / "tools.json", {"tools": [READ_FILE]})
    sources = {entry[0]: entry[1] for entry in stage.load_records(stage.find_units([str(folder)], set()))}
    assert sources == {f"{folder}/{name}.jsonl" + ("" if stage.READERS[name][2] else ":1"): name for name in LOGS
                       if name not in ("openhands_events", "mini_swe_agent", "codex")} | {
        f"{folder}/row.json:1": "row", f"{folder}/conversation/events": "openhands_events",
        f"{folder}/rollout.jsonl.zst": "codex", f"{folder}/notes.md": None}
    rows = run_here(tmp_path, folder, tools=str(tmp_path / "tools.json"))
    assert "zst" not in {r["query_id"] for r in rows}  # the same session as another log's: a duplicate


def test_hub_datasets_come_back_from_arrow_without_nulls(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    other = edited(2, tool_calls=[call(name="ls") | {"function": {"name": "ls", "arguments": {"directory": "/"}}}])
    folder = tmp_path / "dataset"
    folder.mkdir()
    datasets.Dataset.from_list([row(), other]).to_parquet(folder / "train.parquet")
    records = [record for _, record in stage.read_hub(str(folder))]
    assert records[0]["messages"][2]["tool_calls"][0]["function"]["arguments"] == {"path": "a.txt", "directory": None}
    assert format_one("row", records[0])["row"]["messages"] == row()["messages"]
    (folder / "train.parquet").unlink()
    (folder / "limi.json").write_text(json.dumps([row(), other]))
    source, record = next(stage.read_hub(str(folder)))
    assert source == f"{folder}/train:1" and format_one("row", record)["row"]["messages"] == row()["messages"]


# With a tokenizer
@pytest.fixture(scope="module", params=["glm4moe", "qwen3"])
def tokenizer(request, tmp_path_factory):
    """A byte tokenizer with the special tokens and the chat template of the model."""
    import tokenizers
    import transformers
    import trl

    special = {"glm4moe": ["[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"],
               "qwen3": ["<|im_start|>", "<|im_end|>"]}[request.param]
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    model = tokenizers.Tokenizer(tokenizers.models.BPE({letter: n for n, letter in enumerate(alphabet)}, []))
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=model, additional_special_tokens=special)
    fast.chat_template = (Path(trl.__file__).parent / f"chat_templates/{request.param}.jinja").read_text()
    fast.save_pretrained(folder := tmp_path_factory.mktemp(request.param))
    return request.param, folder


TWO_USERS = row()["messages"] + [{"role": "user", "content": "And b.txt?"},
                                 {"role": "assistant", "content": "I know.", "reasoning_content": "Guess."}]
TRAINED = {
    "glm4moe": {
        2: (
            "\n<think>Read it.</think>\nI look.\n<tool_call>read_file\n<arg_key>path</arg_key>\n"
            "<arg_value>a.txt</arg_value>\n</tool_call>",
            "<|observation|>",
        ),
        4: ("\n<think></think>\nIt says 42.", "<|user|>"),
        6: ("\n<think>Guess.</think>\nI know.", "<|user|>"),
    },
    "qwen3": {
        2: (
            '<think>\nRead it.\n</think>\n\nI look.\n<tool_call>\n{"name": "read_file", "arguments": '
            '{"path": "a.txt"}}\n</tool_call>',
            "<|im_end|>",
        ),
        4: ("<think>\n\n</think>\n\nIt says 42.", "<|im_end|>"),
        6: ("<think>\nGuess.\n</think>\n\nI know.", "<|im_end|>"),
    },
}


def test_report_shows_what_the_engine_must_generate(tokenizer, tmp_path):
    name, folder = tokenizer
    rows, rejects = format_rows(
        tmp_path, row(messages=TWO_USERS), tokenizer=str(folder), report=str(tmp_path / "r.html")
    )
    assert stage.trained_text(stage.load_tokenizer(folder), rows[0]["messages"], rows[0]["tools"]) == TRAINED[name]
    page = (tmp_path / "r.html").read_text()
    for text, stop in TRAINED[name].values():
        assert f'<span class="trained">{html.escape(text)}</span><span class="stop">{html.escape(stop)}</span>' in page
    assert page.count("<svg") == 1 and set(re.findall(r"https?://[\w.]+", page)) <= {"http://www.w3.org"}
    text = stage.load_tokenizer(folder).apply_chat_template(TWO_USERS, tools=[READ_FILE], tokenize=False)
    for special in stage.load_tokenizer(folder).all_special_tokens:
        text = text.replace(special, "x")
    assert rows[0]["meta"]["n_tokens"] == len(text.encode())
    tokens = rows[0]["meta"]["n_tokens"]
    with pytest.raises(stage.InputError, match="over_long"):
        format_rows(tmp_path, row(messages=TWO_USERS), good=False, tokenizer=str(folder), max_length=tokens - 1)
    assert (
        len(format_rows(tmp_path, row(messages=TWO_USERS), good=False, tokenizer=str(folder), max_length=tokens)[0])
        == 1
    )


def test_a_full_disk_leaves_nothing_half_written(tmp_path):
    import resource

    write(
        tmp_path / "in.jsonl",
        *(row(query_id=f"q{n}", messages=edited(4, content=f"{n} " * 500)["messages"]) for n in range(9)),
    )
    result = subprocess.run([sys.executable, str(SCRIPT), "in.jsonl"], cwd=tmp_path, capture_output=True, text=True,
                            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (9_000, 9_000)))
    assert_one_line_error(result, "File too large")
    assert {path.name for path in (tmp_path / "data").iterdir()} <= {"train.jsonl.journal"}
    assert run("in.jsonl", cwd=tmp_path).returncode == 0 and len(read(tmp_path / "data/train.jsonl")) == 9


# Mistakes of the user
@pytest.mark.parametrize(("content", "parts"), [
    (json.dumps(row()) + '\n{"messages": [', ["in.jsonl:2", "not valid JSON"]),
    ("[" * 100_000, ["in.jsonl", "not valid JSON"]),
    (b"\xff\xfe{", ["in.jsonl", "not valid JSON"]),
    ('"text"', ["in.jsonl", "not a log"]),
    ("", ["in.jsonl", "not valid JSON"]),
], ids=["cut", "deep", "not utf-8", "string", "empty"])
def test_bad_files(tmp_path, content, parts):
    path = tmp_path / "in.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert_one_line_error(run(path, cwd=tmp_path), *parts)
    assert not (tmp_path / "data/train.jsonl").exists()


def test_bad_arguments(tmp_path):
    good = write(tmp_path / "in.jsonl", row())
    write(tmp_path / "bad.json", {"tools": 7})
    for absent in ("absent.jsonl", "absent/train.jsonl", f"{tmp_path.parent.name}/absent"):
        assert_one_line_error(run(absent, cwd=tmp_path.parent.parent), absent, "no such file")
    assert_one_line_error(run(cwd=tmp_path), "no inputs")
    assert_one_line_error(run(good, "--tols", "x", cwd=tmp_path), "--tols")
    assert_one_line_error(run(good, "--tools", "absent.json", cwd=tmp_path), "absent.json")
    assert_one_line_error(run(good, "--tools", "bad.json", cwd=tmp_path), "bad.json", "tool schemas")
    with pytest.raises(stage.InputError, match="--tokenizer .*absent"):
        stage.load_tokenizer(str(tmp_path / "absent"))
    write(tmp_path / "failed.jsonl", row(meta={"solved": False}))
    assert_one_line_error(run("failed.jsonl", cwd=tmp_path), "no trajectory left of 1", "not_solved")
    (tmp_path / "c.yaml").write_text("inputs: in.jsonl\noutput_file: rows.jsonl\n")
    assert run("--config", "c.yaml", cwd=tmp_path).returncode == 0 and len(read(tmp_path / "rows.jsonl")) == 1
