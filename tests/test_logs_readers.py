"""recipes/logs: one small log a rule, written by hand in the shape that each tool documents."""

import ast
import json
import runpy
import sys

import pytest
from conftest import ROOT

READERS = {path.stem: runpy.run_path(str(path)) for path in sorted(ROOT.glob("recipes/logs/*.py"))}


def read(name, record):
    """The loose row of the only reader that takes the record for its own; of several in it, the first."""
    fitting = []
    for other, reader in READERS.items():
        try:
            fitting += [other] if reader["fits"](record) else []
        except (AttributeError, IndexError, KeyError, TypeError, ValueError):
            pass  # 02 takes that for a no, too
    assert fitting == [name]
    split = READERS[name].get("split", lambda record: [record])
    return READERS[name]["read"](split(record)[0])


def rejected(name, record):
    with pytest.raises(ValueError) as error:
        read(name, record)
    return str(error.value)


def said(name, record):
    """The messages in one form: (role, text), ("assistant", text, thoughts, calls), ("tool", id, text)."""
    told = []
    for message in read(name, record)["messages"]:
        told += plain(message)
    return told


ROLES = {"model": "assistant", "human": "user", "ai": "assistant", "toolResult": "tool"}


def plain(message):
    """One loose message: OpenAI's, an item of the Responses API, Anthropic's blocks or Gemini's parts."""
    name = message.get("role") or message["type"]
    role = ROLES.get(name, name)
    if role == "function_call_output":
        return [("tool", message["call_id"], message["output"])]
    if role in ("reasoning", "function_call"):
        return [plain_item(message)]
    told = plain_parts(message)
    text_of = "\n".join(told["text"])
    if role == "assistant":
        answer = (role, text_of, "\n".join(filter(None, told["thought"])), told["call"])
        return [*told["result"], answer]
    if told["result"]:
        return told["result"] + ([(role, text_of)] if text_of else [])
    return [("tool", id_of(message), text_of)] if role == "tool" else [(role, text_of)]


def plain_parts(message):
    blocks = message.get("parts", message.get("content"))
    told = {"text": [], "thought": [message.get("reasoning_content")], "call": [], "result": []}
    for block in blocks if isinstance(blocks, list) else [blocks or ""]:
        kind, value = plain_block({"text": block} if isinstance(block, str) else block)
        told[kind].append(value)
    told["thought"] += [block["thinking"] for block in message.get("thinking_blocks") or []]
    told["call"] += map(plain_call, message.get("tool_calls") or [])
    return told


def id_of(message):
    several = message.get("tool_call_ids") or [None]
    return message.get("tool_call_id") or message.get("toolCallId") or several[0]


def plain_item(item):
    thoughts = "".join(part["text"] for part in item.get("summary", []))
    return ("assistant", "", thoughts, [plain_call(item)] if "arguments" in item else [])


def plain_block(block):
    kind = block.get("type")
    if "functionCall" in block:
        return "call", (block["functionCall"]["name"], block["functionCall"]["args"])
    if "functionResponse" in block:
        given = block["functionResponse"]
        return "result", ("tool", given.get("id"), given["response"]["output"])
    if kind in ("tool_use", "toolCall"):
        return "call", (block["name"], block.get("input", block.get("arguments")))
    if kind == "tool_result":
        parts = block["content"] if isinstance(block["content"], list) else [{"text": block["content"]}]
        texts = [part.get("text", part.get("tool_name")) for part in parts]
        return "result", ("tool", block["tool_use_id"], "".join(texts))
    if block.get("thought") or kind in ("thinking", "reasoning"):
        return "thought", block.get("thinking", block.get("reasoning", block.get("text")))
    return "text", block["text"]


def plain_call(call):
    function = call.get("function", call)
    name = function if isinstance(function, str) else function["name"]
    holder = call if isinstance(function, str) else function
    arguments = holder.get("arguments", holder.get("args"))
    return name, json.loads(arguments) if isinstance(arguments, str) else arguments


