"""Stage 2 on small logs in the shape of real ones and of public bug reports, and on column layouts of public data sets.

The cases lie in ../shared/cases, beside a developer's checkout; each line of their EXPECTED.md is a line of a table here.
"""

import importlib
import json
import re
from collections import Counter
from pathlib import Path

import pytest

stage = importlib.import_module("02_format_trajectories")
CASES = Path(__file__).resolve().parents[2] / "shared/cases"
LOGS, SETS = CASES / "logs", CASES / "sets"
pytestmark = pytest.mark.skipif(not LOGS.exists(), reason="needs ../shared/cases")

# name: texts of the row in their order; "-text": the row must not have it; "reject REASON" instead of a row
EXPECTED = {
    "claude_phantom_parent.jsonl": ["THE TASK: fix the parser", "First part fixed.", "now run the tests", "Tests pass."],
    "claude_progress_fork.jsonl": ["TASK", "part 1 done", "second request", "second done"],
    "claude_progress_last.jsonl": ["Do A", "done"],
    "claude_33651_progress_flushed_last.jsonl": ["TASK", "done"],
    "claude_deadend_last.jsonl": ["TASK", "a.py", "done"],
    "claude_queued_command.jsonl": ["Do A", "ok", "Stop, do B instead", "As you asked, I do B instead."],
    "claude_attachment_file.jsonl": ["Explain @a.py", "print(42)", "It prints 42."],
    "claude_skill_meta.jsonl": ["Launching skill: pdf", "STEP 1 run foo", "Following STEP 1"],
    "claude_local_command.jsonl": ["Do A", "done", "-local-command"],
    "claude_truncated.jsonl": ["Do A", "ok"],
    "claude_stream_json.jsonl": ["Do what the stream does not say", "a.py", "done"],
    "claude_text_between_parallel.jsonl": ["r1", "r2", "quick note", "done"],
    "claude_text_with_result.jsonl": ["r1", "also do C", "done"],
    "claude_text_before_result.jsonl": ["r1", "r2", "steer", "done"],
    "claude_two_text.jsonl": ["part1", "part2"],
    "claude_forward_parent.jsonl": ["TASK", "ctx", "done"],
    "claude_interrupt.jsonl": ["Do A", "[Request interrupted by user", "do B", "B done"],
    "claude_image.jsonl": ["reject non_text_content: image"],
    "claude_redacted.jsonl": ["reject non_text_content: redacted_thinking"],
    "claude_servertool.jsonl": ["reject non_text_content: server_tool_use"],
    "codex_fork.jsonl": ["BASE", "Do A", "A done", "-BASE\\nBASE"],
    "codex_rollback.jsonl": ["Do A", "A done", "Do B", "B done", "-WRONG TURN", "-bad answer"],
    "codex_unknown_kind.jsonl": ["reject unknown_kind: function_call_v2"],
    "codex_compaction_item.jsonl": ["reject compacted"],
    "codex_web.jsonl": ["reject unsupported_call: web_search_call"],
    "codex_ghost.jsonl": ["Do A", "done"],
    "codex_dev_mid.jsonl": ["<permissions instructions>", "A done", "<collaboration_mode>plan", "B done"],
    "codex_local_shell.jsonl": ["Do A", '"local_shell"', "a.py", "done"],
    "codex_old_instructions.jsonl": ["AGENTS TEXT", "Do A", "A done"],
    "codex_exec_json.jsonl": ["reject not_supported: codex exec --json"],
    "codex_abort.jsonl": ["Do A", "aborted", "Do B", "B done"],
    "codex_commentary.jsonl": ["I look", "R1", "exec_command", "done"],
    "codex_output_parts.jsonl": ["Do A", "ok", "done"],
    "codex_ns.jsonl": ["Do A", "ok", "done"],
    "codex_reason_only.jsonl": ["Do A", "R1", "B", "done"],
    "codex_output_image.jsonl": ["reject non_text_content: input_image"],
    "row_tool_list_rules.jsonl": ["## Safety rules\\nNever delete files. Answer in French.", "-1. **bash**"],
    "row_function_call_final.jsonl": ["I call it now", '"name": "bash"', '"command": "ls"'],
    "row_dolci_end.jsonl": ["reject calls_as_text: function_calls"],
    "row_anthropic.jsonl": ["S", "Do A", "look", '"command": "ls"', "a.py", "done"],
    "row_anthropic_textonly.jsonl": ["YOU ARE X", "Do A", "done"],
    "row_system_top.jsonl": ["YOU ARE X", "Do A", "done"],
    "row_reasoning_details.jsonl": ["done", "THINK"],
    "row_thinking_key.jsonl": ["done", "THINK"],
    "row_weight0.jsonl": ['"bad", "weight": 0', "good", '-"good", "weight"'],
    "row_null_meaning.jsonl": ['"assignee": null, "tags": [null, {"x": null}]'],
    "row_null_arg.jsonl": ['"limit": null'],
    "row_plain_chat.jsonl": ["a", "1"],
    "row_resolved_false.jsonl": ["reject not_solved: resolved=False"],
    "row_trajectory_openai.jsonl": ["Do A", "a.py", "done"],
    "row_nebius_swe_agent.jsonl": ["reject not_solved: target=False"],
    "row_ids.jsonl": ["a", "1"],
    "row_conversations_role.jsonl": ["Do A", "analysis"],
    "row_sharegpt.jsonl": ["S", "Do A", "done"],
    "row_apigen_mt.jsonl": ["S", "q", '"name": "f"', "x", "done"],
    "list_of_messages.json": ["Do A", '"command": "ls"', "a.py", "done"],
    "cline_api_conversation_history.json": ["<task>Do A</task>", "<read_file>"],
    "row_flat_tool_calls.jsonl": ["Do A", '"command": "ls"', "a.py", "done"],
    "row_tool_calls_string.jsonl": ["Do A", '"command": "ls"', "a.py", "done"],
    "row_tools_empty_string.jsonl": ["Do A", "done"],
    "row_meta_string.jsonl": ["Do A", "done"],
    "row_task_string.jsonl": ["Do A", "done"],
    "row_domain_list.jsonl": ["a", "1"],
    "row_toucan.jsonl": ["Do A", '"command": "ls"', "a.py", "done"],
    "row_loop_valueerror.jsonl": ["reject loop: calc"],
    "row_repaired_typeerror.jsonl": ["TypeError: calc()", '"a": 1'],
    "row_two_assistants.jsonl": ["first answer\\nsecond answer", "r2"],
    "row_greeting.jsonl": ['"Hi!", "weight": 0', "A", "1"],
    "row_prompt_completion.jsonl": ["q", "a"],
    "row_chosen.jsonl": ["reject not_supported: a preference pair"],
    "row_xlam.jsonl": ["q", '"name": "f"'],
    "row_ipython.jsonl": ["reject result_without_call"],
    "row_messages_hf_toolcall_text.jsonl": ["reject result_without_call"],
    "row_parts.jsonl": ["a\\nb", "1"],
    "row_refusal.jsonl": ["reject empty_assistant_message"],
    "row_schema.jsonl": ["x", "1"],
    "row_tool_no_id_two.jsonl": ['"command": "1"', '"command": "2"', "r1", "r2", "done"],
    "row_tools_builtin.jsonl": ["reject tools_are_no_schemas: web_search_preview"],
    "row_tools_text.jsonl": ["reject tools_are_no_schemas"],
    "openai_batch.jsonl": ["reject not_supported"],
    "openai_batch_in.jsonl": ["reject not_supported"],
    "langsmith_run.jsonl": ["Do A", "done"],
    "langfuse.jsonl": ["Do A", "done"],
    "langchain_messages.jsonl": ["Do A", "done"],
    "otel_genai.jsonl": ["reject no_assistant_message"],
    "tau2_results.json": ["reject not_solved"],
    "goose_export.json": ["Do A", "developer__shell", "a.py", "done"],
    "goose_session.jsonl": ["Do A", "developer__shell", "a.py", "done"],
    "aider.chat.history.md": ["reject not_supported: aider"],
    "inspect_sample.json": ["reject not_solved"],
    "mini_default_agent.traj.json": ["Do A", "look", "hi", "submit"],
    "mini_v2_text.traj.json": ["Do A", "THOUGHT", "echo COMPLETE"],
    "mini_v2_responses.traj.json": ["S", "Do A", '"bash"'],
    "mini_v2_thinking_blocks.traj.json": ["Do A", "x", "T1", "done"],
    "mini_v2_noinfo_config.traj.json": ["Do A", "x"],
    "atif_terminus2.json": ["Fix the bug", "think", "a.py", "Analysis: sure", "mark_task_complete"],
    "atif_terminus2_raw.json": ["Fix the bug", "a.py", "analysis"],
    "atif_sysmid.json": ["S", "t", "a", "hook output", "u", "b"],
    "atif_noid.json": ["t", "a"],
    "atif_cont.json": ["SYS", "THE TASK", "Handoff", "I continue and finish"],
    "atif_image.json": ["hi", "x", "done"],  # its content is a list of texts: there is no image in it
    "openhands_v0.jsonl": ["Do A", "look", "a.py", "finish"],
    "openhands_v0_error.jsonl": ["look", "ERR: bad", "runtime crashed", "finish"],
    "openhands_v0_msg.jsonl": ["I think done?", "Please continue", "finish"],
    "openhands_v0_nonfc.jsonl": ["reject call_not_logged"],
    "openhands_v0_old_pairs.jsonl": ["reject no_assistant_message"],
    "openhands_v0_recall.jsonl": ["Do A", "USE TABS", "look", "a.py"],
    "openhands_v1.jsonl": ["Do A", "EXTRA SKILL INFO", "look", "R", "a.py", "/w", "done", "R2"],
    "openhands_v1_obs_output.jsonl": ["EXTRA SKILL INFO", "OUT", "/w", "done"],
    "openhands_v1_thinking_blocks.jsonl": ["look", "TB", "a.py", "done"],
    "openhands_v1_two_resp.jsonl": ["look", "a.py", "/w", "done"],
    "swe_ok.traj": ["Do A", "look", "a.py", "submit", "-DEMO"],
    "swe_noexit.traj": ["Do A", "look", "a.py", "submit"],
    "swe_thought_action.traj": ["Do A", "DISCUSSION", "a.py", "submit"],
    "swe_reasoning.traj": ["look", "REASON", "a.py"],
    "opencode_ok.json": ["Do A", "look", "R", "a.py", "done"],
    "opencode_no_output.json": ["\"content\": \"\"}", "done", "-null"],
    "opencode_ignored.json": ["Do A", "done"],
    "opencode_revert.json": ["Do A", "A done"],
    "opencode_compaction.json": ["reject compacted"],
    "opencode_run_json.jsonl": ["reject not_supported"],
    "gemini_chat_save.json": ["Do A", "read_file", "x", "done"],
    "gemini_checkpoint.json": ["Do A", "read_file", "x", "done"],
    "qwen_session.jsonl": ["Do A", "look", "hm", "list_directory", "a.py", "done"],
    "gemini_ok.json": ["Do A", "look", "d", "x", "done"],
    "gemini_compressed.jsonl": ["reject compacted"],
    "gemini_cancelled.json": ["reject call_without_result"],
    "gemini_inline.json": ["reject non_text_content: inlineData"],
    "gemini_thought_nosubject.json": ["reject "],
    "dumps_stable.jsonl": ["Do A", "result 0", "result 2", "all done now"],
    "dumps_stripped_history.jsonl": ["Do A", "result 0", "result 2", "all done now"],
    "dumps_multiturn_changing_system.jsonl": ["S time 3", "question 0", "answer 3"],
    "dump_content_filter.jsonl": ["reject not_solved: finish_reason=content_filter"],
    "dump_no_tools.jsonl": ["reject request_without_tools"],
    "dump_responses.jsonl": ["S", "Do A", "done"],
    "dump_claude_trace.jsonl": ["S", "Do A", "done"],
}


