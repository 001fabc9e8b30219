"""Stage 2: logs become rows exactly, or rejects with a reason; a mistake of the user is one line and exit code 2."""

import argparse
import gzip
import importlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

stage = importlib.import_module("02_format_trajectories")
SCRIPT = Path(stage.__file__)

READ_FILE = {
    "type": "function",
    "function": {
        "name": "read_file",
        "description": "Read a file.",
        "parameters": {"type": "object", "properties": {"path": {"type": "string"}}, "required": ["path"]},
    },
}


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


def run(*arguments, cwd, **options):
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, **options)


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
    extra = edited(1, content="A different question: what is in a.txt?") | {"query_id": "good"}
    rows = run_here(folder, write(folder / "in.jsonl", *records, *[extra] * good), **settings)
    rejects = read(folder / "data/train.rejected.jsonl")
    return (
        [r for r in rows if r["query_id"] != "good"],
        {int(r["source"].rsplit(":", 1)[1]): r["reasons"] for r in rejects},
    )


def format_each(records, **settings):
    """(row, reasons) of each record; row is None where a reader refuses it, and then it comes first."""
    run = stage.make_run(stage.Settings(**settings))
    found = [("log", stage.find_format(record, []), record) for record in records]
    return [(made, reasons) for _, _, made, reasons in stage.format_all(found, run)]


def format_one(record, **settings):
    return format_each([record], **settings)[0]


def messages_of(*messages, **columns):
    """The messages that 02 makes of loose ones."""
    made, reasons = format_one({"messages": list(messages), "tools": [READ_FILE]} | columns)
    assert reasons == []
    return made["messages"]


def mistake(monkeypatch, *arguments):
    """What the command line tells a user who made a mistake."""
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, arguments)])
    with pytest.raises((stage.InputError, OSError)) as told:
        stage.main(*stage.parse_settings(stage.command_line()))
    return str(told.value)


def assert_one_line_error(result, *parts):
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1, result.stderr
    for part in parts:
        assert part in result.stderr


USER = {"role": "user", "content": "Go."}
DONE = {"role": "assistant", "content": "Done."}


# The normal form
def test_a_good_row_passes_unchanged(tmp_path):
    rows, rejects = format_rows(tmp_path, row())
    assert rejects == {}
    assert rows == [row() | {"meta": {"source": f"{tmp_path}/in.jsonl:1", "format": "row"}}]


def test_normal_form_of_loose_messages():
    assert messages_of(
        {"role": "developer", "content": [{"type": "text", "text": "Be brief."}]},
        USER,
        {
            "role": "assistant",
            "content": None,
            "reasoning_content": " ",
            "tool_calls": [
                {"function": {"name": "read_file", "arguments": '{"path": {"y": null, "z": [1]}, "w": null}'}},
                {"function": {"name": "b", "arguments": '"{}"'}},
            ],
        },
        {"role": "tool", "name": "b", "content": "no tool named b"},
        {"role": "tool", "name": "read_file", "content": None},
        {"role": "assistant", "content": "Do", "tool_calls": [call("x", id="")]},
        {"role": "tool", "content": "X"},
        {"role": "assistant", "content": "Do"},
        {"role": "assistant", "content": "ne."},
    ) == [
        {"role": "system", "content": "Be brief."},
        USER,
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [
                call() | {"id": "call_0", "function": {
                    "name": "read_file", "arguments": {"path": {"y": None, "z": [1]}, "w": None}}},
                call() | {"id": "call_1", "function": {"name": "b", "arguments": {}}},
            ],
        },
        {"role": "tool", "tool_call_id": "call_0", "content": ""},
        {"role": "tool", "tool_call_id": "call_1", "content": "no tool named b"},
        {"role": "assistant", "content": "Do", "tool_calls": [call("x", id="call_2")]},
        {"role": "tool", "tool_call_id": "call_2", "content": "X"},
        {"role": "assistant", "content": "Do\nne."},
    ]  # fmt: skip


ONE_CALL = [
    {"role": "user", "content": "What does a.txt say?"},
    {"role": "assistant", "content": "I look.", "reasoning_content": "Read it.", "tool_calls": [call()]},
    {"role": "tool", "tool_call_id": "c1", "content": "42"},
    {"role": "assistant", "content": "It says 42."},
]
ARGUMENTS = {"path": "a.txt"}
SPELLINGS = {
    "legacy function_call": [
        ONE_CALL[0],
        {"role": "assistant", "content": "I look.", "reasoning": "Read it.",
         "function_call": {"name": "read_file", "arguments": json.dumps(ARGUMENTS)}},
        {"role": "function", "name": "read_file", "content": "42"},
        ONE_CALL[3],
    ],
    "flat calls": [
        ONE_CALL[0],
        {"role": "assistant", "content": "I look.", "thinking": "Read it.",
         "tool_calls": [{"name": "read_file", "arguments": ARGUMENTS}]},
        {"role": "environment", "content": "42"},
        ONE_CALL[3],
    ],
    "calls as a JSON string": [
        ONE_CALL[0],
        {"role": "assistant", "content": "I look.", "reasoning_details": [{"type": "reasoning.text", "text": "Read it."}],
         "tool_calls": json.dumps([call()])},
        ONE_CALL[2],
        ONE_CALL[3],
    ],
    "Anthropic blocks": [
        ONE_CALL[0],
        {"role": "assistant", "content": [
            {"type": "thinking", "thinking": "Read it.", "signature": "s"}, {"type": "text", "text": "I look."},
            {"type": "tool_use", "id": "c1", "name": "read_file", "input": ARGUMENTS}]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c1", "content": [
            {"type": "text", "text": "42"}]}]},
        ONE_CALL[3],
    ],
    "Gemini contents": [
        {"role": "user", "parts": [{"text": "What does "}, {"text": "a.txt say?"}]},
        {"role": "model", "parts": [
            {"text": "Read it.", "thought": True}, {"text": "I look."},
            {"functionCall": {"name": "read_file", "args": ARGUMENTS}}]},
        {"role": "user", "parts": [{"functionResponse": {"name": "read_file", "response": {"output": "42"}}}]},
        {"role": "model", "parts": [{"text": "It says 42."}]},
    ],
    "ShareGPT": [
        {"from": "human", "value": "What does a.txt say?"},
        {"from": "gpt", "value": "<think>Read it.</think>\n\nI look."},
        {"from": "function_call", "value": json.dumps({"name": "read_file", "arguments": ARGUMENTS})},
        {"from": "observation", "value": "42"},
        {"from": "gpt", "value": "It says 42."},
    ],
    "roles with a dash, what Arrow leaves of nothing": [
        ONE_CALL[0] | {"tool_calls": "null"},
        {"role": "assistant", "content": "", "thought": "Read it.", "reasoning": "Read it.", "tool_calls": "[]"},
        {"role": "assistant", "content": "I look.", "tool_calls": [call()]},
        {"role": "tool-response", "name": "", "content": "42", "tool_call_id": ""},
        ONE_CALL[3] | {"tool_calls": "null", "function_call": {}},
    ],
    "Hermes": [
        {"from": "human", "value": "What does a.txt say?"},
        {"from": "gpt", "value": "<think>\nRead it.\n</think>\nI look.\n<tool_call>\n"
                                 + json.dumps({"name": "read_file", "arguments": ARGUMENTS}) + "\n</tool_call>"},
        {"from": "tool", "value": '<tool_response>\n{"name": "read_file", "content": "42"}\n</tool_response>'},
        {"from": "gpt", "value": "It says 42."},
    ],
    "Responses items": [
        ONE_CALL[0],
        {"type": "reasoning", "summary": [{"type": "summary_text", "text": "Read it."}], "content": None},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "I look."}]},
        {"type": "function_call", "name": "read_file", "arguments": json.dumps(ARGUMENTS), "call_id": "c1"},
        {"type": "function_call_output", "call_id": "c1", "output": "42"},
        ONE_CALL[3],
    ],
    "Kimi": [
        ONE_CALL[0],
        {"role": "assistant", "tool_calls": [call()], "content": [
            {"type": "think", "think": "Read it.", "encrypted": "g" * 400}, {"type": "text", "text": "I look."}]},
        ONE_CALL[2],
        ONE_CALL[3],
    ],
    "a reasoning among the blocks": [
        ONE_CALL[0],
        {"role": "assistant", "tool_calls": [call()], "content": [
            {"type": "reasoning_text", "text": "Read it."}, {"type": "output_text", "text": "I look."}]},
        ONE_CALL[2],
        ONE_CALL[3] | {"timestamp": "2025-01-01 10:00:00.123456", "signature": "g" * 400},
    ],
    "a reasoning as an object": [
        ONE_CALL[0],
        {"role": "assistant", "content": "I look.", "reasoning": {"content": "Read it."}, "tool_calls": [call()]},
        ONE_CALL[2],
        ONE_CALL[3] | {"date": "Wed, 01 Jan 2025 10:00:00 GMT"},
    ],
    "harmony": [
        ONE_CALL[0],
        {"role": "assistant", "channel": "analysis", "content": "Read it."},
        {"role": "assistant", "channel": "commentary", "content": "I look.", "tool_calls": [call()]},
        ONE_CALL[2],
        ONE_CALL[3] | {"channel": "final", "recipient": "all"},
    ],
    "Inspect": [
        ONE_CALL[0],
        {"role": "assistant", "content": [{"type": "reasoning", "reasoning": "Read it."}, {"type": "text", "text": "I look."}],
         "tool_calls": [{"id": "c1", "function": "read_file", "arguments": ARGUMENTS, "type": "function"}]},
        ONE_CALL[2],
        ONE_CALL[3],
    ],
    "LangChain on Anthropic: the call twice": [
        {"role": "User", "content": "What does a.txt say?"},
        {"role": "AI", "content": [
            {"type": "thinking", "thinking": "Read it."}, {"type": "text", "text": "I look."},
            {"type": "tool_use", "id": "c1", "name": "read_file", "input": ARGUMENTS}],
         "tool_calls": [{"name": "read_file", "args": ARGUMENTS, "id": "c1"}]},
        {"role": "TOOL", "content": "42", "tool_call_id": "c1"},
        ONE_CALL[3] | {"role": "Assistant"},
    ],
    "LangChain": [
        {"type": "human", "data": {"content": "What does a.txt say?"}},
        {"type": "ai", "data": {"content": "I look.", "reasoning_content": "Read it.",
                                "tool_calls": [{"name": "read_file", "args": ARGUMENTS, "id": "c1"}]}},
        {"type": "tool", "data": {"content": "42", "tool_call_id": "c1"}},
        {"type": "ai", "data": {"content": "It says 42."}},
    ],
}  # fmt: skip


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_of_a_conversation_gives_the_same_row(spelling):
    made = messages_of(*SPELLINGS[spelling])
    id = made[1]["tool_calls"][0]["id"]
    assert made == [
        ONE_CALL[0],
        ONE_CALL[1] | {"tool_calls": [call(id=id)]},
        ONE_CALL[2] | {"tool_call_id": id},
        ONE_CALL[3],
    ]