@pytest.mark.parametrize("name", READERS)
def test_a_reader_stands_alone_and_gives_a_reason_for_what_it_leaves_out(name):
    tree = ast.parse((ROOT / f"recipes/logs/{name}.py").read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = (
                [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module]
            )
            assert {module.partition(".")[0] for module in modules} <= sys.stdlib_module_names
    reader = READERS[name]
    assert reader["KINDS"] and all(isinstance(place, str) and place for place in reader["KINDS"].values())
    places = {place.partition(":")[0].partition(",")[0] for place in reader["KINDS"].values()}
    assert places <= {"message", "call", "result", "reasoning", "left out"}
    assert all(len(reason) > 5 for reason in reader.get("LEFT_OUT", {}).values())


# Claude Code


def line(kind, id, parent, content=None, **more):
    message = {"role": kind, "content": content}
    if kind == "assistant":
        message |= {"id": more.pop("answer", f"msg_{id}"), "model": "claude-x"}
    row = {"type": kind, "uuid": id, "parentUuid": parent, "sessionId": "S1", "version": "2.1.0"}
    return row | ({"message": message} if content is not None else {}) | more


def call(id, name="Bash", **arguments):
    return {"type": "tool_use", "id": id, "name": name, "input": arguments}


def result(id, content):
    return {"type": "tool_result", "tool_use_id": id, "content": content}


def text(content):
    return {"type": "text", "text": content}


def test_claude_joins_the_lines_of_one_answer_and_its_parallel_results():
    log = [
        line("user", "1", None, "Fix the parser"),
        line(
            "assistant",
            "2",
            "1",
            [{"type": "thinking", "thinking": "I look.", "signature": "x"}],
            answer="m",
        ),
        line("assistant", "3", "2", [text("Looking")], answer="m"),
        line("assistant", "4", "3", [call("t1", command="ls")], answer="m"),
        line("assistant", "5", "4", [call("t2", command="pwd")], answer="m"),
        line("user", "6", "4", [result("t1", "a.py")]),  # beside the branch of the last line
        line(
            "user", "7", "5", [result("t2", [text("/w"), {"type": "tool_reference", "tool_name": "Read"}])]
        ),
        line(
            "assistant", "8", "7", [{"type": "thinking", "thinking": "", "signature": "y"}, text("Fixed")]
        ),
    ]
    assert said("claude_code", log) == [
        ("user", "Fix the parser"),
        ("assistant", "Looking", "I look.", [("Bash", {"command": "ls"}), ("Bash", {"command": "pwd"})]),
        ("tool", "t1", "a.py"),
        ("tool", "t2", "/wRead"),
        ("assistant", "Fixed", "", []),
    ]
    row = read("claude_code", log)
    assert row["tools"] is None and row["checked"] == log
    assert row["meta"] == {"query_id": "S1", "version": "2.1.0", "model": "claude-x", "stop_reason": None}


def test_claude_bridges_a_parent_that_was_never_written_and_lines_that_are_no_turns():
    log = [
        line("user", "1", None, "first"),
        line("assistant", "2", "1", [text("one")]),
        line("user", "3", "LOST", "second"),
        line("progress", "p1", "2", data={"type": "hook_progress"}),
        line("assistant", "4", "3", [text("two")]),
        line("progress", "p2", "p1", data={}),
        line("user", "5", "4", "third"),
        line("progress", "p3", "p2", data={}),
        line("assistant", "6", "p3", [text("three")]),  # hangs on a line of the screen
        line("system", "s1", "6", subtype="turn_duration"),
        line("progress", "p4", "2", data={}),  # written late, after the last turn
    ]
    assert [turn[1] for turn in said("claude_code", log)] == [
        "first",
        "one",
        "second",
        "two",
        "third",
        "three",
    ]


def test_claude_a_stale_parent_cuts_nothing_and_a_rewind_to_a_line_of_the_screen_does():
    log = [
        line("user", "1", None, "task"),
        line("assistant", "2", "1", [call("t1", "Task", prompt="p")]),
        line("progress", "p1", "2", data={"type": "agent_progress"}),
        line("user", "3", "2", [result("t1", "sub result")]),
        line("assistant", "4", "3", [text("integrated")]),
        line("system", "s1", "4", subtype="turn_duration"),
        line("user", "5", "p1", "again"),  # hangs on a line of the other agent's progress
        line("assistant", "6", "5", [text("done")]),
    ]
    texts = [turn[1] for turn in said("claude_code", log)]
    assert texts == ["task", "", "t1", "integrated", "again", "done"]
    rewound = [*log, line("user", "7", "s1", "instead"), line("assistant", "8", "7", [text("other")])]
    texts = [turn[1] for turn in said("claude_code", rewound)]
    assert texts == ["task", "", "t1", "integrated", "instead", "other"]


def test_claude_leaves_out_rewound_branches_other_agents_and_what_follows_a_compaction():
    log = [
        line("user", "1", None, "task"),
        line("assistant", "2", "1", [text("done")]),
        line("user", "3", "2", "a wrong turn"),
        line("assistant", "4", "3", [text("wrong")]),
        line("user", "a1", None, "prompt of another agent", isSidechain=True),
        line("user", "5", "2", "the right turn"),
        line("assistant", "6", "a1", [text("right")]),  # hangs on the other agent's line
        line("system", "7", None, subtype="compact_boundary", content="Compacted"),
        line("user", "8", "7", "a summary", isCompactSummary=True),
        line("assistant", "9", "8", [text("later")]),
    ]
    row = read("claude_code", log)
    assert [turn[1] for turn in said("claude_code", log)] == ["task", "done", "the right turn", "right"]
    assert [entry["uuid"] for entry in row["checked"]] == ["1", "2", "5", "6"]
    for entry in log:
        entry.get("message", {}).pop("id", None)  # the oldest versions had none
    assert [turn[1] for turn in said("claude_code", log)] == ["task", "done", "the right turn", "right"]
    for entry in log:
        entry.get("message", {})["id"] = ""  # as some gateways write it
    assert [turn[1] for turn in said("claude_code", log)] == ["task", "done", "the right turn", "right"]
    own_file = [line("user", "1", None, "sub task", isSidechain=True, agentId="ab12")]
    own_file.append(line("assistant", "2", "1", [text("sub done")], isSidechain=True, agentId="ab12"))
    assert [turn[1] for turn in said("claude_code", own_file)] == ["sub task", "sub done"]
    assert read("claude_code", own_file)["meta"]["query_id"] == "ab12"


def test_claude_a_first_prompt_written_anew_starts_the_session():
    log = [
        line("user", "1", None, "frist"),
        line("assistant", "2", "1", [text("what?")]),
        line("user", "3", None, "first"),
        line("assistant", "4", "3", [text("done")]),
    ]
    assert [turn[1] for turn in said("claude_code", log)] == ["first", "done"]
    unlinked = [entry | {"parentUuid": None} for entry in log]  # the oldest versions link nothing
    assert [turn[1] for turn in said("claude_code", unlinked)] == ["frist", "what?", "first", "done"]


def test_claude_what_the_user_types_and_brings_along_is_user_text_at_its_place():
    attached = {
        "type": "file",
        "filename": "/w/a.py",
        "content": {"type": "text", "file": {"content": "print(1)"}},
    }
    queued = {"type": "queued_command", "prompt": "no, B", "commandMode": "prompt"}
    hook = {"type": "hook_additional_context", "hookEvent": "Stop", "content": ["use tabs"]}
    silent = {"type": "hook_success", "content": "", "stdout": "for the screen"}
    log = [
        line("user", "1", None, "Explain @a.py"),
        line("attachment", "2", "1", attachment=attached),
        line("assistant", "3", "2", [call("t1", command="sleep 9")]),
        {"type": "queue-operation", "operation": "enqueue", "content": "no, B", "sessionId": "S1"},
        {"type": "queue-operation", "operation": "remove", "content": "no, B", "sessionId": "S1"},
        line("user", "4", "3", [result("t1", "ok")]),
        line("attachment", "5", "4", attachment=queued),
        line("attachment", "6", "5", attachment=hook),
        line("attachment", "7", "6", attachment=silent),
        line("user", "8", "7", [text("Base directory for this skill: /s\nSTEP 1")], isMeta=True),
        line("assistant", "9", "8", [text("B then")]),
    ]
    formatted = {"type": "hook_success", "hookEvent": "PostToolUse", "content": "formatted"}  # is not told
    log[8:8] = [line("attachment", "x", "6", attachment=formatted)]
    assert [turn for turn in said("claude_code", log) if turn[0] == "user"] == [
        ("user", "Explain @a.py"),
        ("user", "/w/a.py\nprint(1)"),
        ("user", "no, B"),
        ("user", "use tabs"),
        ("user", "Base directory for this skill: /s\nSTEP 1"),
    ]


def test_claude_what_a_hook_tells_the_model_is_user_text():
    started = {"type": "hook_success", "hookEvent": "SessionStart", "content": "use tabs", "stdout": "use tabs\n"}
    stopped = {"type": "hook_stopped_continuation", "message": "that file is secret"}
    late = {"systemMessage": "lint is red", "hookSpecificOutput": {"additionalContext": "3 errors"}}
    log = [line("user", "1", None, "Do A"), line("assistant", "2", "1", [text("done")])]
    for number, hook in enumerate([started, stopped, {"type": "async_hook_response", "response": late}]):
        log[-1:-1] = [line("attachment", f"h{number}", "1", attachment=hook)]
    assert [turn[1] for turn in said("claude_code", log)] == [
        "Do A", "use tabs", "that file is secret", "lint is red\n3 errors", "done"]  # fmt: skip


def test_two_sessions_in_one_file_are_named_and_not_cut_to_one():
    first = [line("user", "1", None, "one"), line("assistant", "2", "1", [text("1")])]
    other = [line("user", "3", None, "two"), line("assistant", "4", "3", [text("2")])]
    for message in other:
        message["sessionId"] = "S2"
    meta, again = meta_line(**BASE), meta_line(**BASE | {"id": "S2"})
    items = [spoken("user", "one"), spoken("assistant", "1")]
    header, entries = {"sessionId": "G", "projectHash": "h"}, [{"id": "1", "type": "user", "content": "one"}]
    lines = [qwen("user", "1", None, {"text": "one"}), qwen("user", "2", None, {"text": "two"}, sessionId="Q2")]
    session = {"type": "session", "id": "P"}
    asked = pi("message", "1", None, message={"role": "user", "content": "one"})
    logs = {
        "claude_code": first + other,
        "codex": [meta, *items, again, *items],
        "gemini_cli": [header, *entries, header | {"sessionId": "G2"}, *entries],
        "qwen_code": lines,
        "pi": [session, asked, session | {"id": "P2"}, asked],
    }
    for name, log in logs.items():
        assert rejected(name, log) == "several_sessions: give each a file of its own", name
    other[0]["parentUuid"] = "2"  # a session that was taken up again
    assert [turn[1] for turn in said("claude_code", first + other)] == ["one", "1", "two", "2"]
    assert len(said("codex", [meta, *items, meta, *items])) == 5  # its own line once more


def test_claude_a_prompt_of_the_queue_counts_once_and_not_if_it_was_taken_back():
    def queue(operation, content=None):
        return {"type": "queue-operation", "operation": operation, "content": content, "sessionId": "S1"}

    log = [
        line("user", "1", None, "task"),
        line("assistant", "2", "1", [call("t1", command="x")]),
        queue("enqueue", "only in the queue"),
        queue("remove"),
        line("user", "3", "2", [result("t1", "ok")]),
        queue("enqueue", "taken back"),
        queue("popAll"),
        queue("enqueue", "sent as a line"),
        queue("dequeue"),
        line("assistant", "4", "3", [text("done")]),
        line("user", "5", "4", "sent as a line"),
        line("assistant", "6", "5", [text("that too")]),
    ]
    texts = [turn[1] for turn in said("claude_code", log) if turn[0] == "user"]
    assert texts == ["task", "only in the queue", "sent as a line"]
    log[2] = queue("enqueue", "task")  # the first prompt is not this one sent
    texts = [turn[1] for turn in said("claude_code", log) if turn[0] == "user"]
    assert texts == ["task", "task", "sent as a line"]


def test_claude_echoes_of_local_commands_go_and_commands_with_a_prompt_stay():
    log = [
        {"type": "summary", "summary": "a title", "leafUuid": "9"},
        line("user", "1", None, "<command-name>/model</command-name>"),
        line("user", "2", "1", "<local-command-stdout>Set model</local-command-stdout>"),
        line(
            "user", "3", "2", "<command-message>review</command-message><command-args>a.py</command-args>"
        ),
        line("assistant", "4", "3", [text("reviewed")]),
        line("assistant", "5", "4", [text("API Error")])
        | {"message": {"model": "<synthetic>", "content": "API"}},
        line("user", "6", "5", "go on"),
        line("assistant", "7", "6", [text("done")]),
        line("assistant", "8", "7", [text("API Error: 529 overloaded")], isApiErrorMessage=True),
    ]
    log[4]["message"]["id"] = "m1"
    assert [turn[1] for turn in said("claude_code", log)] == [
        "<command-message>review</command-message><command-args>a.py</command-args>",
        "reviewed",
        "go on",
        "done",
    ]
    echo = "<local-command-stdout>Set model</local-command-stdout>"
    log[6] = line("user", "6", "5", [text(echo), text("go on")])
    assert said("claude_code", log)[2] == ("user", f"{echo}\ngo on")
    log[6] = line("user", "6", "5", [text("Caveat: The messages below were generated by the user while running local"), text(echo)])
    assert [turn[1] for turn in said("claude_code", log)][1:] == ["reviewed", "done"]


def test_claude_new_versions_log_the_system_prompt_and_the_schemas():
    schema = {"name": "Bash", "description": "d", "input_schema": {"type": "object", "properties": {}}}
    snapshot = {"type": "prompt_snapshot", "systemPrompt": ["You are C.", "Be brief."], "tools": [schema]}
    log = [
        line("attachment", "1", None, attachment=snapshot),
        line("user", "2", "1", "hi"),
        line("attachment", "3", "2", attachment=snapshot),
        line("assistant", "4", "3", [text("hello")]),
    ]
    assert said("claude_code", log) == [
        ("system", "You are C.\nBe brief."), ("user", "hi"), ("assistant", "hello", "", [])
    ]  # fmt: skip
    assert read("claude_code", log)["tools"] == [schema]


def test_claude_a_stream_may_lack_the_prompt_and_says_so():
    log = [
        {"type": "system", "subtype": "init", "session_id": "S2", "tools": ["Bash"], "uuid": "i"},
        {
            "type": "assistant",
            "session_id": "S2",
            "uuid": "a",
            "parent_tool_use_id": None,
            "message": {"id": "m", "role": "assistant", "model": "c", "content": [call("t", command="ls")]},
        },
        {
            "type": "user",
            "session_id": "S2",
            "uuid": "b",
            "parent_tool_use_id": None,
            "message": {"role": "user", "content": [result("t", "a.py")]},
        },
        {
            "type": "assistant",
            "session_id": "S2",
            "uuid": "x",
            "parent_tool_use_id": "t",
            "message": {"id": "sub", "role": "assistant", "content": [text("another agent")]},
        },
        {
            "type": "assistant",
            "session_id": "S2",
            "uuid": "c",
            "parent_tool_use_id": None,
            "message": {"id": "n", "role": "assistant", "model": "c", "content": [text("done")],
                        "stop_reason": "max_tokens"},
        },
        {
            "type": "result",
            "subtype": "error_max_turns",
            "is_error": False,
            "session_id": "S2",
            "uuid": "r",
        },
    ]
    assert said("claude_code", log) == [
        ("assistant", "", "", [("Bash", {"command": "ls"})]),
        ("tool", "t", "a.py"),
        ("assistant", "done", "", []),
    ]
    row = read("claude_code", log)
    assert row["tools"] is None
    assert row["lacks_prompt"] is True
    assert row["meta"] == {"query_id": "S2", "model": "c", "success": False, "stop_reason": "max_tokens"}
    prompt = {"type": "user", "session_id": "S2", "uuid": "p", "message": {"role": "user", "content": "List."}}
    assert read("claude_code", [log[0], prompt, *log[1:]])["lacks_prompt"] is False


def test_claude_a_session_in_one_column_is_read_with_its_other_columns():
    log = [line("user", "1", None, "hi"), line("assistant", "2", "1", [text("hello")])]
    row = {"trajectory": json.dumps(log), "task_category": "frontend", "task_id": 7}
    assert [turn[1] for turn in said("claude_code", row)] == ["hi", "hello"]
    meta = read("claude_code", row)["meta"]
    assert (meta["task_category"], meta["task_id"]) == ("frontend", 7)


def test_claude_a_line_twice_is_one_and_another_line_of_its_uuid_rejects():
    log = [line("user", "1", None, "hi"), line("user", "1", None, "hi"), line("assistant", "2", "1", [text("hello")])]
    assert said("claude_code", log) == [("user", "hi"), ("assistant", "hello", "", [])]
    log[1] = line("user", "1", None, "ho")
    assert rejected("claude_code", log) == "two_lines_of_one_uuid: 1"
    file = {"type": "file", "filename": "a.py", "content": "x = 1"}
    log[1] = line("attachment", "3", "1", attachment=file)
    log[2:2] = [line("attachment", "3", "1", attachment=file | {"content": "x = 2"})]
    assert rejected("claude_code", log) == "two_lines_of_one_uuid: 3"


def test_claude_unknown_kinds_and_images_reject_by_name():
    start = [line("user", "1", None, "hi"), line("assistant", "2", "1", [text("hello")])]
    assert (
        rejected("claude_code", [*start, {"type": "brand-new", "sessionId": "S"}])
        == "unknown_kind: brand-new"
    )
    other = line("attachment", "3", "2", attachment={"type": "brand_new", "text": "x"})
    assert rejected("claude_code", [*start, other]) == "unknown_kind: brand_new"
    image = {"type": "file", "filename": "a.png", "content": {"type": "image", "file": {"base64": "A"}}}
    assert rejected("claude_code", [*start, line("attachment", "3", "2", attachment=image)]) == (
        "non_text_content: image"
    )


# Codex


def item(kind, /, **payload):
    return {"timestamp": "t", "type": "response_item", "payload": {"type": kind} | payload}


def event(kind, **payload):
    return {"timestamp": "t", "type": "event_msg", "payload": {"type": kind} | payload}


def spoken(role, content):
    return item("message", role=role, content=[{"type": "input_text", "text": content}])


def meta_line(id="S", **payload):
    return {
        "timestamp": "t",
        "type": "session_meta",
        "payload": {"id": id, "cli_version": "0.130.0"} | payload,
    }


BASE = {"base_instructions": {"text": "BASE"}}


def test_codex_items_become_messages_in_their_order():
    log = [
        meta_line(**BASE),
        {"timestamp": "t", "type": "turn_context", "payload": {"model": "gpt-x"}},
        spoken("developer", "rules"),
        spoken("user", "Do A"),
        event("user_message", message="Do A"),
        item(
            "reasoning",
            summary=[{"type": "summary_text", "text": "S1"}],
            content=None,
            encrypted_content="e",
        ),
        item("function_call", name="exec_command", arguments='{"cmd": "ls"}', call_id="c1"),
        item("local_shell_call", call_id="c2", action={"type": "exec", "command": ["bash", "-lc", "pwd"]}),
        item("custom_tool_call", name="apply_patch", input="*** Begin Patch", call_id="c3"),
        item("tool_search_call", call_id="c4", arguments={"query": "q"}),
        item("function_call_output", call_id="c1", output="a.py"),
        item("function_call_output", call_id="c2", output="/w"),
        item("custom_tool_call_output", call_id="c3", output="Done"),
        item("tool_search_output", call_id="c4", tools=[]),
        item("ghost_snapshot", ghost_commit={"id": "x"}),
        spoken("developer", "now plan"),
        item(
            "reasoning", summary=[{"text": "short"}], content=[{"type": "reasoning_text", "text": "long"}]
        ),
        item("reasoning", summary=[], encrypted_content="e"),
        spoken("assistant", "A done"),
        event("task_complete"),
    ]
    shell = {"type": "exec", "command": ["bash", "-lc", "pwd"]}
    assert said("codex", log) == [
        ("system", "BASE"),
        ("developer", "rules"),
        ("user", "Do A"),
        ("assistant", "", "S1", []),
        ("assistant", "", "", [("exec_command", {"cmd": "ls"})]),
        ("assistant", "", "", [("local_shell", shell)]),
        ("assistant", "", "", [("apply_patch", {"input": "*** Begin Patch"})]),
        ("assistant", "", "", [("tool_search", {"query": "q"})]),
        ("tool", "c1", "a.py"),
        ("tool", "c2", "/w"),
        ("tool", "c3", "Done"),
        ("tool", "c4", "[]"),
        ("developer", "now plan"),
        ("assistant", "", "long", []),
        ("assistant", "A done", "", []),
    ]
    row = read("codex", log)
    assert row["tools"] is None and [{"text": "short"}] in row["left_out"]
    assert row["meta"] == {
        "query_id": "S",
        "version": "0.130.0",
        "cwd": None,
        "model": "gpt-x",
        "exit_status": "completed",
    }


def test_codex_a_fork_keeps_its_own_id_and_one_system_prompt():
    log = [
        meta_line("FORK", **BASE),
        meta_line("PARENT", **BASE),
        spoken("user", "A"),
        spoken("assistant", "B"),
    ]
    assert said("codex", log)[:2] == [("system", "BASE"), ("user", "A")]
    assert read("codex", log)["meta"]["query_id"] == "FORK"


def test_codex_undone_turns_are_not_in_the_row():
    log = [
        meta_line(**BASE),
        spoken("user", "<environment_context>here</environment_context>"),
        spoken("user", "one"),
        spoken("assistant", "1"),
        spoken("user", "two"),
        spoken("assistant", "2"),
        spoken("user", "<environment_context>there</environment_context>"),
        spoken("user", "three"),
        spoken("assistant", "3"),
        event("thread_rolled_back", num_turns=2),
        spoken("user", "four"),
        spoken("assistant", "4"),
    ]
    texts = [turn[1] for turn in said("codex", log)]
    assert texts == ["BASE", "<environment_context>here</environment_context>", "one", "1", "four", "4"]
    assert log[4] not in read("codex", log)["checked"]
    assert said("codex", [*log, event("thread_rolled_back", num_turns=0)]) == said("codex", log)
    log[4] = spoken("user", "write a file # AGENTS.md")  # a prompt that names what the tool itself says
    assert [turn[1] for turn in said("codex", log)] == texts
    assert [turn[1] for turn in said("codex", [*log, event("thread_rolled_back", num_turns=9)])] == [
        *texts[:2]
    ]


def test_codex_a_compacted_line_ends_the_row_and_an_aborted_turn_is_told():
    log = [meta_line(**BASE), spoken("user", "A"), spoken("assistant", "B")]
    compacted = {"timestamp": "t", "type": "compacted", "payload": {"message": "a summary"}}
    assert len(said("codex", [*log, compacted, spoken("user", "C")])) == 3
    aborted = read("codex", [*log, event("turn_aborted", reason="interrupted")])
    assert aborted["meta"]["exit_status"] == "turn_aborted"


def test_codex_old_rollouts_have_bare_items_and_instructions():
    log = [
        {"id": "OLD", "timestamp": "t", "instructions": "AGENTS", "git": None},
        {"record_type": "state"},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "A"}]},
        {"type": "function_call", "name": "shell", "arguments": '{"command": ["ls"]}', "call_id": "c"},
        {"type": "function_call_output", "call_id": "c", "output": "a.py"},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "B"}]},
        {"record_type": "state"},
    ]
    assert said("codex", log) == [
        ("system", "AGENTS"),
        ("user", "A"),
        ("assistant", "", "", [("shell", {"command": ["ls"]})]),
        ("tool", "c", "a.py"),
        ("assistant", "B", "", []),
    ]
    assert read("codex", log)["meta"]["query_id"] == "OLD"