READERS = stage.load_readers(stage.HERE / "recipes/logs")
PROMPTLESS = {"query_id": "claude_stream_json", "turns": [{"query": "Do what the stream does not say"}]}


def rows_of(path, tools=None, **settings):
    """[(row, reasons)] of a file; the tools that it calls are given, as a user would with --tools."""
    unit = stage.Unit(path, path.name)
    run = stage.make_run(stage.Settings(tools=tools, **settings))
    if path.stem == PROMPTLESS["query_id"]:
        run.tasks = {path.stem: PROMPTLESS}
    if tools is None:
        seen = stage.tools_seen(stage.read_all([unit], READERS, Counter()))
        run.tools[""] = [schema for schemas in seen.values() for schema in schemas]
    entries = stage.format_all(stage.read_all([unit], READERS, run.notes), run)
    return [(row, reasons) for _, _, row, reasons in entries]


def test_every_case_is_in_the_table():
    assert sorted(EXPECTED) == sorted(path.name for path in LOGS.iterdir() if path.suffix != ".md" or "aider" in path.name)


@pytest.mark.parametrize("name", EXPECTED)
def test_case(name):
    [(made, reasons)] = rows_of(LOGS / name)
    first, *_ = EXPECTED[name]
    if first.startswith("reject "):
        assert reasons and reasons[0].startswith(first[7:])
        return
    assert reasons == []
    text = json.dumps(made["messages"], ensure_ascii=False)
    place = 0
    for part in EXPECTED[name]:
        if part.startswith("-"):
            assert part[1:] not in text
        else:
            place = text.index(part, place)
    called = set(stage.called_names(made["messages"]))
    assert called <= {tool["function"]["name"] for tool in made["tools"]}


