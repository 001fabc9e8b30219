"""The faults of LIMI's release: each switch changes rows or labels as the released code did, nothing else."""

import argparse
import copy
import importlib.util
import itertools
import json
import subprocess
import sys

import pytest
import yaml
from conftest import ROOT

LIMI = ROOT / "recipes" / "limi"
SYSTEM = "You are a CLI agent.\n\nThis is the SII CLI. We are setting up the context.\nToday is Monday."
ROW = """
query_id: q
messages:
- {role: system, content: ""}
- {role: user, content: Read a.}
- role: assistant
  content: ""
  tool_calls:
  - {id: "1", type: function, function: {name: read_file, arguments: {path: a, limit: 3}}}
- {role: tool, tool_call_id: "1", content: A}
- role: assistant
  content: ""
  tool_calls:
  - {id: "2", type: function, function: {name: run, arguments: {command: wc a}}}
- {role: tool, tool_call_id: "2", content: "1"}
- {role: assistant, content: An A.}
tools:
- type: function
  function:
    name: read_file
    description: Read a file.
    parameters:
      type: object
      properties:
        path: {type: string, description: The file.}
        limit: {type: integer, description: Lines.}
      required: [path]
- type: function
  function:
    name: run
    description: Run a command.
    parameters:
      type: object
      properties:
        command: {type: string, description: For bash.}
      required: [command]
"""
# As scripts/data_processing of the release writes it into the system prompt
PROSE = """

You have access to the following tools:

1. **read_file**: Read a file.
   Parameters:
   - path (string) (required): The file.
   - limit (integer): Lines.

2. **run**: Run a command.
   Parameters:
   - command (string) (required): For bash.

Use these tools by making function calls in your responses when appropriate."""