def test_codex_a_sub_agents_message_is_the_users_and_unknown_items_reject_by_name():
    log = [
        meta_line(**BASE),
        spoken("user", "A"),
        item("agent_message", author="/root/x", text="sub result"),
    ]
    assert said("codex", log)[-1] == ("user", "sub result")
    assert rejected("codex", [*log, item("function_call_v2", name="x")]) == "unknown_kind: function_call_v2"
    assert rejected("codex", [*log, item("compaction", encrypted_content="x")]) == "compacted: compaction"
    assert rejected("codex", [*log, item("web_search_call", action={})]) == (
        "unsupported_call: web_search_call, its result is in no log"
    )
    new_line = {"timestamp": "t", "type": "brand_new", "payload": {}}
    assert rejected("codex", [*log, new_line]) == "unknown_kind: brand_new"
    stream = [{"type": "thread.started", "thread_id": "T"}, {"type": "turn.started"}]
    assert rejected("codex", stream).startswith("not_supported: codex exec --json")


# Gemini CLI and Qwen Code


def content(role, *parts):
    return {"role": role, "parts": list(parts)}


def function(name, id=None, **arguments):
    return {"functionCall": {"name": name, "args": arguments} | ({"id": id} if id else {})}


def answer(name, output, id=None):
    return {"functionResponse": {"name": name, "response": {"output": output}} | ({"id": id} if id else {})}