def test_a_plain_chat_gets_no_tools():
    for name in ("row_plain_chat.jsonl", "mini_v2_text.traj.json"):
        assert rows_of(LOGS / name, tools=[str(SETS / "TOOLS.json")])[0][0]["tools"] == []


def test_ids_and_columns_of_the_cases():
    made = rows_of(LOGS / "row_ids.jsonl")[0][0]
    assert made["query_id"] == "django__1" and made["meta"]["task_id"] == "t1"
    assert rows_of(LOGS / "codex_fork.jsonl")[0][0]["query_id"] == "S"
    kept = rows_of(LOGS / "row_nebius_swe_agent.jsonl", keep_failed=True)[0][0]
    assert kept["messages"][0] == {"role": "system", "content": "S"} and kept["meta"]["exit_status"] == "submitted"
    schema = json.loads((LOGS / "row_schema.jsonl").read_text())["tools"]
    assert rows_of(LOGS / "row_schema.jsonl")[0][0]["tools"] == schema


# Genuine logs
REAL = CASES.parent / "data/logs"


def turns_of(row):
    """A row's assistant turns as the ground truth writes them; checks the pairing on the way."""
    turns, waiting = [], []
    for message in row["messages"]:
        if message["role"] == "assistant":
            assert not waiting
            calls = message.get("tool_calls", [])
            waiting = [call["id"] for call in calls]
            turns.append({"content": message["content"], "reasoning": message.get("reasoning_content", ""),
                          "tool_calls": [call["function"] for call in calls]})  # fmt: skip
        elif message["role"] == "tool":
            assert message["tool_call_id"] == waiting.pop(0)
    return turns