def test_ids_are_unique_over_a_row():
    def turn(id):  # an empty result is a result: the next turn stays its own
        return [
            {"role": "assistant", "tool_calls": [call(id=id)]},
            {"role": "tool", "tool_call_id": id, "content": ""},
        ]

    made = messages_of(USER, *turn("call_1"), *turn("call_1"), *turn(None), DONE)
    assert [m["tool_call_id"] for m in made if m["role"] == "tool"] == ["call_1", "call_2", "call_3"]
    made = messages_of(USER, *turn("call_1"), *turn(""), *turn("a"), DONE)
    assert [m["tool_call_id"] for m in made if m["role"] == "tool"] == ["call_1", "call_2", "a"]


def test_a_system_prompt_beside_the_messages_comes_first_and_once():
    told = {"role": "system", "content": "Be brief."}
    for column in ("system", "system_prompt", "system_message", "system_instruction"):
        assert messages_of(USER, DONE, **{column: "Be brief."}) == [told, USER, DONE]
        assert messages_of(told, USER, DONE, **{column: "Be brief."}) == [told, USER, DONE]
    blocks = {"role": "system", "content": [{"type": "text", "text": "Be brief."}]}
    for spelled in (blocks, {"from": "system", "value": "Be brief."}):
        assert messages_of(spelled, USER, DONE, system="Be brief.", system_prompt="Be brief.") == [told, USER, DONE]
    assert messages_of(USER, DONE, system="Go.") == [{"role": "system", "content": "Go."}, USER, DONE]


def test_a_message_of_the_system_in_the_middle_stays_at_its_place():
    told = {"role": "developer", "content": "Plan only."}
    assert messages_of(USER, DONE, told, USER, DONE)[2] == {"role": "system", "content": "Plan only."}


def test_a_reasoning_that_stands_twice_comes_once_and_a_text_behind_an_empty_content_is_read():
    answer = {"role": "assistant", "content": "<think>\nHm.\n</think>\n\nDone.", "reasoning_content": "\nHm.\n"}
    assert messages_of(USER, answer) == [USER, DONE | {"reasoning_content": "\nHm.\n"}]
    empty = {"role": "assistant", "content": "", "text": "Go", "reasoning_content": "Hm."}
    assert messages_of(USER, empty) == [USER, {"role": "assistant", "content": "Go", "reasoning_content": "Hm."}]


def test_a_greeting_is_context_and_a_thought_alone_is_a_turn():
    greeting = {"role": "assistant", "content": "Hi!"}
    thought = {"role": "assistant", "content": "", "reasoning_content": "Hm."}
    made = messages_of(greeting, USER, thought, USER, DONE)
    assert made == [greeting | {"weight": 0}, USER, thought, USER, DONE]


@pytest.mark.parametrize(
    ("flag", "weight"),
    [({"weight": 0}, 0), ({"weight": 1}, None), ({"loss": False}, 0), ({"loss": True}, None), ({"train": False}, 0),
     ({"metadata": {"train": False}}, 0), ({"extra": {"loss_mask": 1, "lang": "en"}}, None),
     ({"training": False}, 0), ({"loss_mask": 0}, 0), ({"mask": True}, 0), ({"mask": False}, None), ({"loss": None}, None)],
    ids=str,
)  # fmt: skip
def test_a_flag_of_another_trainer_becomes_the_weight_of_its_turn(flag, weight):
    assert messages_of(USER, DONE | flag, USER, DONE)[1].get("weight") == weight


FLAGS = {
    "unsupported_flag: weight": [USER, DONE | {"weight": 0.5}],
    "unsupported_flag: train_detail": [USER, DONE | {"train_detail": [{"begin_offset": 0, "train": False}]}],
    "unsupported_flag: loss_scale": [USER, DONE | {"loss_scale": 0.0}],
    "unsupported_flag: is_trained": [USER, DONE | {"is_trained": False}],
    "unsupported_flag: no_loss": [USER, DONE | {"no_loss": True}],
    "unsupported_flag: assistant_mask": [USER, DONE | {"assistant_mask": [0, 1]}],
    "unsupported_flag: train on a user message": [USER | {"train": True}, DONE],
    "unsupported_flag: train on a part of a message": [USER, {"role": "assistant", "content": [
        {"type": "text", "text": "Hm.", "train": False}, {"type": "text", "text": "Done."}]}],
    "unsupported_flag: loss on a tool message": [*row()["messages"][1:3], row()["messages"][3] | {"loss": True}, DONE],
    "two_weights": [USER, DONE | {"weight": 0}, DONE],
}


@pytest.mark.parametrize("reason", FLAGS)
def test_a_flag_that_cannot_be_followed_is_refused_by_name(reason):
    made, reasons = format_one({"messages": FLAGS[reason]})
    assert made is None and reasons[0].startswith(reason)


def test_schemas_are_never_altered_but_for_geminis_words_for_types():
    schema = {
        "type": "object",
        "properties": {
            "g": {"type": ["STRING", "null"], "default": {"type": "Point"}, "enum": ["A", None]},
            "type": {"type": "string", "examples": [{"type": "OBJECT"}]},
        },
    }
    tool = {"type": "function", "function": {"name": "geo", "parameters": schema, "strict": True}}
    for tools in ([tool], json.dumps([tool]), [json.dumps(tool)], [tool["function"]], {"tools": [tool]}):
        assert stage.read_tools(tools) == [tool]
    anthropic = {"name": "geo", "input_schema": schema, "strict": True}
    assert stage.read_tools([anthropic]) == [tool]
    gemini = {"type": "OBJECT", "properties": {"type": {"type": "STRING", "enum": ["OBJECT"], "default": "STRING"},
                                               "list": {"type": "ARRAY", "items": {"type": "NUMBER"}}}}  # fmt: skip
    [lowered] = stage.read_tools([{"functionDeclarations": [{"name": "f", "parameters": gemini}]}])
    assert lowered["function"]["parameters"] == {
        "type": "object",
        "properties": {"type": {"type": "string", "enum": ["OBJECT"], "default": "STRING"},
                       "list": {"type": "array", "items": {"type": "number"}}},
    }  # fmt: skip


def test_a_schema_may_require_nothing_in_any_spelling():
    for required in (None, [], True, ["path"]):
        parameters = READ_FILE["function"]["parameters"] | {"required": required}
        tool = {"type": "function", "function": READ_FILE["function"] | {"parameters": parameters}}
        made, reasons = format_one(row(tools=[tool]))
        assert reasons == [] and made["tools"] == [tool]


@pytest.mark.parametrize("column", ["tools", "tools_json", "functions", "metadata", "on the first message"])
def test_tools_are_found_where_people_have_them(column):
    columns = {"metadata": {"tools": [READ_FILE], "split": "a"}} if column == "metadata" else {column: [READ_FILE]}
    if column == "on the first message":
        columns = {"messages": edited(0, tools=[READ_FILE])["messages"]}
    made, reasons = format_one({"messages": row()["messages"]} | columns)
    assert made["tools"] == [READ_FILE] and reasons == []
    assert made["meta"].get("metadata") == ({"split": "a"} if column == "metadata" else None)


TAGGED = {  # what stands in the tag, the row's own tools: is the tag cut?
    "the row's tools": (json.dumps([READ_FILE]), [READ_FILE], True),
    "the only list": (json.dumps([READ_FILE]), None, True),
    "a tool a line": (json.dumps(READ_FILE) + "\n" + json.dumps(READ_FILE), None, True),
    "other tools": (json.dumps([{"name": "rm", "parameters": {}}]), [READ_FILE], False),
    "a text": ("with care", [READ_FILE], False),
}


@pytest.mark.parametrize("case", TAGGED)
def test_tools_in_the_system_message_are_cut_if_they_are_the_rows(case):
    text, tools, is_cut = TAGGED[case]
    tagged = edited(0, content=f"Use <tools>{text}</tools>") | {"tools": tools}
    made, reasons = format_one(tagged)
    assert reasons == [] and made["tools"][0] == READ_FILE
    assert made["messages"][0]["content"] == ("Use " if is_cut else f"Use <tools>{text}</tools>")
    assert format_one(made) == (made, [])
    alone = edited(0, content=f"<tools>{text}</tools>") | {"tools": tools}
    assert (format_one(alone)[0]["messages"][0] == row()["messages"][1]) == is_cut


OTHER_COLUMNS = [
    {"history": []}, {"observations": []}, {"observations": ["a", "b"]}, {"custom_id": "c1", "response": "It says 42."},
    {"info": {}}, {"info": {"mode": "x"}, "trajectory": "a path"}, {"type": "GENERATION"}, {"tasks": ["a"]},
    {"events": [{"type": "click"}]}, {"working_dir": "/w", "conversation": [USER]},
]  # fmt: skip


@pytest.mark.parametrize("columns", OTHER_COLUMNS, ids=str)
def test_a_row_is_one_whatever_its_other_columns_are_called(columns):
    readers = stage.load_readers(stage.HERE / "recipes/logs")
    assert stage.find_format(row() | columns, readers).name == "row"
    dated = [message | {"id": n, "timestamp": n} for n, message in enumerate(row()["messages"])]
    assert stage.find_format([*dated, dated[-1] | {"type": "message"}], readers).name == "row"
    merged = {"custom_id": "c1", "request": {"messages": [USER]}, "response": {"body": {}}}
    assert stage.find_format(merged, readers).name == "openai_dump"


def test_a_second_column_of_tools_is_kept_in_meta():
    other = [{"name": "rm", "parameters": {}}]
    made = format_one(row(functions=other))[0]
    assert (made["tools"], made["meta"]["functions"]) == ([READ_FILE], other)