def test_gemini_a_session_takes_the_last_version_of_a_message_and_rewinds():
    tool_call = {"id": "c1", "name": "read_file", "args": {"file_path": "a"}, "displayName": "Read"}
    done = tool_call | {
        "result": [answer("read_file", "x = 1", "c1")],
        "status": "success",
        "resultDisplay": "1 line",
    }
    log = [
        {"sessionId": "G", "projectHash": "h", "startTime": "t"},
        {"id": "1", "type": "user", "content": [{"text": "Do A"}]},
        {"id": "2", "type": "info", "content": "model changed"},
        {"id": "3", "type": "gemini", "content": "look", "toolCalls": [tool_call], "model": "g"},
        {"$set": {"lastUpdated": "t"}},
        {
            "id": "3",
            "type": "gemini",
            "content": "look",
            "toolCalls": [done],
            "model": "g",
            "thoughts": [{"subject": "Plan", "description": "read it"}],
        },
        {"id": "4", "type": "user", "content": [answer("read_file", "x = 1", "c1")]},
        {"id": "5", "type": "user", "content": "wrong turn"},
        {"id": "6", "type": "gemini", "content": "wrong answer"},
        {"$rewindTo": "5"},
        {"id": "7", "type": "gemini", "content": "done"},
    ]
    expected = [
        ("user", "Do A"),
        ("assistant", "look", "Plan\nread it", [("read_file", {"file_path": "a"})]),
        ("tool", "c1", "x = 1"),
        ("assistant", "done", "", []),
    ]
    assert said("gemini_cli", log) == expected
    assert read("gemini_cli", log)["meta"] == {
        "sessionId": "G",
        "projectHash": "h",
        "startTime": "t",
        "model": "g",
    }
    latest = [log[1], log[2], log[5], log[10]]
    assert said("gemini_cli", log[0] | {"messages": latest}) == expected
    assert rejected("gemini_cli", [*log, {"id": "8", "type": "brand_new"}]) == "unknown_kind: brand_new"


def test_gemini_a_state_may_list_the_messages_anew_and_an_unknown_rewind_goes_to_the_start():
    header = {"sessionId": "s", "projectHash": "p"}
    asked = {"id": "1", "type": "user", "content": "Do A"}
    done = {"id": "2", "type": "gemini", "content": "A done"}
    expected = [("user", "Do A"), ("assistant", "A done", "", [])]
    assert said("gemini_cli", [header | {"messages": [asked]}, done]) == expected
    old = {"id": "0", "type": "user", "content": "Do Z"}
    assert said("gemini_cli", [header, old, {"$set": {"messages": [asked]}}, done]) == expected
    assert said("gemini_cli", [header, old, {"$rewindTo": "9"}, asked, {"$set": {"summary": "A"}}, done]) == expected


def test_gemini_saves_and_checkpoints_hold_what_was_sent():
    contents = [
        content("user", {"text": "Do A"}),
        content("model", {"text": "look"}, function("read_file", p="a")),
        content("user", answer("read_file", "x")),
        content("model", {"text": "done"}),
    ]
    expected = [
        ("user", "Do A"),
        ("assistant", "look", "", [("read_file", {"p": "a"})]),
        ("tool", None, "x"),
        ("assistant", "done", "", []),
    ]
    assert said("gemini_cli", contents) == expected
    checkpoint = {"history": [{"type": "user", "text": "Do A"}], "clientHistory": contents, "toolCall": {}}
    assert said("gemini_cli", checkpoint) == expected
    image = content("user", {"inlineData": {"mimeType": "image/png", "data": "A"}})
    assert rejected("gemini_cli", [image, *contents]) == "non_text_content: inlineData"
    image["parts"][0] = {"text": "Look"} | image["parts"][0]
    assert rejected("gemini_cli", [image, *contents]) == "non_text_content: text, inlineData"


def qwen(kind, id, parent, *parts, **more):
    role = "model" if kind == "assistant" else "user"
    return {
        "uuid": id,
        "parentUuid": parent,
        "sessionId": "Q",
        "type": kind,
        "message": content(role, *parts),
    } | more


def test_qwen_follows_the_tree_and_bridges_a_gap():
    system = {"uuid": "s", "parentUuid": "2", "sessionId": "Q", "type": "system", "subtype": "ui_telemetry"}
    log = [
        qwen("user", "1", None, {"text": "Do A"}),
        qwen(
            "assistant",
            "2",
            "1",
            {"text": "hm", "thought": True},
            {"text": "look"},
            function("ls", "c1", p="."),
        ),
        system,
        qwen("tool_result", "3", "s", answer("ls", "a.py", "c1")),
        qwen("assistant", "4", "LOST", {"text": "done"}, model="q"),
        qwen("user", "5", "4", {"text": "wrong turn"}),
        qwen("assistant", "6", "5", {"text": "wrong"}),
        qwen("user", "7", "4", {"text": "B"}),
        qwen("assistant", "8", "7", {"text": "B done"}, model="q"),
    ]
    assert said("qwen_code", log) == [
        ("user", "Do A"),
        ("assistant", "look", "hm", [("ls", {"p": "."})]),
        ("tool", "c1", "a.py"),
        ("assistant", "done", "", []),
        ("user", "B"),
        ("assistant", "B done", "", []),
    ]
    assert read("qwen_code", log)["meta"] == {"query_id": "Q", "model": "q"}
    compressed = system | {"uuid": "c", "parentUuid": "4", "subtype": "chat_compression"}
    rest = [qwen("user", "9", "c", {"text": "C"}), qwen("assistant", "10", "9", {"text": "D"})]
    assert rejected("qwen_code", [*log[:5], compressed, *rest]) == "compacted"