def truth(name, reasoning=True):
    turns = []
    for turn in json.loads((REAL / name / "ground_truth_script.json").read_text()):
        calls = turn.get("tool_calls", [])
        turns.append({"content": turn["content"], "reasoning": turn["reasoning"] if reasoning else "", "tool_calls": calls})
    return turns


@pytest.mark.skipif(not REAL.exists(), reason="needs ../shared/data")
def test_genuine_logs_equal_the_script_that_their_model_followed():
    units = [stage.Unit(path, path.name) for path in sorted((REAL / "qwen-code").glob("openai-*.json"))]
    run = stage.make_run(stage.Settings())
    entries = list(stage.format_all(stage.read_all(units, [], run.notes), run))
    [qwen] = [row for _, _, row, reasons in entries if not reasons]
    [(sii, _)] = rows_of(next((REAL / "sii-cli").glob("*.json")))
    [(mini, _)] = rows_of(next((REAL / "mini-swe-agent").glob("*.traj.json")))
    assert turns_of(qwen) == truth("qwen-code")
    assert turns_of(mini) == truth("mini-swe-agent")
    # the same script through Gemini CLI: its history holds no reasoning, its read_file says absolute_path
    expected = truth("qwen-code", reasoning=False)
    expected[1]["tool_calls"][1]["arguments"] = {"absolute_path": "/home/user/work/does_not_exist.txt"}
    assert turns_of(sii) == expected
    asked = {"role": "user", "content": "Write a hello.py with a greet function, run it, and report its output."}
    for made in (qwen, sii):
        assert made["messages"][1] == asked and "setting up the context for our chat" in made["messages"][0]["content"]
    assert {tool["function"]["parameters"]["type"] for tool in sii["tools"]} == {"object"} and len(sii["tools"]) == 11