@pytest.fixture(scope="module")
def faults():
    spec = importlib.util.spec_from_file_location("faults", LIMI / "faults.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def row():
    row = yaml.safe_load(ROW)
    row["messages"][0]["content"] = SYSTEM
    return row


@pytest.fixture
def short(row):
    """A row of one answer."""
    answer = {"role": "assistant", "content": "Yes."}
    return row | {"messages": [*row["messages"][:2], answer]}


# ------------------------------------------------------------------------------------------------------------
# Rows


def test_the_context_of_the_cli_becomes_a_turn_that_no_model_wrote(faults, row):
    before = copy.deepcopy(row)
    messages = faults.pseudo_turns(row)["messages"]
    assert messages[:3] == [
        {"role": "system", "content": "You are a CLI agent."},
        {"role": "user", "content": SYSTEM.partition("\n\n")[2]},
        {"role": "assistant", "content": "Got it. Thanks for the context!"},
    ]
    assert messages[3:] == row["messages"][1:]
    assert row == before
    row["messages"][0]["content"] = "Be brief."
    assert faults.pseudo_turns(row) == row


def test_the_reply_to_the_last_request_is_lost(faults, row, short):
    assert faults.lost_final_answer(row)["messages"] == row["messages"][:6]
    assert faults.lost_final_answer(short) is None


def test_the_tools_stand_in_the_prompt_as_well(faults, row):
    changed = faults.double_tool_list(row)
    assert changed["messages"][0]["content"] == SYSTEM + PROSE
    assert changed["messages"][1:] == row["messages"][1:]
    assert changed["tools"] == row["tools"]
    bare = faults.double_tool_list(row | {"messages": row["messages"][1:]})
    assert bare["messages"][0] == {"role": "system", "content": PROSE}
    assert faults.double_tool_list(row | {"tools": []})["messages"] == row["messages"]


def test_every_call_gets_every_argument_as_parquet_does_it(faults, row, tmp_path):
    """The released code itself: a frame to Parquet, and back."""
    pandas = pytest.importorskip("pandas")
    pytest.importorskip("pyarrow")
    (changed,) = faults.nulls([row])
    first, second = (changed["messages"][place]["tool_calls"][0]["function"] for place in (2, 4))
    assert first["arguments"] == {"path": "a", "limit": 3, "command": None}
    assert second["arguments"] == {"path": None, "limit": None, "command": "wc a"}
    pandas.DataFrame([row]).to_parquet(tmp_path / "rows.parquet")
    frame = pandas.read_parquet(tmp_path / "rows.parquet")
    text = json.dumps(frame.to_dict("records"), default=lambda array: array.tolist())
    (read,) = json.loads(text)
    assert changed["tools"] == read["tools"]
    for ours, theirs in zip(changed["messages"], read["messages"], strict=True):
        assert ours.get("tool_calls") == theirs["tool_calls"]


def test_02_takes_out_again_what_the_switches_put_in(faults, stage, row, tmp_path):
    """The other way round: the released form is what 02 mends."""
    changed, counts = faults.with_faults([row], ["pseudo_turns", "double_tool_list"])
    assert counts == {"pseudo_turns": 1, "double_tool_list": 1, "left out": 0}
    (tmp_path / "row.json").write_text(json.dumps(changed[0]))
    command = [sys.executable, ROOT / "02_format_trajectories.py", tmp_path / "row.json"]
    done = subprocess.run([*command, "--output_file", tmp_path / "t.jsonl"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    back = json.loads((tmp_path / "t.jsonl").read_text())
    assert back["tools"] == row["tools"]
    system, *others = [message["content"] for message in back["messages"]]
    assert system.replace(faults.LAST_LINE, "").replace("\n\n\n\n", "\n\n") == SYSTEM
    assert others == [message["content"] for message in row["messages"][1:]]


def test_without_a_switch_all_faults_are_made_and_counted(row, short, tmp_path):
    (tmp_path / "t.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(short) + "\n")
    command = [sys.executable, LIMI / "faults.py", tmp_path / "t.jsonl"]
    command += ["--output_file", tmp_path / "f.jsonl"]
    done = subprocess.run(command, capture_output=True, text=True)
    counts = "pseudo_turns 2, left out 0, lost_final_answer 2, double_tool_list 2, nulls 2"
    assert done.stdout == f"{tmp_path}/f.jsonl: 2 rows; changed: {counts}\n", done.stderr
    (tmp_path / "t.jsonl").write_text("{}\n")
    done = subprocess.run(command, capture_output=True, text=True)
    told = f"faults.py: {tmp_path}/t.jsonl:1: no row of 02_format_trajectories.py: messages and tools\n"
    assert (done.returncode, done.stderr) == (2, told)


@pytest.mark.parametrize("text", ["a\u2028b\x85c", "half a pair: \ud800"])
def test_any_text_of_a_row_goes_through(faults, row, tmp_path, text):
    """Such line ends stand in a line of JSON as they are, half a surrogate pair as \\ud800 alone."""
    row["messages"][-1]["content"] = text
    path = tmp_path / "t.jsonl"
    line = json.dumps(row, ensure_ascii="\ud800" in text)
    path.write_text(line + "\n", encoding="utf-8")
    switches = dict.fromkeys([*faults.ONE_ROW, "nulls"], False) | {"double_tool_list": True}
    faults.main(argparse.Namespace(rows=path, output_file=tmp_path / "f.jsonl", **switches))
    [made] = faults.read_rows(tmp_path / "f.jsonl")
    assert made["messages"][-1]["content"] == text


# ------------------------------------------------------------------------------------------------------------
# Labels and learning rates


@pytest.fixture(scope="module")
def tok(stage, make_model, tmp_path_factory):
    """GLM-4.5's template and special tokens, a token a byte."""
    folder = tmp_path_factory.mktemp("glm")
    made = make_model.make_tokenizer(["a"], vocab_size=277)
    made.save_pretrained(folder)
    make_model.make_config(made).save_pretrained(folder)
    return stage("03_sft").load_tokenizer(str(folder))


def settings_of(stage, tmp_path, **lines):
    """(settings, args) of 03 with these lines of faults.yaml alone; None: all."""
    sft = stage("03_sft")
    path = tmp_path / "one.yaml"
    path.write_text(yaml.safe_dump(lines))
    flags = ["--config", str(path), "--output_dir", str(tmp_path)]
    return sft.read_settings(sft.make_parser(), flags)


@pytest.fixture(scope="module")
def released():
    return yaml.safe_load((LIMI / "faults.yaml").read_text())


def trained(sft, tok, row, settings):
    """The trained texts of a row, a list entry for each run of tokens with loss."""
    flags = {"no_stop_token": settings.no_stop_token}
    flags["no_reasoning"] = settings.no_reasoning
    samples, _, refused = sft.tokenize(tok, [row | {"where": "t.jsonl:1"}], 10_000, **flags)
    assert not refused
    texts = []
    for sample in samples:
        pairs = zip(sample["input_ids"], sample["labels"], strict=True)
        for has_loss, run in itertools.groupby(pairs, key=lambda pair: pair[1] != -100):
            if has_loss:
                texts.append(tok.decode([token for token, _ in run]))
    return texts


def test_the_stop_token_carries_no_loss_and_nothing_else_changes(stage, tmp_path, tok, row):
    sft = stage("03_sft")
    ours, _ = settings_of(stage, tmp_path)
    theirs, _ = settings_of(stage, tmp_path, no_stop_token=True)
    stops = ["<|observation|>", "<|observation|>", "<|user|>"]
    expected = trained(sft, tok, row, ours)
    for text, bare, stop in zip(expected, trained(sft, tok, row, theirs), stops, strict=True):
        assert text == bare + stop


def test_a_thought_is_not_trained_and_every_turn_has_an_empty_one(stage, tmp_path, tok, row):
    sft = stage("03_sft")
    theirs, _ = settings_of(stage, tmp_path, no_reasoning=True)
    bare = trained(sft, tok, row, theirs)
    row["messages"][2]["reasoning_content"] = "I should read it."
    assert trained(sft, tok, row, theirs) == bare
    ours, _ = settings_of(stage, tmp_path)
    assert "I should read it." in trained(sft, tok, row, ours)[0]
    assert "I should" not in "".join(bare)
    assert "<think></think>" in bare[0]


def test_nulls_are_read_with_their_setting_alone(stage, faults, tmp_path, released, row):
    sft = stage("03_sft")
    theirs, _ = settings_of(stage, tmp_path, null_arguments=released["null_arguments"])
    (changed,) = faults.nulls([row])
    path = tmp_path / "t.jsonl"
    path.write_text(json.dumps(changed) + "\n" + json.dumps(changed | {"messages": []}) + "\n")
    assert sft.read_rows(path)[1][0].startswith(f"{path}:1: messages[2].tool_calls[0].function.arguments: ")
    (read,), (refused,) = sft.read_rows(path, theirs.null_arguments)
    assert read["messages"][4]["tool_calls"] == changed["messages"][4]["tool_calls"]
    assert refused.startswith(f"{path}:2: messages: ")


def test_nulls_are_trained_as_values(stage, faults, tmp_path, tok, row):
    sft = stage("03_sft")
    ours, _ = settings_of(stage, tmp_path)
    (changed,) = faults.nulls([row])
    second = trained(sft, tok, changed, ours)[1]
    assert second.count("<arg_value>null</arg_value>") == 2
    assert "<arg_key>limit</arg_key>" in second


def test_the_lost_answer_and_the_pseudo_turn_change_what_is_trained(stage, faults, tmp_path, tok, row):
    sft = stage("03_sft")
    ours, _ = settings_of(stage, tmp_path)
    whole = trained(sft, tok, row, ours)
    assert trained(sft, tok, faults.lost_final_answer(row), ours) == whole[:2]
    first, *rest = trained(sft, tok, faults.pseudo_turns(row), ours)
    assert "Got it. Thanks for the context!" in first
    assert rest == whole
    assert trained(sft, tok, faults.double_tool_list(row), ours) == whole  # its tokens are context


RATES = {  # in units of 1e-5, of 8 updates
    "zero_first_update": [0, 0.5, 1],
    "warmup_steps": [0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1],
    "both": [0, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875],
}


@pytest.mark.parametrize("fault", RATES)
def test_the_learning_rates_are_those_of_the_release(stage, tmp_path, released, fault):
    """Theirs are 0, 1.39e-6, ... 9.72e-6 (Megatron counts samples): both are as near as updates get."""
    names = ["zero_first_update", "warmup_steps"] if fault == "both" else [fault]
    lines = {name: released[name] for name in [*names, "max_steps"]}
    settings, args = settings_of(stage, tmp_path, **lines)
    assert args.max_steps == (2 * 78 // 64) * 4 == 8
    rates = stage("03_sft").learning_rates(args, args.max_steps, settings.zero_first_update)
    expected = [1e-5 * share for share in RATES[fault]]
    assert rates[: len(expected)] == pytest.approx(expected)
    assert len(rates) == 8


def test_all_of_them_are_settings_that_differ_from_ours(stage, tmp_path, released):
    settings, args = settings_of(stage, tmp_path, **released)
    usual, usual_args = settings_of(stage, tmp_path)
    for name in released:
        faulty, ours = (settings, usual) if hasattr(usual, name) else (args, usual_args)
        assert getattr(faulty, name) != getattr(ours, name), name
    assert min(stage("03_sft").learning_rates(usual_args, 9, usual.zero_first_update)) > 0