# opencode


def entry(role, *parts, **info):
    return {"info": {"role": role} | info, "parts": list(parts)}


def tool_part(id, status="completed", **state):
    return {
        "type": "tool",
        "callID": id,
        "tool": "bash",
        "state": {"status": status, "input": {"c": id}} | state,
    }


STEP = [{"type": "step-start"}, {"type": "step-finish"}]


def test_opencode_a_step_is_a_response_and_undone_or_unsent_parts_go():
    log = {
        "info": {"id": "ses", "title": "a title", "revert": {"messageID": "m9"}},
        "messages": [
            entry(
                "user",
                text("Do A"),
                text("only shown") | {"ignored": True},
                {"type": "file", "mime": "text/plain"},
            ),
            entry(
                "assistant",
                STEP[0],
                {"type": "reasoning", "text": "R"},
                text("look"),
                tool_part("c1", output="a.py"),
                tool_part("c2", "error", error="no"),
                STEP[1],
                tool_part("c3"),
                STEP[1],
                text("done"),
                modelID="m",
            ),
            entry("assistant", text("half"), error={"name": "APIError"}),
            entry("user", text("go on")),
            entry("assistant", text("stopped"), error={"name": "MessageAbortedError"}, modelID="m"),
            entry("user", text("B")),
            entry("assistant", text("B done"), STEP[1], modelID="m"),
            entry("user", text("undone"), id="m9"),
            entry("assistant", text("bad")),
        ],
    }
    assert said("opencode", log) == [
        ("user", "Do A"),
        ("assistant", "look", "R", [("bash", {"c": "c1"}), ("bash", {"c": "c2"})]),
        ("tool", "c1", "a.py"),
        ("tool", "c2", "no"),
        ("assistant", "", "", [("bash", {"c": "c3"})]),
        ("tool", "c3", ""),
        ("assistant", "done", "", []),
        ("user", "go on"),
        ("assistant", "stopped", "", []),
        ("user", "B"),
        ("assistant", "B done", "", []),
    ]
    row = read("opencode", log)
    weights = [message.get("weight") for message in row["messages"] if message["role"] == "assistant"]
    assert weights == [None, None, None, 0, None]
    assert row["meta"] == {"query_id": "ses", "title": "a title", "model": "m", "exit_status": "", "finish_reason": ""}
    # undone from a part on: what the answer had before it stays, and is the log's end
    halves = {"parts": [text("B") | {"id": "p1"}, text("undone") | {"id": "p2"}]}
    revert = {"messageID": "m9", "partID": "p2"}
    log["messages"][-2:] = [entry("assistant", id="m9", finish="length") | halves, entry("user", text("undone too"))]
    log["info"]["revert"] = revert
    assert said("opencode", log)[-1] == ("assistant", "B", "", [])
    assert read("opencode", log)["meta"]["finish_reason"] == "length"


def test_opencode_compactions_images_and_unknown_parts_reject_by_name():
    def log(part, **info):
        return {
            "info": {"id": "s"},
            "messages": [entry("user", text("A")), entry("assistant", part, **info)],
        }

    assert rejected("opencode", log({"type": "compaction"})) == "compacted"
    assert rejected("opencode", log(text("a summary"), summary=True)) == "compacted"
    assert rejected("opencode", log({"type": "file", "mime": "image/png"})) == "non_text_content: file"
    assert (
        rejected("opencode", log(tool_part("c", attachments=[{"mime": "image/png"}])))
        == "non_text_content: tool"
    )
    assert rejected("opencode", log({"type": "subtask"})) == "unknown_kind: subtask"
    failed = read("opencode", log(text("half"), error={"name": "APIError"}))
    assert failed["meta"]["exit_status"] == "APIError"
    stream = [{"type": "text", "sessionID": "s", "timestamp": 1, "part": text("done")}]
    assert rejected("opencode", stream).startswith("not_supported: opencode run --format json")


# OpenHands


def response(id, content, *calls):
    tool_calls = [
        {"id": call, "type": "function", "function": {"name": name, "arguments": json.dumps(arguments)}}
        for call, name, arguments in calls
    ]
    return {
        "id": id,
        "choices": [{"message": {"role": "assistant", "content": content, "tool_calls": tool_calls}}],
    }


def test_openhands_takes_each_response_once_and_recalled_instructions_as_the_users_text():
    both = response("r1", "look", ("c1", "bash", {"command": "ls"}), ("c2", "bash", {"command": "pwd"}))

    def meta(call, model_response=both):
        return {"tool_call_id": call, "function_name": "bash", "model_response": model_response}

    skill = {"name": "pdf", "content": "HOW TO PDF"}
    history = [
        {"source": "agent", "action": "system", "args": {"content": "S", "tools": [{"name": "bash"}]}},
        {"source": "user", "action": "message", "args": {"content": "Do A"}},
        {"source": "user", "action": "recall", "args": {"query": "Do A"}},
        {
            "source": "environment",
            "observation": "recall",
            "content": "Added workspace context",
            "extras": {"repo_instructions": "USE TABS", "microagent_knowledge": [skill]},
        },
        {"source": "agent", "action": "run", "args": {"command": "ls"}, "tool_call_metadata": meta("c1")},
        {"source": "agent", "action": "run", "args": {"command": "pwd"}, "tool_call_metadata": meta("c2")},
        {"source": "agent", "observation": "run", "content": "a.py", "tool_call_metadata": meta("c1")},
        {"source": "agent", "observation": "error", "content": "no", "tool_call_metadata": meta("c2")},
        {"source": "environment", "observation": "agent_state_changed", "content": "", "extras": {}},
        {"source": "environment", "observation": "error", "content": "runtime crashed"},
        {"source": "agent", "action": "message", "args": {"content": "done?"}},
        {
            "source": "agent",
            "action": "finish",
            "args": {},
            "tool_call_metadata": meta("c3", response("r2", None, ("c3", "finish", {"message": "done"}))),
        },
    ]
    expected = [
        ("system", "S"),
        ("user", "Do A"),
        ("user", "USE TABS\nHOW TO PDF"),
        ("assistant", "look", "", [("bash", {"command": "ls"}), ("bash", {"command": "pwd"})]),
        ("tool", "c1", "a.py"),
        ("tool", "c2", "no"),
        ("user", "runtime crashed"),
        ("assistant", "done?", "", []),
        ("assistant", "", "", [("finish", {"message": "done"})]),
    ]
    log = {"instance_id": "i-1", "history": history, "resolved": True, "error": None}
    assert said("openhands", log) == expected and said("openhands", history) == expected
    row = read("openhands", log)
    assert row["tools"] == [{"name": "bash"}]
    assert row["meta"] == {"instance_id": "i-1", "resolved": True, "error": None, "exit_status": ""}
    assert read("openhands", log | {"error": "stuck"})["meta"]["exit_status"] == "error"
    pairs = {"history": [[history[1], {"observation": "null", "content": ""}]]}
    assert said("openhands", pairs) == [("user", "Do A")]


def test_openhands_what_the_model_wrote_must_be_in_the_log():
    start = {"source": "user", "action": "message", "args": {"content": "Do A"}}
    run = {"source": "agent", "action": "run", "args": {"command": "ls"}}
    assert rejected("openhands", [start, run]) == "call_not_logged: run, without what the model wrote"
    condensed = {"source": "agent", "action": "condensation", "args": {"summary": "s"}}
    assert rejected("openhands", [start, condensed]) == "compacted"


def v1_action(id, response, thought=(), **more):
    call = {"id": id, "name": "terminal", "arguments": json.dumps({"command": id})}
    row = {"id": f"a{id}", "source": "agent", "kind": "ActionEvent", "thought": list(thought)}
    return row | {"tool_call": call, "llm_response_id": response, "tool_call_id": id} | more


def v1_observed(id, **more):
    row = {"id": f"o{id}", "source": "environment", "kind": "ObservationEvent"}
    return row | {"tool_call_id": id} | more