# Calls and results in each log, counted by hand
COUNTS = {"atif": (49, 48), "codex": (4, 4), "mini-swe-agent": (5, 4), "sii-cli": (4, 4), "swe-agent": (5, 5)}


@pytest.mark.skipif(not REAL.exists(), reason="needs ../shared/data")
@pytest.mark.parametrize("name", COUNTS)
def test_genuine_logs_keep_their_calls_and_results(name):
    [path] = [path for path in (REAL / name).iterdir() if path.suffix != ".txt" and "truth" not in path.name]
    [(made, reasons)] = rows_of(path)
    results = [message for message in made["messages"] if message["role"] == "tool"]
    assert reasons == [] and (len(stage.called_names(made["messages"])), len(results)) == COUNTS[name]


# Public data sets: what becomes of their three rows
SETS_EXPECTED = {
    "open_swe_traces.jsonl": ["row", "not_solved", "not_solved"],
    "tools_json.jsonl": ["row"] * 3,
    "slime.jsonl": ["row"] * 3,
    "nemotron_swe_v3.jsonl": ["row"] * 3,
    "hermes_reasoning.jsonl": ["row"] * 3,
    "role_text.jsonl": ["row"] * 3,
    "trl_prompt_completion.jsonl": ["row"] * 3,
    "swift_loss.jsonl": ["row"] * 3,
    "axolotl_train.jsonl": ["row"] * 3,
    "openai_weight.jsonl": ["row"] * 3,
    "mini_text.jsonl": ["row"] * 3,
    "nemotron_agentic.jsonl": ["row"] * 3,
    "content_parts.jsonl": ["row"] * 3,
    "sdk_dump.jsonl": ["row"] * 3,
}


@pytest.mark.parametrize("name", SETS_EXPECTED)
def test_public_data_set(name):
    made = rows_of(SETS / name, tools=[str(SETS / "TOOLS.json")])
    assert [reasons[0].partition(":")[0] if reasons else "row" for _, reasons in made] == SETS_EXPECTED[name]
    rows = [row for row, reasons in made if not reasons]
    calls = [bool(stage.called_names(row["messages"])) for row in rows]
    assert [bool(row["tools"]) for row in rows] == calls
    weights = [message.get("weight") for row in rows for message in row["messages"] if message["role"] == "assistant"]
    assert (0 in weights) == (name in ("swift_loss.jsonl", "axolotl_train.jsonl", "openai_weight.jsonl"))


def test_hermes_texts_become_calls_reasoning_and_results():
    made = rows_of(SETS / "hermes_reasoning.jsonl", tools=[])[0][0]
    system, user, look, result, answer = made["messages"]
    assert "<tools>" not in system["content"] and made["tools"][0]["function"]["name"] == "execute_bash"
    assert look["reasoning_content"] == "find parser drops the last field" and look["content"] == ""
    assert look["tool_calls"][0]["function"] == {"name": "execute_bash", "arguments": {"command": "grep x0"}}
    assert result["content"] == "a0" and answer["content"] == "Fixed: parser drops the last field."


def test_another_harness_s_tools_are_none():
    other = [str(stage.HERE / "recipes/tools/codex.py")]
    reasons = [reasons for _, reasons in rows_of(SETS / "nemotron_swe_v3.jsonl", tools=other)]
    assert all(re.match("no_tool_schemas", found[0]) for found in reasons)


def test_02_on_its_own_rows_changes_nothing(tmp_path):
    """All rows of all cases, through 02 a second time."""
    rows = []
    for path in [*(LOGS / name for name in EXPECTED), *(SETS / name for name in SETS_EXPECTED)]:
        tools = [str(SETS / "TOOLS.json")] if path.parent == SETS else None
        rows += [row for row, reasons in rows_of(path, tools=tools) if not reasons]
    assert len(rows) > 140
    again = tmp_path / "rows.jsonl"
    again.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert rows_of(again, tools=[]) == [(row, []) for row in rows]