def test_tools_come_from_outside_only_where_calls_are_and_for_the_format(tmp_path):
    other = {"type": "function", "function": {"name": "rm", "parameters": {}}}
    mine, others = tmp_path / "mine.json", tmp_path / "others.py"
    mine.write_text(json.dumps({"tools": [READ_FILE]}))
    others.write_text(f"TOOLS = {[other]!r}\n")
    plain = {"messages": [USER, DONE]}
    asked = {"messages": row()["messages"]}
    assert format_one(asked)[1][0].startswith("no_tool_schemas: of read_file")
    assert format_one(asked, tools=[str(mine)])[0]["tools"] == [READ_FILE]
    assert format_one(asked, tools=[f"row={mine}", str(others)])[0]["tools"] == [READ_FILE]
    assert format_one(plain, tools=[str(mine)])[0]["tools"] == []
    for tools in ([str(others)], [f"codex={mine}"]):  # another harness's list is none
        assert format_one(asked, tools=tools)[1][0].startswith("no_tool_schemas")


# Rejects: one planted fault, one reason
BAD_CALL = {"id": "c1", "type": "function", "function": {"name": "read_file", "arguments": "{cut"}}
FAULTS = {
    "unknown_role: robot": edited(1, role="robot"),
    "unknown_role: ['user']": edited(1, role=["user"]),
    "missing_text: a user message": edited(1, content_v2="What?") | {"messages": [
        {"role": "user", "content_v2": "What?"}, DONE]},
    "call_without_result: read_file": row(messages=row()["messages"][:3] + row()["messages"][4:3:-1] + [USER, DONE]),
    "call_without_result: read_file, and an answer follows": row(messages=row()["messages"][:3] + [DONE]),
    "result_without_call": edited(3, tool_call_id="c9"),
    "undeclared_tool: rm": edited(2, tool_calls=[call(name="rm")]),
    "missing_argument: read_file path": edited(2, tool_calls=[call() | {"function": {"name": "read_file", "arguments": {}}}]),
    "arguments_not_json: read_file": edited(2, tool_calls=[BAD_CALL]),
    "arguments_not_an_object: read_file": edited(
        2, tool_calls=[call() | {"function": {"name": "read_file", "arguments": [1]}}]),
    "call_without_arguments: read_file": edited(
        2, tool_calls=[call() | {"function": {"name": "read_file", "arguments_v2": {"path": "a.txt"}}}]),
    "calls_as_text: function_calls": edited(2, tool_calls=None, function_calls="read_file(path='a.txt')"),
    "starts_with: assistant": row(messages=row()["messages"][:1] + row()["messages"][2:4] + [USER, DONE]),
    "no_user_message": row(messages=row()["messages"][:1] + row()["messages"][2:]),
    "no_assistant_message": row(messages=[USER]),
    "empty_assistant_message": edited(4, content=""),
    "no_tool_schemas": row(tools=None),
    "not_solved: solved=False": row(meta={"solved": False}),
    "compacted": edited(1, content="<state_snapshot>so far</state_snapshot>"),
    "non_text_content: image_url": edited(1, content=[{"type": "image_url", "image_url": {"url": "x"}}]),
    "non_text_content: int": edited(1, content=[7]),
    "non_text_content: aside": edited(1, content=[{"type": "aside", "text": "not for the model"}]),
    "non_text_content: image": edited(1, content=[{"type": "image", "text": "a.png", "source": {"data": "iVBOR"}}]),
    "non_text_content: images": edited(1, images=["iVBOR"]),  # Ollama
    "non_text_content: videos": row(videos=["a.mp4"]),
    "non_text_content: parts": edited(1, content=[
        {"functionResponse": {"name": "f", "response": {}, "parts": [{"inlineData": {"data": "iVBOR"}}]}}]),
    "non_text_content: rows": edited(3, content={"rows": 42}),
    "lost_content: messages.attached": edited(1, attached="iVBORw0KGgoAAAANSUhEUgAA" * 20),
    "unsupported_flag: assistant_masks": row(assistant_masks=[0, 1]),
    "secret: huggingface-token": row(meta={"env": {"HF_TOKEN": "hf_" + "abcDEF123456" * 3}}),
    "lost_content: messages.note": edited(4, note="It says 42, and no more.") | {"solution": "It says 42, and no more."},
    "lost_content: messages.refusal": edited(4, refusal="I cannot help you with that file."),
    "not_strict_json": row(meta={"x": float("nan")}),
    "missing_text: the first user message is empty": row(messages=[USER | {"content": " "}, DONE]),
    "unsupported_call: to functions.f": row(messages=[USER, DONE | {"recipient": "functions.f", "channel": "commentary"}]),
    "misplaced: a call or a reasoning of a user message": edited(1, reasoning_content="Hm."),
    "misplaced: a call or a reasoning of a tool message": edited(3, tool_calls=[call() | {"function": {"name": "stop"}}]),
    "malformed": row(messages=[{"role": "assistant", "content": "x", "tool_calls": [7]}]),
}  # fmt: skip


def result_of(*messages):
    """The text of the only result of a call that messages answer."""
    [told] = [message for message in messages_of(*row()["messages"][1:3], *messages, DONE) if message["role"] == "tool"]
    return told["content"]


def test_a_result_that_says_more_than_its_content_stays_as_it_is():
    answers = ['{"name": "read_file", "content": "42", "warning": "cut"}', '{"content": "42", "content": "43"}']
    for answer in answers:
        assert result_of({"role": "tool", "content": f"<tool_response>\n{answer}\n</tool_response>"}) == answer
    told = "<tool_response>\n42\n</tool_response>"  # what a file says, say
    assert result_of({"role": "tool", "tool_call_id": "c1", "content": told}) == told
    response = {"output": "42", "status": "cancelled", "code": 3}
    parts = [{"functionResponse": {"name": "read_file", "response": response}}]
    assert json.loads(result_of({"role": "user", "parts": parts})) == response


def test_a_result_finds_its_call_by_the_id_that_it_has():
    calls = {"role": "assistant", "content": "", "tool_calls": [call("a", id="c1"), call("b", id="c2")]}
    for first, second in (("c2", "c1"), ("m8", "m9")):  # tau2's; a message's own, which is no call's
        answers = [{"role": "tool", "id": first, "content": "1"}, {"role": "tool", "id": second, "content": "2"}]
        made = [message["content"] for message in messages_of(USER, calls, *answers, DONE) if message["role"] == "tool"]
        assert made == (["2", "1"] if first == "c2" else ["1", "2"])


def test_messages_of_two_sessions_are_no_conversation():
    for key in ("session_id", "conversation_id", "traj_id"):
        one, other = [USER | {key: "a"}, DONE | {key: "a"}], [USER | {key: "b"}, DONE | {key: "b"}]
        assert format_one(one)[1] == []
        assert format_one(one + other)[1] == [f"several_sessions: by {key}; a file or a row holds one"]


def test_a_column_and_a_key_of_meta_of_one_name_are_both_kept():
    made, reasons = format_one({"messages": [USER, DONE], "resolved": False, "meta": {"resolved": True, "lang": "en"}})
    assert reasons == ["not_solved: resolved=False"]
    assert (made["meta"]["resolved"], made["meta"]["meta_resolved"], made["meta"]["lang"]) == (False, True, "en")


@pytest.mark.parametrize("redact", [False, True])
def test_what_is_nested_too_deep_is_a_reject(redact):
    deep = "bottom"
    for _ in range(600):
        deep = {"path": deep}
    made, [reason] = format_one(edited(2, tool_calls=[call(deep)]), redact=redact)
    assert made is None and reason.startswith("malformed: RecursionError")


SAID = {  # short texts where a reader of the content alone would miss them: index of the message, what it also has
    "text": (4, {"text": "Or 43."}),
    "value": (1, {"value": "Now."}),
    "content.thinking": (4, {"content": [{"type": "text", "text": "It says 42.", "thinking": "Sure?"}]}),
    "thought": (4, {"thought": "Sure?"}),
    "thinking_content": (4, {"thinking_content": "Sure?"}),
    "analysis": (4, {"analysis": "Sure?"}),
    "refusal": (4, {"refusal": "No."}),
    "alternatives": (4, {"alternatives": ["43."]}),
    "error": (3, {"error": "EOF"}),
    "stderr": (3, {"stderr": "warn: x"}),
    "output": (3, {"output": "43"}),
    "tool_calls.explanation": (2, {"tool_calls": [call() | {"explanation": "To see."}]}),
    "tool_calls.function call read_file": (2, {"tool_calls": [call() | {"function": {
        "name": "read_file", "arguments": {"path": "a.txt"}, "input": {"path": "b"}}}]}),
}  # fmt: skip


@pytest.mark.parametrize("path", SAID)
def test_no_text_is_too_short_to_be_lost(path):
    index, more = SAID[path]
    assert format_one(edited(index, **more))[1] == [f"lost_content: messages.{path}"]


def test_each_fault_is_rejected_with_its_reason(tmp_path):
    rows, rejects = format_rows(tmp_path, *FAULTS.values())
    assert rows == []
    for line, reason in enumerate(FAULTS, 1):
        assert rejects[line][0].startswith(reason), (reason, rejects[line])
        assert len(rejects[line]) == 1, rejects[line]


# A line of the real answer follows each kind of ending of GAIR/LIMI's rows
def test_what_follows_the_last_answer_is_cut_counted_and_the_row_kept(tmp_path, capsys):
    told = row()["messages"]
    again = [{"role": "assistant", "content": "", "tool_calls": [call(id="c2")]}]
    answered = [{"role": "tool", "tool_call_id": "c2", "content": "42 and 43"}]
    ends = {
        "answer": told,
        "tool": told[:4] + again + answered,
        "user": told + [{"role": "user", "content": "Thanks."}],
        "question": told + [{"role": "user", "content": stage.NEXT_SPEAKER + " and decide who speaks next."}],
    }
    limi = [{"messages": [told[0], told[1] | {"content": f"What does {name}.txt say?"}, *messages[2:]],
             "tools": [READ_FILE]} for name, messages in ends.items()]  # fmt: skip
    (tmp_path / "limi.json").write_text(json.dumps(limi))
    rows = run_here(tmp_path, tmp_path / "limi.json", near_duplicate=2)
    assert [len(made["messages"]) for made in rows] == [5, 5, 5, 5]
    assert rows[1]["messages"][4] == again[0]
    assert all(made["messages"][-1]["role"] == "assistant" for made in rows)
    assert "2 rows: what follows the last answer was cut" in capsys.readouterr().out
    rows = run_here(tmp_path, tmp_path / "limi.json", near_duplicate=2, reject_unfinished=True)
    assert [made["messages"][1]["content"] for made in rows] == ["What does answer.txt say?", "What does question.txt say?"]