def test_openhands_v1_joins_the_actions_of_one_response():
    events = [
        {
            "id": "0",
            "source": "agent",
            "kind": "SystemPromptEvent",
            "system_prompt": text("S"),
            "dynamic_context": text("today"),
            "tools": [{"name": "terminal"}],
        },
        {
            "id": "1",
            "source": "user",
            "kind": "MessageEvent",
            "llm_message": {"role": "user", "content": [text("Do A")]},
            "extended_content": [text("SKILL")],
        },
        v1_action("c1", "r1", [text("look")], thinking_blocks=[{"type": "thinking", "thinking": "T"}]),
        v1_observed("c1", observation={"kind": "TerminalObservation", "content": [text("a.py")]}),
        v1_action("c2", "r1"),
        v1_observed("c2", observation={"kind": "FileEditorObservation", "output": "OUT"}),
        v1_action("c3", "r2", responses_reasoning_item={"id": "rs", "summary": ["R"], "content": None}),
        {"id": "e", "source": "agent", "kind": "AgentErrorEvent", "tool_call_id": "c3", "error": "bad"},
        {
            "id": "s",
            "source": "environment",
            "kind": "ConversationStateUpdateEvent",
            "key": "k",
            "value": 1,
        },
        {
            "id": "9",
            "source": "agent",
            "kind": "MessageEvent",
            "llm_message": {"role": "assistant", "content": [text("done")]},
        },
    ]
    assert said("openhands_events", events) == [
        ("system", "S\ntoday"),
        ("user", "Do A\nSKILL"),
        ("assistant", "look", "T", [("terminal", {"command": "c1"}), ("terminal", {"command": "c2"})]),
        ("tool", "c1", "a.py"),
        ("tool", "c2", "OUT"),
        ("assistant", "", "R", [("terminal", {"command": "c3"})]),
        ("tool", "c3", "bad"),
        ("assistant", "done", "", []),
    ]
    assert read("openhands_events", events)["tools"] == [{"name": "terminal"}]
    new = {"id": "n", "source": "agent", "kind": "BrandNewEvent"}
    assert rejected("openhands_events", [*events, new]) == "unknown_kind: BrandNewEvent"
    condensed = {"id": "n", "source": "agent", "kind": "Condensation", "summary": "s"}
    assert rejected("openhands_events", [*events, condensed]) == "compacted"


# mini-swe-agent, SWE-agent


def test_mini_swe_agent_has_a_schema_only_where_the_model_saw_one():
    start = [{"role": "system", "content": "S"}, {"role": "user", "content": "Do A"}]
    command = {
        "id": "c1",
        "type": "function",
        "function": {"name": "bash", "arguments": '{"command": "ls"}'},
    }
    with_calls = [
        *start,
        {
            "role": "assistant",
            "content": "look",
            "tool_calls": [command],
            "reasoning_content": "R",
            "extra": {"cost": 1.0},
        },
        {"role": "tool", "tool_call_id": "c1", "content": "a.py"},
        {"role": "assistant", "content": "done"},
        {"role": "exit", "content": "diff", "extra": {"exit_status": "Submitted"}},
    ]
    info = {
        "exit_status": "Submitted",
        "submission": "diff",
        "mini_version": "2.4.6",
        "config": {"model": {"model_name": "m"}},
    }
    log = {
        "info": info,
        "messages": with_calls,
        "trajectory_format": "mini-swe-agent-1.1",
        "instance_id": "i",
    }
    assert said("mini_swe_agent", log) == [
        ("system", "S"),
        ("user", "Do A"),
        ("assistant", "look", "R", [("bash", {"command": "ls"})]),
        ("tool", "c1", "a.py"),
        ("assistant", "done", "", []),
    ]
    row = read("mini_swe_agent", log)
    assert [schema["name"] for schema in row["tools"]] == ["bash"]
    assert row["meta"] == {
        "trajectory_format": "mini-swe-agent-1.1",
        "instance_id": "i",
        "exit_status": "Submitted",
        "submission": "diff",
        "mini_version": "2.4.6",
        "model": "m",
    }
    in_text = [
        *start,
        {"role": "assistant", "content": "```bash\nls\n```"},
        {"role": "user", "content": "diff"},
    ]
    version_1 = {
        "info": {"exit_status": "Submitted", "submission": "diff", "mini_version": "1.14"},
        "messages": in_text,
    }
    assert said("mini_swe_agent", version_1)[-1] == ("assistant", "```bash\nls\n```", "", [])
    assert read("mini_swe_agent", version_1)["tools"] is None


def test_mini_swe_agent_reads_the_items_of_the_responses_api():
    log = {
        "trajectory_format": "mini-swe-agent-1.1",
        "info": {"exit_status": "Submitted"},
        "messages": [
            {"role": "user", "content": "Do A"},
            {
                "object": "response",
                "output": [
                    {"type": "reasoning", "summary": [{"text": "R"}]},
                    {
                        "type": "function_call",
                        "call_id": "c",
                        "name": "bash",
                        "arguments": '{"command": "ls"}',
                    },
                ],
            },
            {"type": "function_call_output", "call_id": "c", "output": "a.py"},
        ],
    }
    assert said("mini_swe_agent", log) == [
        ("user", "Do A"),
        ("assistant", "", "R", []),
        ("assistant", "", "", [("bash", {"command": "ls"})]),
        ("tool", "c", "a.py"),
    ]
    assert len(read("mini_swe_agent", log)["tools"]) == 1
    log["messages"].append({"role": "brand_new", "content": ""})
    assert rejected("mini_swe_agent", log) == "unknown_kind: brand_new"


def test_swe_agent_reads_its_history_without_the_demonstrations():
    submit = {"id": "c2", "type": "function", "function": {"name": "submit", "arguments": "{}"}}
    log = {
        "environment": "e",
        "trajectory": [{"action": "ls"}],
        "history": [
            {"role": "system", "content": "S", "agent": "main"},
            {"role": "user", "content": "DEMO", "is_demo": True},
            {"role": "user", "content": [text("Do A")]},
            {
                "role": "assistant",
                "content": "look",
                "thought": "look",
                "action": "submit",
                "tool_calls": [submit],
                "thinking_blocks": [{"type": "thinking", "thinking": "T"}],
            },
            {"role": "tool", "content": [text("diff")], "tool_call_ids": ["c2"]},
        ],
        "info": {"exit_status": "submitted", "submission": "diff"},
    }
    assert said("swe_agent", log) == [
        ("system", "S"),
        ("user", "Do A"),
        ("assistant", "look", "T", [("submit", {})]),
        ("tool", "c2", "diff"),
    ]
    row = read("swe_agent", log)
    assert row["tools"] is None
    assert row["meta"] == {"environment": "e", "exit_status": "submitted", "submission": "diff"}


# ATIF


def atif(*steps, **more):
    agent = {"name": "terminus-2", "version": "2", "model_name": "m"} | more.pop("agent", {})
    return {"schema_version": "ATIF-v1.6", "session_id": "s", "agent": agent, "steps": list(steps)} | more


def step(message, *calls, results=(), **more):
    tool_calls = [{"tool_call_id": id, "function_name": "keys", "arguments": {"k": id}} for id in calls]
    observation = {"observation": {"results": list(results)}} if results else {}
    return {"source": "agent", "message": message, "tool_calls": tool_calls} | observation | more


def test_atif_terminus_answers_all_calls_of_a_step_at_once_or_has_none():
    log = atif(
        {"source": "user", "message": "task"},
        step("two", "a", "b", results=[{"content": "screen"}], reasoning_content="R"),
        step(
            "linked",
            "c",
            results=[{"source_call_id": "c", "content": "1"}, {"source_call_id": "c", "content": "2"}],
        ),
        step('{"commands": []}', results=[{"content": "raw screen"}]),
        {"source": "system", "message": "a hook"},
        step("done"),
    )
    assert said("atif", log) == [
        ("user", "task"),
        ("assistant", "two", "R", [("keys", {"k": "a"}), ("keys", {"k": "b"})]),
        ("tool", "a", ""),
        ("tool", "b", "screen"),
        ("assistant", "linked", "", [("keys", {"k": "c"})]),
        ("tool", "c", "1\n2"),
        ("assistant", '{"commands": []}', "", []),
        ("user", "raw screen"),
        ("system", "a hook"),
        ("assistant", "done", "", []),
    ]
    row = read("atif", log)
    assert row["tools"] is None and row["checked"] == log["steps"]
    assert row["meta"] == {
        "schema_version": "ATIF-v1.6",
        "session_id": "s",
        "query_id": "s",
        "model": "m",
        "agent": "terminus-2",
        "version": "2",
    }


def test_atif_copied_steps_are_context_and_schemas_come_from_the_agent():
    log = atif(
        {"source": "system", "message": "S", "is_copied_context": True},
        step("said before", is_copied_context=True),
        {"source": "user", "message": "go on"},
        step("no model said it", llm_call_count=0),
        step("new"),
        agent={"tool_definitions": [{"name": "keys"}]},
        subagent_trajectories=[atif({"source": "user", "message": "sub"})],
    )
    row = read("atif", log)
    weights = [(message["content"], message.get("weight")) for message in row["messages"]]
    assert weights == [
        ("S", None),
        ("said before", 0),
        ("go on", None),
        ("no model said it", 0),
        ("new", None),
    ]
    assert row["tools"] == [{"name": "keys"}]
    assert rejected("atif", atif({"source": "robot", "message": "x"})) == "unknown_kind: robot"