def test_rows_as_limi_released_them_are_corrected():
    """Tools in the system prompt, no call ids, one turn in two, a turn no model wrote, a helper's question."""
    listed = (
        "\n\nYou have access to the following tools:\n\n1. **read_file**: Read a file.\n   Parameters:\n   - path (string)\n"
        "\n\n1. **Answer** in French.\n- Be brief."
    )
    asked = {key: value for key, value in call(id="").items() if key != "id"}
    made = messages_of(
        {"role": "system", "content": "Be brief." + listed},
        {"role": "user", "content": "This is the SII Cli."},
        {"role": "assistant", "content": stage.CONTEXT_ANSWER},
        USER,
        {"role": "assistant", "content": "I look."},
        {"role": "assistant", "content": "", "tool_calls": [asked | {"id": ""}]},
        {"role": "tool", "tool_call_id": "read_file-1", "content": "42"},
        DONE,
        {"role": "user", "content": stage.NEXT_SPEAKER + "..."},
    )
    system = {"role": "system", "content": "Be brief.\n\n1. **Answer** in French.\n- Be brief.\n\nThis is the SII Cli."}
    look = {"role": "assistant", "content": "I look.", "tool_calls": [call(id="call_0")]}
    assert made == [system, USER, look, {"role": "tool", "tool_call_id": "call_0", "content": "42"}, DONE]


# Checks of calls
FAILING = [
    "ValueError: bad", "ModuleNotFoundError: No module named 'x'", "KeyError: 'a'", "AssertionError",
    "Traceback (most recent call last):\n  File", "builtins.TypeError: f() missing 1 required argument",
    "Error: no such file", "error: unknown option", "ERROR    boom", "fatal: not a git repository", "npm ERR! code 1",
    "<tool_use_error>File has not been read</tool_use_error>", "Unknown tool x", "no tool named cat", "Killed",
    "Command timed out after 120 s", "bash: foo: command not found", "cat: x: No such file or directory",
    "ls: cannot access 'x'", "Permission denied", "File not found: x", "exit_code=1", "Exit code: 2", "[exited with code 127]",
    '{"exit_code": 1, "output": ""}', "<returncode>1</returncode>\n<output></output>", "2 failed, 3 passed in 0.1s",
    "Output: x\nExit Code: 1", "FAILED tests/test_a.py::test_b", "Invalid arguments for tool", "1 error in 0.2s",
    "skill is a built-in tool that is disabled by default", "The path does not exist",
]  # fmt: skip
SUCCEEDING = [
    "No errors found", "0 failed, 3 passed", "Output: ok\nError: (none)\nExit Code: 0", "42", "", "ok",
    "<returncode>0</returncode>\n<output>error handling is in a.py</output>", "exit code 0: Traceback printed",
    "def f():\n    raise ValueError('x')", "except KeyError as error:\n    pass", "a list of errors is in err.md",
    "3 passed in 0.1s", "The failed attempts are described below", "# Errors and exceptions",
]  # fmt: skip


@pytest.mark.parametrize("answer", FAILING)
def test_a_failure_is_seen(answer):
    assert stage.failed(answer)


@pytest.mark.parametrize("answer", SUCCEEDING)
def test_a_success_is_none(answer):
    assert not stage.failed(answer)


def test_a_bad_call_that_the_agent_repaired_stays(tmp_path):
    messages = row()["messages"]
    wrong = [
        {"role": "assistant", "content": "", "tool_calls": [call(name="cat", id="c0")]},
        {"role": "tool", "tool_call_id": "c0", "content": "Error: no tool named cat"},
    ]
    rows, rejects = format_rows(
        tmp_path, row(messages=messages[:2] + wrong + messages[2:]), row(messages=messages[:2] + wrong + messages[4:])
    )
    assert len(rows) == 1 and rejects == {2: ["undeclared_tool: cat"]}
    made, _ = format_one(row(messages=messages[:2] + wrong + messages[2:]), weight_bad_calls=0)
    assert [m.get("weight") for m in made["messages"] if m["role"] == "assistant"] == [0, None, None]


def repeated(answers, paths=("a.txt",)):
    """A row whose calls get these results."""
    messages = row()["messages"]
    for number, answer in enumerate(answers):
        asked = [call(paths[number % len(paths)], id=f"r{number}")]
        messages[-1:-1] = [
            {"role": "assistant", "content": "", "tool_calls": asked},
            {"role": "tool", "tool_call_id": f"r{number}", "content": answer},
        ]
    return row(messages=messages)


LOOPS = {
    "the same failure three times": (["Error: no such file"] * 3, ["a.txt"], True),
    "twice": (["Error: no such file"] * 2, ["a.txt"], False),
    "with the time in it": ([f"12:00:0{n} Error: no such file\nerror: 1" for n in range(3)], ["a.txt"], True),
    "two in turn": (["Error: no such file"] * 6, ["a.txt", "b.txt"], True),
    "a success nine times": (["Exit Code: 0"] * 9, ["a.txt"], False),
    "a success ten times": (["Exit Code: 0"] * 10, ["a.txt"], True),
    "a text about errors": (["# errors of all kinds"] * 4, ["a.txt"], False),
}


@pytest.mark.parametrize("case", LOOPS)
def test_loops(case):
    answers, paths, is_loop = LOOPS[case]
    _, reasons = format_one(repeated(answers, paths))
    assert reasons == ["loop: read_file"] * is_loop


# Outcomes and columns
@pytest.mark.parametrize(
    ("columns", "reason"),
    [({"resolved": False}, "resolved=False"), ({"resolved": 0}, "resolved=0"), ({"resolved": -1}, "resolved=-1"),
     ({"resolved": 1}, None), ({"target": False}, "target=False"), ({"target": "the answer"}, None), ({"target": "No"}, None), ({"reward": 0.0}, "reward=0.0"),
     ({"reward": 0.3}, None), ({"exit_status": "exit_cost"}, "exit_status=exit_cost"), ({"exit_status": "submitted"}, None),
     ({"finish_reason": "length"}, "finish_reason=length"), ({"result": "AgentTimeoutError"}, "result=AgentTimeoutError"),
     ({"result": "The tests passed."}, None), ({"success": "false"}, "success=false"), ({"passed": None}, None),
     ({"test_result": {"report": {"resolved": False}}}, "test_result.report.resolved=False"),
     ({"is_correct": False}, "is_correct=False"), ({"task_success": "no"}, "task_success=no"), ({"todo": {"completed": 0}}, None),
     ({"final_reward": "0.0"}, "final_reward=0.0"), ({"exit_code": 1}, "exit_code=1"), ({"exit_status": 0}, None),
     ({"stop_reason": "max_tokens"}, "stop_reason=max_tokens"), ({"status": "failed"}, "status=failed"),
     ({"status": 200}, None), ({"outcome": "not solved"}, "outcome=not solved"), ({"verdict": "incorrect"}, "verdict=incorrect"),
     ({"resolved_status": "RESOLVED_NO"}, "resolved_status=RESOLVED_NO"), ({"error": "it broke"}, "error=it broke"),
     ({"error": None}, None), ({"error": "none"}, None), ({"error": {"message": "m"}}, "error={'message': 'm'}"), ({"finish_reason": "tool-calls"}, None),
     ({"finish_reason": "unknown"}, None), ({"result": "A failure of the old code was found"}, None),
     ({"isResolved": False}, "isResolved=False"), ({"tests_passed": 0}, "tests_passed=0"), ({"pass@1": 0.0}, "pass@1=0.0"),
     ({"success_rate": 0}, "success_rate=0"), ({"accepted": False}, "accepted=False"), ({"timed_out": True}, "timed_out=True"),
     ({"has_error": True}, "has_error=True"), ({"has_error": False}, None), ({"termination": "max_turns"}, "termination=max_turns"),
     ({"exit_reason": "timeout"}, "exit_reason=timeout"), ({"final_status": "FAIL"}, "final_status=FAIL"),
     ({"status": "error: no memory"}, "status=error: no memory"), ({"status": "open"}, None), ({"timeout": 300}, None),
     ({"exception_info": {"type": "E"}}, "exception_info={'type': 'E'}"), ({"failure_mode": "unset"}, None),
     ({"metadata": '{"resolved": false}'}, "metadata.resolved=False"), ({"config": {"error": "raise"}}, None),
     ({"completed": False}, "completed=False"), ({"finish_reason": "eos_token"}, None), ({"termination_reason": "user_stop"}, None),
     ({"resolved": 1, "gen_tests_correct": 0.0, "api_error": "once"}, None), ({"label": False}, "label=False"), ({"label": 0}, None), ({"n_failed": 0}, None), ({"score": 0}, None)],
    ids=str,
)  # fmt: skip
def test_outcomes_of_a_log(columns, reason):
    assert format_one(row(**columns))[1] == ([f"not_solved: {reason}"] if reason else [])
    assert format_one(row(**columns), keep_failed=True)[1] == []


def test_every_column_goes_into_meta_and_can_be_asked_for(tmp_path):
    records = [
        row(query_id=None, instance_id=f"task{n}", steps=n, source="lab", extra={"lang": "python" if n else "c"},
            messages=edited(4, content=f"It says {n}.")["messages"])
        for n in range(4)
    ]  # fmt: skip
    rows = format_rows(tmp_path, *records, good=False)[0]
    assert [made["query_id"] for made in rows] == ["task0", "task1", "task2", "task3"]
    assert rows[1]["meta"] == {
        "source": f"{tmp_path}/in.jsonl:2", "format": "row", "instance_id": "task1", "steps": 1,
        "query_source": "lab", "extra": {"lang": "python"},
    }  # fmt: skip
    for where, kept in (
        (["steps>1"], [2, 3]), (["steps!=1"], [0, 2, 3]), (["steps=1", "steps=3"], [1, 3]), (["steps<3", "steps>0"], [1, 2]),
        (["extra.lang=python", "steps<2"], [1]), (["instance_id=task3"], [3]), (["query_id=task3"], [3]),
    ):  # fmt: skip
        made = format_rows(tmp_path, *records, good=False, where=where)[0]
        assert [one["meta"]["steps"] for one in made] == kept, where
    with pytest.raises(stage.InputError, match="--where colour: no row has such a column"):
        format_rows(tmp_path, *records, where=["colour=red"])
    with pytest.raises(stage.InputError, match="--where steps"):
        format_rows(tmp_path, *records, where=["steps"])


def test_columns_come_in_the_same_order_in_every_run():
    made = format_one(dump([USER], DONE) | {"steps": 3, "lang": "c", "author": "ann", "kind": "x", "level": 1})[0]
    assert list(made["meta"]) == ["source", "format", "author", "finish_reason", "kind", "lang", "level", "model", "steps"]


def test_tokens_are_counted_by_the_chat_template_to_the_end(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    words.enable_truncation(3)
    words.save(str(tmp_path / "tokenizer.json"))
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }} {% endfor %}"
    told = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "[UNK]"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(told | {"chat_template": template}))
    chat = {"messages": [USER, DONE | {"content": "It is done."}]}  # user: Go. assistant: It is done.
    made, reasons = format_one(chat, tokenizer=str(tmp_path))
    assert reasons == [] and made["meta"]["n_tokens"] == 6
    assert format_one(chat, tokenizer=str(tmp_path), max_length=5)[1] == ["over_long: 6 tokens"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(told))
    with pytest.raises(stage.InputError, match="has no chat template"):
        format_one(chat, tokenizer=str(tmp_path))


def test_queries_tie_a_row_to_its_task(tmp_path):
    task = {"query_id": "gomoku", "domain": "vibe_coding", "source": "real", "turns": [{"query": "What does a.txt\nsay?"}]}
    longer = {"query_id": "long", "domain": "research", "turns": [{"query": "Find every paper about rowing."}]}
    queries = write(tmp_path / "queries.jsonl", task, longer)
    wrapped = edited(1, content="<env>linux</env>\nFind every paper about rowing. Please.")
    rows = format_rows(tmp_path, row(), wrapped, row(query_id="gomoku", messages=[USER, DONE]), queries=str(queries))[0]
    found = [(made["query_id"], made["meta"].get("domain"), made["meta"].get("query_source")) for made in rows]
    assert found == [("gomoku", "vibe_coding", "real"), ("long", "research", None), ("gomoku", "vibe_coding", "real")]
    asked = ["Find every paper about rowing.", "Find every paper about rowing. Then sort\u2028them by year."]
    tasks = [{"query_id": query_id, "turns": [{"query": query}]} for query_id, query in zip("ab", asked)]
    queries.write_text("".join(json.dumps(task, ensure_ascii=False) + "\n" for task in tasks))
    made = format_one(edited(1, content=f"<task>{asked[1]}</task>"), queries=str(queries))[0]
    assert made["query_id"] == "b"  # one task's text may begin as another's


# Secrets
SHAPES = json.loads((Path(__file__).parent / "fixtures/secret_shapes.json").read_text())


def test_without_its_package_no_row_passes_unsearched(monkeypatch):
    monkeypatch.setitem(sys.modules, "pybetterleaks", None)
    with pytest.raises(stage.InputError, match="pip install pybetterleaks==0.6.2"):
        format_each([row()])


@pytest.mark.parametrize("place", ["result", "argument"])
def test_a_key_of_each_shape_is_found_and_redacted(place):
    keys = {name: "".join(pieces) for name, pieces in SHAPES["secrets"].items()}
    records = []
    for key in keys.values():
        in_result, in_argument = edited(3, content=f"a\n{key}\nb"), edited(2, tool_calls=[call(path=f"x\n{key}\n")])
        records.append(in_result if place == "result" else in_argument)
    found = dict(zip(keys, [reasons for _, reasons in format_each(records)]))
    assert [name for name, reasons in found.items() if not reasons or not reasons[0].startswith("secret: ")] == []
    redacted = dict(zip(keys, format_each(records, redact=True)))
    for name, (made, reasons) in redacted.items():
        assert reasons == [] and max(keys[name].splitlines(), key=len) not in json.dumps(made), name
    assert format_each([made for made, _ in redacted.values()]) == [(made, []) for made, _ in redacted.values()]


def test_a_key_in_a_json_text_that_was_cut_is_replaced_to_its_end():
    body = r"\n".join(["MIIEvQIBADANBgkqhkiG9w0BAQEFAASCBKcwggSjAgEAAoIBAQDGq3kT1"] * 3)
    told = '{"private_key": "-----BEGIN PRIVATE ' + r"KEY-----\n" + body
    assert format_one(edited(3, content=told))[1] == ["secret: private-key-cut"]
    made, reasons = format_one(edited(3, content=told), redact=True)
    assert reasons == [] and made["messages"][3]["content"] == '{"private_key": "<private-key-cut>'


def test_ordinary_text_is_no_secret():
    texts = ["".join(pieces) for pieces in SHAPES["innocent"]]
    found = zip(texts, format_each([edited(1, content=text) for text in texts]))
    assert [(text, reasons) for text, (_, reasons) in found if reasons] == []


def test_private_names_go_everywhere_and_file_names_stay():
    place = edited(2, content="ask ann.b@corp.example or git@github.com:a/b, react@18.2.0, lodash@4.17.cjs, logo@2x.png")
    place["messages"][2]["tool_calls"] = [call("/home/ann/a.txt")]
    place["messages"][3]["content"] = r"C:\Users\ann\a.txt C:\\Users\\ann\\a.txt /Users/ann/b"
    place["meta"] = {"source": "/home/ann/logs/1.json"}
    made, reasons = format_one(place, redact=True)
    assert reasons == []
    kept = "ask user@example.com or git@github.com:a/b, react@18.2.0, lodash@4.17.cjs, logo@2x.png"
    assert made["messages"][2]["content"] == kept
    assert made["messages"][2]["tool_calls"][0]["function"]["arguments"] == {"path": "/home/user/a.txt"}
    assert made["messages"][3]["content"] == r"C:\Users\user\a.txt C:\\Users\\user\\a.txt /Users/user/b"
    assert "ann" not in json.dumps(made)


def test_names_in_the_mail_of_a_numbered_host_and_in_claude_code_s_folders_go_too():
    told = "mail zhang@163.com, li@21cn.com; @vue/cli@5.0.8, icon@3x.tiff; /home/ann/.claude/projects/-home-ann-site/1.jsonl"
    made = format_one(edited(2, content=told), redact=True)[0]
    assert made["messages"][2]["content"] == (
        "mail user@example.com, user@example.com; @vue/cli@5.0.8, icon@3x.tiff; "
        "/home/user/.claude/projects/-home-user-site/1.jsonl")  # fmt: skip


# Rows against rows
def essay(start, last):
    return edited(4, content="\n".join([f"line {n} of a long answer" for n in range(start, start + 40)] + [last]))


def test_of_near_duplicates_the_longer_one_stays(tmp_path):
    a, b, b2 = essay(0, "a"), essay(20, "b"), essay(20, "c")
    source = f"{tmp_path}/in.jsonl"
    rows, rejects = format_rows(tmp_path, a, b, b2)  # a shares half of b's lines, and had them first
    assert len(rows) == 2 and rejects == {3: [f"near_duplicate: of {source}:2"]}
    longer = essay(0, "a")
    longer["messages"] += [USER, DONE]
    rows, rejects = format_rows(tmp_path, a, longer)
    assert len(rows) == 1 and rejects == {1: [f"near_duplicate: of {source}:2"]}
    assert len(format_rows(tmp_path, b, b2, near_duplicate=2)[0]) == 2


def test_two_tasks_with_the_same_commands_are_none(tmp_path):
    def work(name):
        made = repeated([f"{name}: result {n}" for n in range(9)], [f"{n}.txt" for n in range(9)])
        made["messages"][1]["content"] = f"Please look after {name}."
        return made

    assert len(format_rows(tmp_path, work("the boats"), work("the oars"))[0]) == 2


def test_ids_make_no_difference_between_two_conversations(tmp_path):
    other = json.loads(json.dumps(row()).replace('"c1"', '"toolu_9"'))
    assert format_rows(tmp_path, row(), other)[1] == {2: [f"duplicate: of {tmp_path}/in.jsonl:1"]}


def test_a_column_without_messages_is_passed_over():
    for column in ("conversations", "dialogue", "chat"):
        assert format_one({"messages": [], column: [USER, DONE]})[0]["messages"] == [USER, DONE]


def test_equal_conversations_are_duplicates(tmp_path):
    rows, rejects = format_rows(tmp_path, row(), row(query_id="q2"))
    assert [made["query_id"] for made in rows] == ["q1"]
    assert rejects == {2: [f"duplicate: of {tmp_path}/in.jsonl:1"]}


PROMPT = "Please write down how many green bottles were standing on the old wall of the garden in May"
OVERLAPS = {
    "upper case": (PROMPT.upper(), True),
    "full width": ("".join(chr(ord(c) + 0xFEE0) if "!" <= c <= "~" else c for c in PROMPT), True),
    "zero width": (PROMPT.replace("e", "e\u200b"), True),
    "underlined": (PROMPT.replace(" ", " _").replace(" _", " _", 3), True),
    "thirteen words": (" ".join(PROMPT.split()[2:15]), True),
    "twelve words": (" ".join(PROMPT.split()[2:14]), False),
    "a short task in a long prompt": ("Do this first: count the red boats today, then go.", True),
    "Chinese with a prefix": ("任务：请写一个程序计算湖上所有红色小船的数量", True),
    "another": ("What does a.txt say?", False),
}


@pytest.mark.parametrize("case", OVERLAPS)
@pytest.mark.parametrize("role", [0, 1, 3])
def test_a_benchmarks_task_is_found_whoever_says_it(case, role, tmp_path):
    tasks = [{"query": PROMPT}, {"query": "Count the red boats today."}, {"query": "请写一个程序计算湖上所有红色小船的数量"}]
    text, found = OVERLAPS[case]
    settings = {"benchmark": [str(write(tmp_path / "tasks.jsonl", *tasks))]}
    assert format_one(edited(role, content=text), **settings)[1] == ["benchmark_overlap: tasks.jsonl"] * found


def test_a_benchmarks_task_is_found_in_a_call_and_a_reasoning_and_an_empty_line_hides_none(tmp_path):
    tasks = write(tmp_path / "tasks.jsonl", {"query": "请写一个程序计算湖上所有红色小船的数量"}, {"query": PROMPT})
    tasks.write_text(tasks.read_text() + "\n")
    packed = tmp_path / "packed.jsonl.gz"
    packed.write_bytes(gzip.compress(json.dumps({"query": PROMPT}).encode() + b"\n"))
    assert format_one(edited(1, content=PROMPT), benchmark=[str(packed)])[1] == ["benchmark_overlap: packed.jsonl.gz"]
    faults = [edited(2, reasoning_content=PROMPT), edited(2, tool_calls=[call(PROMPT)]), edited(1, content="请写一个程序计算湖上所有红色小船的数量")]
    assert [reasons for _, reasons in format_each(faults, benchmark=[str(tasks)])] == [["benchmark_overlap: tasks.jsonl"]] * 3