# Others


def pi(kind, id, parent, **more):
    return {"type": kind, "id": id, "parentId": parent} | more


def test_pi_follows_the_tree_and_leaves_out_what_was_stopped():
    tool_call = {"type": "toolCall", "id": "c1", "name": "bash", "arguments": {"command": "ls"}}
    stopped = {"role": "assistant", "stopReason": "aborted", "content": [tool_call | {"id": "c9"}]}
    log = [
        {"type": "session", "version": 3, "id": "P", "cwd": "/w"},
        pi("model_change", "0", None, modelId="m"),
        pi("message", "1", "0", message={"role": "user", "content": "Do A"}),
        pi(
            "message",
            "2",
            "1",
            message={
                "role": "assistant",
                "stopReason": "toolUse",
                "content": [{"type": "thinking", "thinking": "T"}, text("look"), tool_call],
            },
        ),
        pi(
            "message",
            "3",
            "2",
            message={"role": "toolResult", "toolCallId": "c1", "content": [text("a.py")]},
        ),
        pi("message", "4", "3", message=stopped),
        pi(
            "message",
            "5",
            "4",
            message={"role": "toolResult", "toolCallId": "c9", "content": [text("stopped")]},
        ),
        pi("message", "6", "5", message={"role": "bashExecution", "command": "pwd", "output": "/w"}),
        pi("custom_message", "7", "6", customType="x", content="by an extension", display=True),
        pi("message", "8", "7", message={"role": "user", "content": "wrong turn"}),
        pi("branch_summary", "9", "7", summary="what the other branch did"),
        pi(
            "message",
            "10",
            "9",
            message={"role": "assistant", "stopReason": "stop", "content": [text("done")]},
        ),
    ]
    assert said("pi", log) == [
        ("user", "Do A"),
        ("assistant", "look", "T", [("bash", {"command": "ls"})]),
        ("tool", "c1", "a.py"),
        ("user", "pwd\n/w"),
        ("user", "by an extension"),
        ("user", "what the other branch did"),
        ("assistant", "done", "", []),
    ]
    assert read("pi", log)["meta"] == {"query_id": "P", "harness": "pi", "cwd": "/w", "stop_reason": "stop"}
    compacted = [
        pi("compaction", "11", "10", summary="s"),
        pi("message", "12", "11", message={"role": "user"}),
    ]
    assert len(said("pi", [*log, *compacted])) == 7
    assert rejected("pi", [*log, pi("brand_new", "13", "10")]) == "unknown_kind: brand_new"
    log[7]["message"]["excludeFromContext"] = True  # a command of the user's that Pi does not send
    assert ("user", "pwd\n/w") not in said("pi", log) and len(said("pi", log)) == 6


def test_sts_traces_are_read_in_their_order():
    log = [
        {"type": "session", "harness": "mine", "id": "T"},
        {"type": "message", "message": {"role": "user", "content": "hi"}},
        {"type": "message", "message": {"role": "assistant", "content": "hello"}},
    ]
    assert said("pi", log) == [("user", "hi"), ("assistant", "hello", "", [])]
    assert read("pi", log)["meta"]["harness"] == "mine"


def test_goose_reads_exports_and_sessions():
    shell = {"status": "success", "value": {"name": "developer__shell", "arguments": {"command": "ls"}}}
    for_both = [
        text("for the screen") | {"annotations": {"audience": ["user"]}},
        text("a.py") | {"annotations": {"audience": ["assistant"]}},
    ]
    messages = [
        {"role": "user", "created": 1, "content": [text("Do A")]},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "T"},
                {"type": "toolRequest", "id": "c1", "toolCall": shell},
            ],
        },
        {
            "role": "user",
            "content": [{"type": "toolResponse", "id": "c1", "toolResult": {"value": for_both}}],
        },
        {"role": "user", "content": [text("only shown")], "metadata": {"agentVisible": False}},
        {"role": "assistant", "content": [text("done")]},
    ]
    expected = [
        ("user", "Do A"),
        ("assistant", "", "T", [("developer__shell", {"command": "ls"})]),
        ("tool", "c1", "a.py"),
        ("assistant", "done", "", []),
    ]
    header = {"working_dir": "/w", "description": "d"}
    assert said("goose", [header, *messages]) == expected
    assert said("goose", {"id": "g", "working_dir": "/w", "conversation": messages}) == expected
    row = read("goose", [header, *messages])
    assert row["meta"] == header and row["left_out"] == for_both[:1]
    failed = {"type": "toolResponse", "id": "c1", "toolResult": {"status": "error", "error": "no"}}
    assert said("goose", [header, *messages[:2], {"role": "user", "content": [failed]}])[-1] == (
        "tool",
        "c1",
        "no",
    )
    summary = {"role": "user", "content": [text("so far")], "metadata": {"userVisible": False}}
    assert rejected("goose", [header, *messages, summary]).startswith("compacted")
    new = {"role": "user", "content": [{"type": "image", "data": "A"}]}
    assert rejected("goose", [header, *messages, new]) == "non_text_content: image"


def test_inspect_takes_schemas_from_the_last_request_and_the_outcome_from_the_score():
    sample = {
        "id": 3,
        "epoch": 1,
        "input": "Do A",
        "target": "",
        "messages": [
            {"role": "user", "content": "attachment://ab12"},
            {
                "role": "assistant",
                "content": [{"type": "reasoning", "reasoning": "T"}, text("look")],
                "tool_calls": [
                    {"id": "c1", "function": "bash", "arguments": {"cmd": "ls"}, "type": "function"}
                ],
            },
            {
                "role": "tool",
                "tool_call_id": "c1",
                "content": "",
                "error": {"type": "timeout", "message": "too long"},
            },
            {"role": "assistant", "content": "done"},
        ],
        "attachments": {"ab12": 'Do "A"\nwell'},
        "events": [
            {"event": "model", "tools": [{"name": "old"}]},
            {"event": "model", "tools": [{"name": "bash"}]},
        ],
        "scores": {"match": {"value": "C"}},
    }
    assert said("inspect_ai", sample) == [
        ("user", 'Do "A"\nwell'),
        ("assistant", "look", "T", [("bash", {"cmd": "ls"})]),
        ("tool", "c1", "too long"),
        ("assistant", "done", "", []),
    ]
    row = read("inspect_ai", sample)
    assert row["tools"] == [{"name": "bash"}]
    assert row["meta"] == {"id": 3, "epoch": 1, "target": "", "query_id": "3-1", "success": True}
    assert read("inspect_ai", sample | {"scores": {"m": {"value": "I"}}})["meta"]["success"] is False
    assert "success" not in read("inspect_ai", sample | {"scores": {"m": {"value": 0.4}}})["meta"]
    other = sample | {"id": 4}
    log = {"version": 2, "eval": {}, "samples": [sample, other]}
    assert READERS["inspect_ai"]["split"](log) == [sample, other]
    assert said("inspect_ai", log) == said("inspect_ai", sample)


def test_langsmith_runs_hold_messages_of_langchain_plain_or_serialised():
    human = {
        "lc": 1,
        "type": "constructor",
        "id": ["langchain", "schema", "messages", "HumanMessage"],
        "kwargs": {"content": "Do A"},
    }
    ai = {
        "type": "ai",
        "content": "look",
        "tool_calls": [{"name": "ls", "args": {"p": "."}, "id": "c1"}],
        "additional_kwargs": {"reasoning_content": "R"},
    }
    tool = {"type": "tool", "content": "a.py", "tool_call_id": "c1"}
    run = {
        "id": "r",
        "name": "agent",
        "run_type": "chain",
        "inputs": {"messages": [[human]]},
        "outputs": {"messages": [{"type": "human", "content": "Do A"}, ai, tool]},
        "extra": {"invocation_params": {"tools": [{"name": "ls"}]}},
    }
    assert said("langsmith", run) == [
        ("user", "Do A"),
        ("assistant", "look", "R", [("ls", {"p": "."})]),
        ("tool", "c1", "a.py"),
    ]
    row = read("langsmith", run)
    assert row["tools"] == [{"name": "ls"}]
    assert row["meta"] == {"id": "r", "name": "agent", "run_type": "chain", "exit_status": "", "finish_reason": None}
    chat = run | {
        "run_type": "llm",
        "outputs": {"generations": [[{"message": {"type": "ai", "content": "hi"}}]]},
    }
    assert said("langsmith", chat) == [("user", "Do A"), ("assistant", "hi", "", [])]
    assert read("langsmith", run | {"error": "boom"})["meta"]["exit_status"] == "error"