def selected(folder, **settings):
    records = []
    for n in range(30):
        meta = {"domain": "research" if n % 3 == 0 else "vibe_coding", "difficulty": n % 2}
        records.append(edited(4, content=f"It says {n}.") | {"query_id": f"q{n}", "meta": meta})
    return {r["query_id"] for r in format_rows(folder, *records, good=False, **settings)[0]}


def test_selection_is_nested_stratified_and_seeded(tmp_path):
    six, twelve = selected(tmp_path, max_samples=6), selected(tmp_path, max_samples=12)
    assert six < twelve and six == selected(tmp_path, max_samples=6)
    assert [sum(int(id[1:]) % 3 == 0 for id in ids) for ids in (six, twelve)] == [2, 4]
    assert twelve != selected(tmp_path, max_samples=12, seed=1)
    assert selected(tmp_path, where=["domain=research"]) == {f"q{n}" for n in range(0, 30, 3)}


# SII logs and dumps
SII_MESSAGES = [
    {"role": "user", "parts": [{"text": "This is the SII Cli."}]},
    {"role": "model", "parts": [{"text": stage.CONTEXT_ANSWER}]},
    {"role": "user", "parts": [{"text": "What does a.txt say?"}]},
    {"role": "model", "parts": [{"text": "Read it.", "thought": True}, {"text": "I look."}]},
    {"role": "model", "parts": [{"functionCall": {"name": "read_file", "args": {"path": "a.txt"}}},
                                {"functionCall": {"name": "read_file", "args": {"path": "b.txt"}}}]},
    {"role": "user", "parts": [
        {"functionResponse": {"name": "read_file", "response": {"output": "42"}}},
        {"functionResponse": {"id": "x", "name": "read_file", "response": {"error": "Error: no such file"}}}]},
    {"role": "model", "parts": [{"text": "It says 42."}]},
]  # fmt: skip
NEXT_SPEAKER = {"role": "user", "parts": [{"text": stage.NEXT_SPEAKER + " (your last turn)"}]}
GEMINI_TOOL = READ_FILE["function"] | {
    "parameters": {"type": "OBJECT", "properties": {"path": {"type": "STRING"}}, "required": ["path"]}
}


def sii_request(messages, *functions):
    request = {
        "system_instruction": "You are an agent.",
        "messages": messages,
        "tools": [{"functionDeclarations": list(functions)}][: len(functions)],
    }
    return {"type": "api_request_full", "data": {"full_request": request}}


SII = {"id": "s", "events": [
    {"type": "start"}, sii_request(SII_MESSAGES[:3], GEMINI_TOOL), sii_request(SII_MESSAGES[:6], GEMINI_TOOL),
    sii_request([*SII_MESSAGES, NEXT_SPEAKER]), sii_request([NEXT_SPEAKER] * 20)]}  # fmt: skip


def test_the_longest_request_of_an_sii_log_counts():
    made, reasons = format_one(SII)
    assert reasons == [] and made["tools"] == [READ_FILE] and made["query_id"] == "s"
    calls = [call("a.txt", id="call_0"), call("b.txt", id="call_1")]
    assert made["messages"] == [
        {"role": "system", "content": "You are an agent.\n\nThis is the SII Cli."},
        {"role": "user", "content": "What does a.txt say?"},
        {"role": "assistant", "content": "I look.", "reasoning_content": "Read it.", "tool_calls": calls},
        {"role": "tool", "tool_call_id": "call_0", "content": "42"},
        {"role": "tool", "tool_call_id": "call_1", "content": "Error: no such file"},
        {"role": "assistant", "content": "It says 42."},
    ]
    without_check = format_one({"events": SII["events"][:3]})
    assert without_check[0]["messages"][-1]["tool_calls"] == calls and without_check[1] == []
    for text, reasons in (("What does a.txt say?", []), ("An answer that no request repeats.", ["lost_content: data.text"])):
        event = {"type": "api_response", "data": {"text": text}}
        assert format_one(SII | {"events": [*SII["events"], event]})[1] == reasons


def dump(messages, response, tools=(READ_FILE,)):
    return {
        "request": {"model": "m", "messages": messages, "tools": list(tools)},
        "response": {"choices": [{"message": response, "finish_reason": "stop"}]},
    }


def test_dumps_of_two_sessions_with_the_same_query(tmp_path):
    """Requests are grouped by their whole conversation, whatever their system prompt; helpers have no tools."""
    system, user, look, result, answer = row()["messages"]
    other = {"role": "assistant", "content": "I cannot."}
    later = system | {"content": "You are an agent. It is late."}
    folder = tmp_path / "dumps"
    write(folder / "1.json", dump([system, user], look))
    write(folder / "2.json", dump([system, user], other))
    write(folder / "3.json", dump([later, user, look | {"content": "I look. "}, result], answer))
    write(folder / "4.json", dump([system, user, look, result, answer, user], other, tools=[]))
    assert run(folder, cwd=tmp_path).returncode == 0
    rows = read(tmp_path / "data/train.jsonl")
    assert [[m["content"] for m in r["messages"]] for r in rows] == [
        ["You are an agent.", "What does a.txt say?", "I cannot."],
        ["You are an agent. It is late.", "What does a.txt say?", "I look. ", "42", "It says 42."],
    ]
    rejects = read(tmp_path / "data/train.rejected.jsonl")
    assert [(Path(r["source"]).name, r["reasons"][0][:21]) for r in rejects] == [("4.json", "request_without_tools")]


def test_a_reasoning_that_only_an_earlier_dump_holds_is_given_back(tmp_path):
    """Most clients send no reasoning again; in the Responses API it is an item of its own."""
    thought = {"role": "assistant", "content": "I look.", "reasoning_content": "Read it.", "tool_calls": [call()]}
    sent = {key: value for key, value in thought.items() if key != "reasoning_content"}
    result = {"role": "tool", "tool_call_id": "c1", "content": "42"}
    chat = [dump([USER], thought), dump([USER, sent, result], DONE)]
    for record in chat:  # as a proxy logs them, too
        record["request"] = {"url": "u", "body": json.dumps(record["request"])}
    text = {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "I look."}]}
    asked = {"type": "function_call", "call_id": "c1", "name": "read_file", "arguments": json.dumps({"path": "a.txt"})}
    items = [{"type": "reasoning", "summary": [{"type": "summary_text", "text": "Read it."}]}, text, asked]
    again = [USER, text, asked, {"type": "function_call_output", "call_id": "c1", "output": "42"}]
    responses = []
    for given, output in ((USER["content"], items), (again, [text | {"content": [{"type": "output_text", "text": "Done."}]}])):
        request = {"tools": [READ_FILE["function"] | {"type": "function"}], "input": given}
        responses.append({"request": request, "response": {"output": output, "status": "completed"}})
    for records in (chat, responses):
        [made] = run_here(tmp_path, write(tmp_path / "in.jsonl", *records))
        assert made["messages"] == [USER, thought, result, DONE]


def test_dumps_of_anthropic_and_of_responses():
    body = {"system": "Be brief.", "tools": [{"name": "read_file", "input_schema": {}}], "messages": [USER]}
    body["metadata"] = {"user_id": json.dumps({"device_id": "0123456789abcdef" * 4, "account": ""})}  # Claude Code's
    wire = {"request": {"url": "https://api.anthropic.com/v1/messages?beta=true", "body": body}, "response": {"body": json.dumps({"content": [
        {"type": "text", "text": "Done."}], "stop_reason": "end_turn"})}}  # fmt: skip
    items = [{"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "Done."}]}]
    responses = {"request": {"instructions": "Be brief.", "tools": [READ_FILE["function"] | {"type": "function"}],
                             "input": "Go."}, "response": {"output": items, "status": "completed"}}  # fmt: skip
    for record in (wire, responses):
        made, reasons = format_one(record)
        assert reasons == [] and made["messages"] == [{"role": "system", "content": "Be brief."}, USER, DONE]
    assert format_one(wire)[0]["meta"]["request_metadata"] == body["metadata"]
    wire["response"] = {"body": {"content": [{"type": "text", "text": "Do"}], "stop_reason": "max_tokens"}}
    assert format_one(wire)[1] == ["not_solved: finish_reason=max_tokens"]
    told = {"contents": [{"role": "user", "parts": [{"text": "Go."}]}], "systemInstruction": {"parts": [{"text": "Be brief."}]},
            "tools": [{"functionDeclarations": [GEMINI_TOOL]}]}  # fmt: skip
    answer = {"content": {"role": "model", "parts": [{"text": "Done."}]}, "finishReason": "STOP"}
    made, reasons = format_one({"request": told, "response": {"candidates": [answer]}})
    assert reasons == [] and made["messages"] == [{"role": "system", "content": "Be brief."}, USER, DONE]
    assert made["tools"] == [READ_FILE]
    assert format_one({"request": told, "response": {"candidates": [answer], "error": {"code": 500}}})[1] == [
        "unfinished: the last request failed"]  # fmt: skip
    ollama = {"request": {"messages": [USER], "tools": [READ_FILE]}, "response": {"message": DONE, "done_reason": "stop"}}
    assert format_one(ollama)[0]["messages"] == [USER, DONE]
    legacy = dump([USER], DONE)
    legacy["request"]["functions"] = [tool["function"] for tool in legacy["request"].pop("tools")]
    assert format_one(legacy)[0]["tools"] == [READ_FILE]
    responses["request"]["previous_response_id"] = None
    assert format_one(responses)[1] == []
    responses["request"]["previous_response_id"] = "resp_1"
    assert format_one(responses)[1] == ["history_elsewhere: the provider keeps what came before"]


def test_many_dumps_in_one_file_are_read_twice_and_no_more(tmp_path, monkeypatch):
    lines = [dump([USER, DONE, {"role": "user", "content": str(n)}], DONE | {"content": f"Answer {n}."}) for n in range(50)]
    path = write(tmp_path / "dumps.jsonl", *lines)
    opened = []
    real = stage.json_lines
    monkeypatch.setattr(stage, "json_lines", lambda *given: opened.append(given[0]) or real(*given))
    assert len(run_here(tmp_path, path)) == 50 and opened == [path, path]


# Files and runs
def test_02_is_idempotent(tmp_path):
    records = [
        row(), {"messages": [{"role": "assistant", "content": "Hi!"}, USER, DONE]},
        {"conversations": SPELLINGS["Hermes"], "tools": [READ_FILE], "source": "x", "format": "y"},
        edited(1, content="a\ud83d b") | {"meta": {"solved": True, "source": "s", "format": "episode"}},
        row(messages=row()["messages"][:4]), repeated(["Error: no such file"] * 2),
    ]  # fmt: skip
    for redact in (False, True):
        first = format_rows(tmp_path, *records, good=False, near_duplicate=2, redact=redact)[0]
        assert len(first) == len(records)
        copied = write(tmp_path / "again.jsonl", *first)
        assert run_here(tmp_path, copied, near_duplicate=2, redact=redact) == first


def test_a_list_of_tools_that_come_from_outside_is_cut_the_first_time(tmp_path):
    told = "You are an agent." + stage.TOOL_LIST + "1. **read_file**: Read a file.\n\n## Rules\nBe brief."
    listed = edited(0, content=told) | {"tools": None}
    made, reasons = format_one(listed, tools=[str(write(tmp_path / "tools.json", {"tools": [READ_FILE]}))])
    assert reasons == [] and made["messages"][0]["content"] == "You are an agent.\n\n## Rules\nBe brief."
    assert format_one(made) == (made, [])


def test_half_an_emoji_is_replaced():
    made, _ = format_one(edited(3, content="a\ud83d b \ud83d\ude00"))
    assert made["messages"][3]["content"] == "a\ufffd b \U0001f600"


def test_files_of_all_kinds(tmp_path):
    import pyarrow.parquet

    folder = tmp_path / "logs"
    write(folder / "a.jsonl", row(messages=[USER, DONE | {"content": "a"}]))
    write(folder / "upper/g.NDJSON", row(messages=[USER, DONE | {"content": "g"}]))
    (folder / "array.json").write_text(json.dumps([row(messages=[USER, DONE | {"content": "b"}])], indent=2))
    (folder / "session.json").write_text(json.dumps([USER, DONE | {"content": "c"}], indent=2))
    (folder / "packed.jsonl.gz").write_bytes(gzip.compress((folder / "a.jsonl").read_bytes().replace(b'"a"', b'"d"')))
    with pyarrow.CompressedOutputStream(str(folder / "packed.jsonl.zst"), "zstd") as file:
        file.write((folder / "a.jsonl").read_bytes().replace(b'"a"', b'"e"'))
    other = edited(2, tool_calls=[call() | {"function": {"name": "read_file", "arguments": {"path": "x", "all": True}}}])
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row(query_id="arrow"), other]), folder / "rows.parquet")
    (folder / "notes.txt").write_text("no log")
    (folder / "cut.json").write_text('{"messages": [')
    linked = tmp_path / "linked"
    write(linked / "f.jsonl", row(messages=[USER, DONE | {"content": "f"}]))
    (linked / "back").symlink_to(folder)
    (folder / "link").symlink_to(linked)
    rows = run_here(tmp_path, folder)
    answers = [made["messages"][-1]["content"] for made in rows]
    assert answers == ["a", "b", "d", "e", "It says 42.", "It says 42.", "c", "f", "g"]
    arrow = next(made for made in rows if made["query_id"] == "arrow")
    assert arrow["messages"] == row()["messages"] and arrow["tools"] == [READ_FILE]
    rejects = {Path(r["source"]).name: r["reasons"][0] for r in read(tmp_path / "data/train.rejected.jsonl")}
    assert rejects["notes.txt"].startswith("not_a_log") and rejects["cut.json"].startswith("unreadable: not valid JSON")


def test_a_line_that_a_kill_cut_is_left_out_and_other_bad_lines_are_rejects(tmp_path, capsys):
    path = write(tmp_path / "in.jsonl", row())
    with open(path, "ab") as file:
        file.write(b'{"messages": \n\0\0\0\n' + json.dumps(row(messages=[USER, DONE])).encode() + b'\n{"messages": [{"ro')
    assert len(run_here(tmp_path, path)) == 2
    [reject] = read(tmp_path / "data/train.rejected.jsonl")
    assert reject["source"] == f"{path}:2" and reject["reasons"][0].startswith("unreadable: line 2 is not valid JSON")
    assert "1 rows: last line cut short: left out" in capsys.readouterr().out


def test_a_key_that_stands_twice_is_no_json(tmp_path):
    twice = '{"messages": [{"role": "user", "content": "Go.", "content": "Stop."}, {"role": "assistant", "content": "Yes."}]}'
    (tmp_path / "logs").mkdir()
    write(tmp_path / "logs/good.jsonl", row())
    (tmp_path / "logs/a.jsonl").write_text(twice + "\n")
    (tmp_path / "logs/b.json").write_text(twice)
    called = edited(2, tool_calls=[call() | {"function": {"name": "f", "arguments": '{"path": "a", "path": "b"}'}}])
    write(tmp_path / "logs/c.jsonl", called)
    assert len(run_here(tmp_path, tmp_path / "logs")) == 1
    column = json.dumps(json.loads(twice.replace(', "content": "Stop."', ""))["messages"]).replace('"Go."', '"Go.", "content": "No."')
    assert format_one(row(conversation=column))[1] == [] and stage.find_format({"messages": column}, []) is None
    a, b, c = [reject["reasons"][0] for reject in read(tmp_path / "data/train.rejected.jsonl")]
    assert a == "unreadable: line 1 is not valid JSON (the key content twice in one object)"
    assert b == "unreadable: not valid JSON (the key content twice in one object)"
    assert c == "arguments_not_json: f"


def test_a_line_that_no_reader_can_take_ends_none_of_the_others(tmp_path):
    two = {"messages": [USER, DONE], "schema_version": "ATIF-v1.7", "steps": [], "history": [USER]}
    errored = {"eval": {}, "samples": None}  # an Inspect log that stopped before its first sample
    path = write(tmp_path / "in.jsonl", row(), two, errored, edited(1, content="What does b.txt say?"))
    assert len(run_here(tmp_path, path)) == 2
    told = [(reject["source"], reject["reasons"]) for reject in read(tmp_path / "data/train.rejected.jsonl")]
    assert told[0] == (f"{path}:2", ["two_readers: atif, swe_agent"])
    assert told[1][0] == f"{path}:3" and told[1][1][0].startswith("malformed: TypeError")


def test_an_archive_is_read_like_a_folder(tmp_path):
    sample = {"id": "q7", "epoch": 1, "input": "Go.", "messages": [USER, DONE | {"content": "As in Inspect."}]}
    with zipfile.ZipFile(tmp_path / "a.eval", "w") as packed:
        packed.writestr("header.json", json.dumps({"eval": {}}))
        packed.writestr("samples/q7_epoch_1.json", json.dumps(sample))
    with zipfile.ZipFile(tmp_path / "b.zip", "w") as packed:
        packed.writestr("logs/rows.jsonl", json.dumps(row()) + "\n" + json.dumps({"messages": [USER, DONE]}) + "\n")
        packed.writestr("logs/c.txt", "no log")
    (tmp_path / "c.zip").write_bytes((tmp_path / "b.zip").read_bytes()[:-40])
    locked = bytearray((tmp_path / "a.eval").read_bytes())
    for start in (m.start() + 6 for m in re.finditer(b"PK\x03\x04", locked)):
        locked[start] |= 1  # asks for a password
    for start in (m.start() + 8 for m in re.finditer(b"PK\x01\x02", locked)):
        locked[start] |= 1
    (tmp_path / "d.eval").write_bytes(locked)
    rows = run_here(tmp_path, *(tmp_path / name for name in ("a.eval", "b.zip", "c.zip", "d.eval")))
    made = [(one["query_id"], one["meta"]["source"], one["meta"]["format"]) for one in rows]
    assert made == [
        ("q7-1", f"{tmp_path}/a.eval/samples/q7_epoch_1.json:1", "inspect_ai"),
        ("q1", f"{tmp_path}/b.zip/logs/rows.jsonl:1", "row"),
        ("rows.jsonl-2", f"{tmp_path}/b.zip/logs/rows.jsonl:2", "row"),
    ]
    rejects = read(tmp_path / "data/train.rejected.jsonl")
    assert [(Path(one["source"]).name, one["reasons"]) for one in rejects] == [
        ("c.txt", ["not_a_log: no suffix of a log"]),
        ("c.zip", ["unreadable: File is not a zip file"]),
        ("q7_epoch_1.json", [rejects[2]["reasons"][0]]),
    ]
    assert "password required" in rejects[2]["reasons"][0]


def test_a_log_without_its_prompt_takes_it_from_the_task_that_its_file_is_named_after(tmp_path):
    init = {"type": "system", "subtype": "init", "session_id": "S", "uuid": "i"}
    answer = {"role": "assistant", "id": "m", "content": [{"type": "text", "text": "Done."}]}
    log = [init, {"type": "assistant", "session_id": "S", "uuid": "a", "message": answer}]
    other = write(tmp_path / "other.jsonl", *log)
    named = tmp_path / "gomoku-1.2.jsonl.gz"
    named.write_bytes(gzip.compress(other.read_bytes()))
    task = {"query_id": "gomoku-1.2", "domain": "vibe_coding", "turns": [{"query": "Write gomoku."}]}
    queries = str(write(tmp_path / "queries.jsonl", task))
    [made] = run_here(tmp_path, named, other, queries=queries)
    assert made["query_id"] == "gomoku-1.2" and made["meta"]["domain"] == "vibe_coding"
    assert made["messages"] == [{"role": "user", "content": "Write gomoku."}, DONE]
    [reject] = read(tmp_path / "data/train.rejected.jsonl")
    assert reject["reasons"][0].startswith("no_prompt: ")