def test_langfuse_takes_the_generation_that_saw_most():
    user = {"role": "user", "content": "Do A"}
    first = {"type": "GENERATION", "input": [user], "output": {"role": "assistant", "content": "B"}}
    second = {
        "type": "GENERATION",
        "output": "done",
        "input": {
            "messages": [user, first["output"], {"role": "user", "content": "C"}],
            "tools": [{"name": "t"}],
        },
    }
    assert said("langfuse", first | {"id": "g"}) == [("user", "Do A"), ("assistant", "B", "", [])]
    trace = {"id": "tr", "observations": [{"type": "SPAN"}, second, first]}
    assert [turn[1] for turn in said("langfuse", trace)] == ["Do A", "B", "C", "done"]
    row = read("langfuse", trace)
    assert row["tools"] == [{"name": "t"}] and row["meta"] == {"id": "tr"}
    # 02 looks for what began alike in the row, not for what another agent was asked
    branch = {"type": "GENERATION", "input": [user], "output": "dropped"}
    helper = {"type": "GENERATION", "input": [{"role": "user", "content": "Give a title"}], "output": "Title"}
    looked_at = read("langfuse", {"observations": [second, branch, helper]})["checked"]
    assert [{"role": "assistant", "content": "dropped"}] in looked_at  # a text is looked for however short it is
    assert "Title" not in json.dumps(looked_at)


def test_otel_spans_hold_parts():
    given = [
        {"role": "user", "parts": [{"type": "text", "content": "Do A"}]},
        {
            "role": "assistant",
            "parts": [
                {"type": "reasoning", "content": "T"},
                {"type": "tool_call", "id": "c1", "name": "ls", "arguments": {"p": "."}},
            ],
        },
        {"role": "tool", "parts": [{"type": "tool_call_response", "id": "c1", "response": "a.py"}]},
    ]
    attributes = {
        "gen_ai.system_instructions": json.dumps([{"type": "text", "content": "S"}]),
        "gen_ai.input.messages": json.dumps(given),
        "gen_ai.output.messages": [{"role": "assistant", "finish_reason": "length",
                                    "parts": [{"type": "text", "content": "done"}]}],
        "gen_ai.tool.definitions": json.dumps([{"name": "ls"}]),
        "gen_ai.request.model": "m",
        "gen_ai.conversation.id": "c",
    }
    expected = [
        ("system", "S"),
        ("user", "Do A"),
        ("assistant", "", "T", [("ls", {"p": "."})]),
        ("tool", "c1", "a.py"),
        ("assistant", "done", "", []),
    ]
    span = {"name": "chat m", "attributes": attributes}
    assert said("otel_genai", span) == expected
    row = read("otel_genai", span)
    assert row["tools"] == [{"name": "ls"}] and row["meta"]["model"] == "m"
    assert row["meta"]["finish_reason"] == "length" and row["meta"]["gen_ai.conversation.id"] == "c"
    listed = [{"key": key, "value": {"stringValue": value}} for key, value in attributes.items()]
    assert read("otel_genai", {"name": "chat m", "attributes": listed})["messages"] == row["messages"]
    attributes["gen_ai.output.messages"] = [
        {"role": "assistant", "parts": [{"type": "blob", "content": "A"}]}
    ]
    assert rejected("otel_genai", span) == "non_text_content: blob"


def test_tau2_kimi_aider_and_batches():
    greeting = {"role": "assistant", "content": "Hi!"}
    simulation = {"id": "s", "task_id": "1", "messages": [greeting], "reward_info": {"reward": 1.0}}
    results = {"tasks": [], "simulations": [simulation]}
    assert said("tau2", results) == [("assistant", "Hi!", "", [])]
    assert read("tau2", results)["meta"] == {"id": "s", "task_id": "1", "reward_info": {"reward": 1.0}}
    two = {"tasks": [], "simulations": [simulation, simulation | {"id": "s2"}]}
    assert [part["id"] for part in READERS["tau2"]["split"](two)] == ["s", "s2"]
    context = [
        {"role": "_system_prompt", "content": "S"},
        {"role": "_checkpoint", "id": 0},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "hello"},
        {"role": "_usage", "token_count": 9},
    ]
    assert said("kimi_cli", context) == [("system", "S"), ("user", "hi"), ("assistant", "hello", "", [])]
    assert rejected("kimi_cli", [*context, {"role": "_brand_new"}]) == "unknown_kind: _brand_new"
    assert rejected("aider", "\n# aider chat started at 2026-01-01\n\n#### hi\n").startswith(
        "not_supported: aider"
    )
    asked = {"custom_id": "1", "method": "POST", "body": {"messages": []}}
    assert rejected("openai_batch", asked) == "not_supported: the input of an OpenAI batch, without answers"
    answered = {"custom_id": "1", "response": {"body": {"choices": []}}}
    assert (
        rejected("openai_batch", answered)
        == "not_supported: the output of an OpenAI batch, without the requests"
    )


def test_stage_2_makes_a_row_of_each_part_of_a_log_that_holds_several(run_stage, tmp_path):
    simulations = []
    for number in (1, 2):
        messages = [
            {"role": "user", "content": f"What is {number} and {number}?"},
            {"role": "assistant", "content": f"It is {2 * number}."},
        ]
        simulations.append({"id": f"s{number}", "messages": messages, "reward_info": {"reward": 1.0}})
    (tmp_path / "results.json").write_text(json.dumps({"tasks": [], "simulations": simulations}))
    done = run_stage(
        "02_format_trajectories.py", tmp_path / "results.json", "--output_file", tmp_path / "rows.jsonl"
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(row) for row in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [(row["query_id"], row["meta"]["format"]) for row in rows] == [("s1", "tau2"), ("s2", "tau2")]
    assert [row["meta"]["source"].rpartition("/")[2] for row in rows] == [
        "results.json:1",
        "results.json:2",
    ]


# The small logs and the real ones of a developer's checkout

CASES = ROOT.parent / "shared" / "cases" / "logs"
FORMATS = ("claude_", "codex_", "gemini_", "qwen_", "opencode_", "openhands_", "mini_", "swe_", "atif_")
REASONS = {
    "claude_image": "non_text_content: image",
    "codex_compaction_item": "compacted: compaction",
    "codex_exec_json": "not_supported: codex exec --json",
    "codex_unknown_kind": "unknown_kind: function_call_v2",
    "codex_web": "unsupported_call: web_search_call",
    "gemini_inline": "non_text_content: inlineData",
    "opencode_compaction": "compacted",
    "opencode_run_json": "not_supported: opencode run --format json",
    "openhands_v0_nonfc": "call_not_logged: run",
}


def record_of(path):
    if path.suffix != ".jsonl":
        return json.loads(path.read_text())
    lines = []
    for row in path.read_text().splitlines():
        lines += [json.loads(row)] if row.endswith("}") else []  # a kill cut the last one
    return lines[0] if "history" in lines[0] else lines


@pytest.mark.skipif(not CASES.exists(), reason="needs ../shared/cases")
def test_every_small_log_of_a_tool_is_read_or_rejected_by_its_true_reason():
    for path in sorted(CASES.iterdir()):
        if not path.name.startswith(FORMATS) or path.name == "gemini_thought_nosubject.json":
            continue
        record = record_of(path)
        name = next(name for name, reader in READERS.items() if taken(reader, record))
        stem = path.name.partition(".")[0]
        if stem in REASONS:
            assert rejected(name, record).startswith(REASONS[stem]), path.name
        else:
            assert read(name, record)["messages"], path.name


def taken(reader, record):
    try:
        return reader["fits"](record)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError):
        return False


def calls_of(turns):
    """(name, arguments) of every call of a script or of plain messages."""
    calls = []
    for turn in turns:
        found = turn.get("tool_calls", []) if isinstance(turn, dict) else turn[3]
        calls += [(call["name"], call["arguments"]) if isinstance(call, dict) else call for call in found]
    return calls


def test_a_real_rollout_of_codex_equals_its_script(shared):
    """Calls, answers and thoughts of the log are those that the scripted server gave."""
    script = json.loads((shared / "logs/codex/ground_truth_script.json").read_text())
    log = record_of(next((shared / "logs/codex").glob("rollout-*.jsonl")))
    told = [turn for turn in said("codex", log) if turn[0] == "assistant"]
    assert calls_of(told) == calls_of(script)
    assert [turn[1] for turn in told if turn[1]] == [turn["content"] for turn in script if turn["content"]]
    assert [turn[2] for turn in told if turn[2]] == [turn["reasoning"] for turn in script]


def test_a_real_trajectory_of_mini_swe_agent_equals_its_script(shared):
    script = json.loads((shared / "logs/mini-swe-agent/ground_truth_script.json").read_text())
    log = record_of(shared / "logs/mini-swe-agent/hello.traj.json")
    told = [turn for turn in said("mini_swe_agent", log) if turn[0] == "assistant"]
    assert [turn[1:3] for turn in told] == [(turn["content"], turn["reasoning"]) for turn in script]
    assert calls_of(told) == calls_of(script)