def test_readers_are_files_of_a_folder(tmp_path):
    readers = tmp_path / "readers"
    readers.mkdir()
    (readers / "diary.py").write_text(
        "KINDS = {'note': 'message', 'draw': 'left out: a picture'}\n"
        "LEFT_OUT = {'weather': 'nobody said it'}\n"
        "def fits(record):\n    return isinstance(record, list) and 'diary' in record[0]\n"
        "def read(record):\n"
        "    for note in record[1:]:\n"
        "        if note['type'] not in KINDS:\n            raise ValueError('unknown_kind: ' + note['type'])\n"
        "    notes = [{'role': n['who'], 'content': n['text']} for n in record[1:] if n['type'] == 'note']\n"
        "    return {'messages': notes, 'tools': None, 'meta': {'session_id': 'd1', 'place': record[0]['diary']}}\n"
    )
    notes = [
        {"diary": "home"},
        {"type": "note", "who": "user", "text": "What was the day like today?", "weather": "rain all over the day"},
        {"type": "draw", "text": "a picture that no model has seen"},
        {"type": "note", "who": "assistant", "text": "It was a long and rainy day."},
    ]
    path = write(tmp_path / "diary.jsonl", *notes)
    [made] = run_here(tmp_path, path, readers=str(readers))
    assert made["query_id"] == "d1" and [m["content"] for m in made["messages"]] == [notes[1]["text"], notes[3]["text"]]
    assert made["meta"] == {"source": str(path), "format": "diary", "session_id": "d1", "place": "home"}
    for line, reason in (
        ({"type": "song", "text": "x"}, "unknown_kind: song"),
        (notes[3] | {"text_v2": "and nobody reads this line"}, "lost_content: text_v2"),
    ):
        write(path, *notes[:3], line)
        write(tmp_path / "good.jsonl", row())
        run_here(tmp_path, path, tmp_path / "good.jsonl", readers=str(readers))
        assert read(tmp_path / "data/train.rejected.jsonl")[0]["reasons"] == [reason]
    (readers / "broken.py").write_text("KINDS = 1 +")
    with pytest.raises(stage.InputError, match="broken.py: no reader of logs"):
        run_here(tmp_path, path, readers=str(readers))


def test_tools_seen_prints_a_start_for_ones_own_list(tmp_path):
    path = write(tmp_path / "in.jsonl", row(tools=None))
    result = run(path, "--tools_seen", cwd=tmp_path)
    assert json.loads(result.stdout) == {"row": [{"type": "function", "function": {
        "name": "read_file", "description": "", "parameters": {"type": "object", "properties": {"path": {}}}}}]}  # fmt: skip
    assert not (tmp_path / "data").exists()


def test_rejects_and_settings_lie_beside_their_output(tmp_path):
    path = write(tmp_path / "in.jsonl", row(), row(messages=[USER]))
    assert run(path, "--output_file", "data/a.jsonl", "--seed", "7", cwd=tmp_path).returncode == 0
    files = {file.name for file in (tmp_path / "data").iterdir()}
    assert files == {"a.jsonl", "a.rejected.jsonl", "a.settings.json"}
    record = json.loads((tmp_path / "data/a.settings.json").read_text())
    assert record["settings"]["seed"] == 7 and record["counts"]["rows"] == 1
    assert list(record["inputs"]) == [str(path)] and record["counts"]["rejected"] == {"no_assistant_message": 1}


def test_an_input_is_never_overwritten(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train = write(tmp_path / "data/train.jsonl", row())
    before = train.read_bytes()
    for named in ("data/train.jsonl", "data"):
        assert re.search("data/train.jsonl would be overwritten", mistake(monkeypatch, named))
    assert train.read_bytes() == before
    write(tmp_path / "logs/a.jsonl", row())
    for _ in range(2):  # what an earlier run wrote into a folder of logs is passed over
        stage.main(stage.Settings(output_file="logs/out.jsonl"), argparse.Namespace(inputs=["logs"]))
        assert len(read(tmp_path / "logs/out.jsonl")) == 1


def many(path, count):
    with open(path, "w") as file:
        for number in range(count):
            made = edited(4, content=f"It says {number}. " + "word " * 200)
            file.write(json.dumps(made | {"query_id": f"q{number}"}) + "\n")
    return path


def test_a_killed_run_leaves_nothing(tmp_path):
    """kill -9 at five moments; then the whole run gives all rows."""
    path = many(tmp_path / "in.jsonl", 1500)
    for moment in (0.0, 0.1, 0.3, 0.6, 1.0):
        process = subprocess.Popen([sys.executable, SCRIPT, path], cwd=tmp_path, stdout=subprocess.PIPE, text=True)
        process.stdout.readline()  # "inputs: 1 files": the work begins
        time.sleep(moment)
        process.send_signal(signal.SIGKILL)
        finished = process.wait() == 0
        left = {file.name for file in (tmp_path / "data").glob("*")}
        assert finished or left <= {"train.jsonl", "train.rejected.jsonl", "train.settings.json"}
        assert "train.jsonl" not in left or len(read(tmp_path / "data/train.jsonl")) == 1500
    assert run(path, cwd=tmp_path).returncode == 0 and len(read(tmp_path / "data/train.jsonl")) == 1500


def test_two_runs_of_one_output(tmp_path):
    output = tmp_path / "data/train.jsonl"
    path = write(tmp_path / "in.jsonl", row())
    with stage.only_run(output):
        assert_one_line_error(run(path, cwd=tmp_path), "another run writes", "data/train.jsonl")
        assert run(path, "--output_file", "data/other.jsonl", cwd=tmp_path).returncode == 0
    assert run(path, cwd=tmp_path).returncode == 0


def test_a_full_disk_leaves_nothing_half_written(tmp_path):
    import resource

    path = many(tmp_path / "in.jsonl", 9)
    result = run(path, cwd=tmp_path, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (9_000, 9_000)))
    assert_one_line_error(result, "File too large")
    assert list((tmp_path / "data").iterdir()) == []


def test_names_that_are_not_utf_8(tmp_path):
    path = tmp_path / os.fsdecode(b"caf\xe9.jsonl")
    write(path, row(query_id=None))
    assert run(tmp_path, cwd=tmp_path).returncode == 0
    [made] = read(tmp_path / "data/train.jsonl")
    assert made["query_id"] == "caf-.jsonl-1" and made["meta"]["source"].endswith("caf\ufffd.jsonl:1")


def test_hub_data_sets_are_chosen_by_their_card():
    card = "---\nconfigs:\n- config_name: default\n  data_files: limi.json\n- config_name: big\n  data_files:\n" \
           "  - split: train\n    path: big/train-*.parquet\n  - split: test\n    path: [big/a.json, big/b.json]\n---\n# x"
    assert stage.data_files(card, "x", None, None) == ["limi.json"]
    assert stage.data_files(card, "x", "big", "test") == ["big/a.json", "big/b.json"]
    assert stage.data_files(card, "x", "big", None) == ["big/train-*.parquet", "big/a.json", "big/b.json"]
    with pytest.raises(stage.InputError, match="no configuration small; it has default, big"):
        stage.data_files(card, "x", "small", None)
    with pytest.raises(stage.InputError, match="no split dev in its card; it has train, test"):
        stage.data_files(card, "x", "big", "dev")
    listed = "---\nconfigs:\n- config_name: a\n  data_files: [x.json, y.json]\n- config_name: b\n  default: true\n  data_dir: bb\n---\n"
    assert stage.data_files(listed, "x", "a", None) == ["x.json", "y.json"]
    assert stage.data_files(listed, "x", None, "train")[:2] == ["bb*train*.json*", "bb*train*.jsonl*"]
    assert stage.data_files("# no front matter", "x", None, None)[0] == "**.json*"
    names = {"GAIR/LIMI": ("GAIR/LIMI", None, None, None), "a/b:c/d@e": ("a/b", "c", "d", "e"),
             "hf://datasets/a/b@main": ("a/b", None, None, "main"),
             "https://huggingface.co/datasets/a/b": ("a/b", None, None, None)}  # fmt: skip
    for name, parts in names.items():
        assert stage.HUB_NAME.fullmatch(name).groups() == parts


# Mistakes of the user
BAD_FILES = {
    "deep": ("[" * 100_000, ["unreadable"]),
    "not utf-8": (b"\xff\xfe{", ["unreadable"]),
    "string": ('"text"', ["not_a_log"]),
    "empty": ("", ["unreadable"]),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_file_that_is_no_log(tmp_path, name):
    content, parts = BAD_FILES[name]
    path = tmp_path / "in.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert_one_line_error(run(path, cwd=tmp_path), "no trajectory left of 1", *parts)
    assert not (tmp_path / "data/train.jsonl").exists()


def test_bad_arguments(tmp_path, monkeypatch):
    good = write(tmp_path / "in.jsonl", row())
    write(tmp_path / "bad.json", {"tools": 7})
    write(tmp_path / "tools.json", {"tools": [READ_FILE]})
    (tmp_path / "bad.jsonl").write_text('{"task": "one"}\n{"task": \n{"task": "two"}\n')
    (tmp_path / "latin.jsonl").write_bytes('{"query_id": "café"}'.encode("latin-1"))
    wrong = {
        ("absent.jsonl",): ["absent.jsonl", "no such file"],
        (): ["no inputs"],
        (good, "--tols", "x"): ["--tols"],
        (good, "--tools", "absent.json"): ["absent.json"],
        (good, "--tools", "bad.json"): ["bad.json", "tool schemas"],
        (good, "--max_samples", "0"): ["--max_samples 0"],
        (good, "--max_length", "5"): ["--max_length", "--tokenizer"],
        (good, "--output_file", str(tmp_path)): ["a folder"],
        (good, "--readers", "absent"): ["--readers absent"],
        (good, "--weight_bad_calls", "2"): ["0 or 1"],
        (good, "--queries", "bad.json"): ["--queries bad.json:1"],
        (good, "--queries", "latin.jsonl", "--output_file", "latin.jsonl"): ["latin.jsonl: would be overwritten"],
        (good, "--tools", "row=rows.settings.json", "--output_file", "rows.jsonl"): ["rows.settings.json: would be overwritten"],
        (good, "--benchmark", "bad.jsonl"): ["--benchmark bad.jsonl: unreadable: line 2"],
        (good, "--queries", "latin.jsonl"): ["--queries latin.jsonl:1", "utf-8"],
        (good, "--where", "reward>=1"): ["--where reward>=1", "KEY>NUMBER"],
        (good, "--tools", "tools.json", "tools.json"): ["--tools tools.json: a second list for all formats", "FORMAT=FILE"],
        (good, "--tools", "claude=tools.json"): ["--tools claude=...: no such format", "claude_code"],
    }
    monkeypatch.chdir(tmp_path)
    for arguments, parts in wrong.items():
        told = mistake(monkeypatch, *arguments)
        assert all(part in told for part in parts) and "\n" not in told
    write(tmp_path / "failed.jsonl", row(meta={"solved": False}))
    assert_one_line_error(run("failed.jsonl", cwd=tmp_path), "no trajectory left of 1", "not_solved")
    (tmp_path / "wrong.yaml").write_text("max_samples: [1]\n")
    assert "--max_samples [1]: Input should be a valid integer" in mistake(monkeypatch, good, "--config", "wrong.yaml")
    (tmp_path / "c.yaml").write_text("inputs: in.jsonl\noutput_file: rows.jsonl\nwhere: query_id=q1\n")
    assert run("--config", "c.yaml", cwd=tmp_path).returncode == 0 and len(read(tmp_path / "rows.jsonl")) == 1
