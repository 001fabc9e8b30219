"""Stage 2: turn agent logs into chat rows that 03_sft.py trains on; each is kept, or rejected with a reason.

    python 02_format_trajectories.py logs/ results/teacher/episodes.jsonl      # files, folders, formats mixed
    python 02_format_trajectories.py GAIR/LIMI --tokenizer zai-org/GLM-4.5-Air # a data set of the Hub
    python 02_format_trajectories.py ~/.claude/projects --redact               # a tool's own logs

Reads  rows of any chat shape, logs of SII CLI, dumps of requests and responses, told apart by structure; any
       other tool's log by a reader of --readers: KINDS, fits(record), read(record) (recipes/logs/README.md)
Writes data/train.jsonl           {"query_id", "messages", "tools", "meta": {"source", "format", ...}} a line
       data/train.rejected.jsonl  {"source", "format", "reasons": [str]} a line
       data/train.settings.json   settings, versions, sha256 of the inputs, counts

The rule: every text of a log stands in its row, or in its reader's own list of what it leaves out, or the log
is rejected (lost_content). Nothing is written before all is done; a run that is killed leaves nothing behind.
"""
import contextlib
import difflib
import fcntl
import fnmatch
import functools
import gzip
import hashlib
import importlib.metadata
import importlib.util
import io
import itertools
import json
import os
import platform
import re
import runpy
import sys
import tempfile
import unicodedata
import zipfile
import zlib
from argparse import RawDescriptionHelpFormatter
from array import array
from collections import Counter, defaultdict, namedtuple
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import get_type_hints

import pydantic
import yaml
from tqdm import tqdm
from trl import TrlParser

HERE = Path(__file__).resolve().parent


def option(default, text):
    return field(default=default, metadata={"help": text})


@dataclass
class Settings:
    output_file: str = option("data/train.jsonl", "Rows; rejects and settings go beside it.")
    readers: str = option(str(HERE / "recipes/logs"), "Folder of readers of other tools' logs.")
    tools: list[str] | None = option(None, "Schemas for logs without: FILE, or FORMAT=FILE; a JSON list or a"
                                           " tools file (.py). recipes/tools/FORMAT.py is found by itself.")
    tools_seen: bool = option(False, "Only print the called tools and argument names, as schemas.")
    queries: str | None = option(None, "Tasks (stage 1): a row takes its task's id, domain and source.")
    tokenizer: str | None = option(None, "Path or Hub id: counts tokens by its chat template.")
    # LIMI run_pipeline.sh --max_tokens: a longer trajectory is dropped, never cut
    max_length: int = option(125_000, "Reject rows with more tokens; needs --tokenizer.")
    benchmark: list[str] | None = option(None, "AgencyBench clone or files; 13 words in common reject a row.")
    redact: bool = option(False, "Replace secrets, e-mails, home paths; without it a secret rejects a row.")
    near_duplicate: float = option(0.9, "Reject rows with this share of a longer row's lines; above 1: none.")
    keep_failed: bool = option(False, "Keep rows whose log says that the task was not solved.")
    reject_unfinished: bool = option(False, "Reject rows without a last answer; else what follows it is cut.")
    weight_bad_calls: int = option(1, "0: a turn whose call failed is context and carries no loss.")
    where: list[str] | None = option(None, "Only rows with KEY=VALUE, KEY!=VALUE, KEY<N, KEY>N.")
    max_samples: int | None = option(None, "At most N rows, stratified by domain, nested.")
    seed: int = option(42, "Seed of the selection by --max_samples.")


class InputError(ValueError):
    """A user's mistake, told in one line that names file, line, field and remedy; exit code 2."""


class Reject(ValueError):
    """Why a trajectory is not trained on: "reason" or "reason: detail"; counted by reason."""


# What a log of the wrong shape makes a reader raise: the log is rejected and counted
MALFORMED = (AttributeError, IndexError, KeyError, RecursionError, TypeError, ValueError)


def reject_of(error):
    """The reject that an error stands for: of its own words, if they are a reason."""
    named = type(error) in (Reject, ValueError) and re.match(r"[a-z_]+(: |$)", str(error))
    return Reject(str(error) if named else f"malformed: {type(error).__name__}: {error}")


def parse_settings(parser):
    """Defaults < --config YAML < flags; an unknown or misspelt one is an error."""
    parser.allow_abbrev = False
    parser.usage = "%(prog)s [--config FILE.yaml] [--setting VALUE ...]"
    parser.description = __doc__.partition("\n\nReads")[0]
    parser.formatter_class = type("Help", (RawDescriptionHelpFormatter, parser.formatter_class), {})
    try:
        return parser.parse_args_and_config()
    except (ValueError, TypeError, IndexError, yaml.YAMLError) as error:
        told = re.sub("Some specified arg.* HfArgumentParser", "no such setting (see --help)", str(error))
        if unknown := re.findall(r"'--([\w-]+)", told):
            nearest = difflib.get_close_matches(unknown[0], [one.dest for one in parser._actions], 1)
            place = f"{sys.argv[sys.argv.index('--config') + 1]}: " if "config file" in told else "--"
            told = f"{place}{unknown[0]}: no such setting; nearest: {nearest[0] if nearest else 'see --help'}"
        raise InputError(" ".join(told.split())) from None


# 1. Messages of any chat form -> neutral messages
ROLES = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user",
    "assistant": "assistant", "gpt": "assistant", "model": "assistant", "ai": "assistant", "bot": "assistant",
    "agent": "assistant", "chatgpt": "assistant",
    "tool": "tool", "function": "tool", "environment": "tool", "ipython": "tool", "observation": "tool",
    "tool_response": "tool", "function_response": "tool", "tool_result": "tool",
    "function_call": "call", "tool_call": "call",  # ShareGPT, ms-swift: the content is the call
    "thinking": "thought", "reasoning": "thought", "thought": "thought",
}  # fmt: skip
ITEMS = {  # Responses API: an item has a type where a message has a role
    "function_call": "assistant", "custom_tool_call": "assistant", "reasoning": "thought",
    "function_call_output": "tool", "custom_tool_call_output": "tool",
}  # fmt: skip
TEXT_KEYS = ("content", "value", "text", "parts")
MORE_TEXT_KEYS = {"tool": ("output",), "system": ("system_prompt",), "thought": ("summary",)}
TEXT_BLOCKS = {None, "text", "input_text", "output_text", "summary_text", "tool_reference"}
THOUGHT_BLOCKS = ("thinking", "reasoning", "think", "thought", "reasoning_text")
THOUGHT_KEYS = ("thinking", "reasoning", "think", "text", "summary", "content", "thought")
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking", "reasoning_details", "thinking_blocks",
                  "reasoning_text", "chain_of_thought", "cot")  # fmt: skip
MEDIA_KEYS = ("image", "images", "image_url", "image_urls", "audio", "audios", "video", "videos")
CALL_KEYS = ("tool_calls", "function_call", "function_calls")
ARGUMENT_KEYS = ("arguments", "args", "input", "parameters")
RESULT_IDS = ("tool_call_id", "tool_use_id", "call_id", "toolCallId")
# Flags on one turn: OpenAI's weight, ms-swift's loss, axolotl's train and training, verl's loss_mask
WEIGHT_FLAGS = ("weight", "loss", "train", "training", "trainable", "loss_mask", "step_loss_mask")
MASK_FLAGS = ("mask", "masked")  # true: no loss
# Any other flag of a trainer: a part of a turn, a scale, a word that we do not know
FLAG = re.compile(r"(?:^|_)(?:train\w*|loss|mask\w*|weights?|supervis\w*|learn\w*|ignored?)(?:_|$)")
THOUGHT = re.compile(r"\s*<think>(.*?)</think>\s*", re.DOTALL)
TEXT_CALL = re.compile(r"<tool_call>\s*(\{.*?\})\s*</tool_call>", re.DOTALL)  # Hermes, Qwen
TEXT_RESULT = re.compile(r"\s*<tool_response>\s*(.*?)\s*</tool_response>\s*", re.DOTALL)


def first_of(record: dict, keys):
    """The first value that is not None; None if there is none."""
    return next((record[key] for key in keys if record.get(key) is not None), None)


def without_twins(pairs):
    """A JSON object; of a key that stands twice Python would keep the last value, in silence."""
    value = dict(pairs)
    if len(value) < len(pairs):
        [(twin, _)] = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"the key {twin} twice in one object")
    return value


parse_json = functools.partial(json.loads, object_pairs_hook=without_twins)


def load_json(text, reason):
    """A JSON text's value; one that is none is a reject with this reason."""
    try:
        return parse_json(text)
    except (ValueError, RecursionError):
        raise Reject(reason) from None


def plain_text(content):
    """A string, None, or a list of text parts -> a string; anything else is a reject that names its type."""
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list):
        raise Reject(f"non_text_content: {type(content).__name__}")
    texts = []
    for part in content:
        kind = type(part).__name__
        if isinstance(part, dict):
            kind = part.get("type") or ", ".join(part)
            is_known = part.get("type") in TEXT_BLOCKS
            part = first_of(part, ("text", "summary", "tool_name")) if is_known else None
        if not isinstance(part, str):
            raise Reject(f"non_text_content: {kind}")
        texts.append(part)
    return "\n".join(texts)


CALL_PARTS = {"id", "call_id", "name", "type", "index", "function", "namespace", *ARGUMENT_KEYS}


def read_call(call):
    """A call of any shape, or its JSON -> {"id", "type", "function": {"name", "arguments": object}}."""
    call = load_json(call, "calls_as_text: a call") if isinstance(call, str) else call
    function = call.get("function")
    body = function if isinstance(function, dict) else call
    name = function if isinstance(function, str) else body.get("name")
    if not isinstance(name, str) or not name:
        raise Reject("call_without_name")
    arguments = read_arguments(body, name)
    id = first_of(call, ("call_id", "id"))  # an item of the Responses API has both
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}


def read_arguments(body, name):
    """The arguments of a call under any of their names, as an object."""
    arguments = first_of(body, ARGUMENT_KEYS)
    strange = [key for key in body if key not in CALL_PARTS and body[key]]
    if arguments is None and strange:
        raise Reject(f"call_without_arguments: {name} has {', '.join(strange)}")
    while isinstance(arguments, str):  # some write JSON in JSON
        arguments = load_json(arguments.strip() or "{}", f"arguments_not_json: {name}")
    if not isinstance(arguments or {}, dict):
        raise Reject(f"arguments_not_an_object: {name}")
    return arguments or {}


def read_calls(value, key):
    """tool_calls, function_call or function_calls, as a list, an object or a JSON string of either."""
    calls = load_json(value, f"calls_as_text: {key}") if isinstance(value, str) else value
    calls = [calls] if isinstance(calls, dict) else calls or []
    if not isinstance(calls, list):
        raise Reject(f"calls_as_text: {key}")
    return [read_call(call) for call in calls]


def blocks_of(content):
    """Yield ("text", "thought", "call" or "result"; value) of OpenAI's, Anthropic's or Gemini's blocks."""
    blocks = content if isinstance(content, list) else [content]
    for block in blocks if content is not None else []:
        kind = block.get("type") if isinstance(block, dict) else None
        if not isinstance(block, dict):
            yield "text", plain_text([block])
        elif "functionCall" in block:
            yield "call", read_call(block["functionCall"])
        elif "functionResponse" in block:
            yield "result", read_response(block["functionResponse"])
        elif kind in ("tool_use", "toolCall", "tool_call"):
            yield "call", read_call(block)
        elif kind in ("tool_result", "toolResult"):
            text = plain_text(block.get("content"))
            id = first_of(block, RESULT_IDS)
            yield "result", {"role": "tool", "id": id, "name": None, "content": text}
        elif kind in THOUGHT_BLOCKS or block.get("thought") is True:
            yield "thought", plain_text(first_of(block, THOUGHT_KEYS))
        else:
            yield "text", plain_text([block])


def read_response(answer):
    """Gemini's functionResponse as a result; an object in it was sent as JSON."""
    refuse_media(answer, ("parts",))
    response = answer.get("response") or {}
    is_wrapped = response.keys() in ({"output"}, {"error"})
    output = next(iter(response.values())) if is_wrapped else response
    text = plain_text(output) if output is None or isinstance(output, str | list) else json.dumps(output)
    return {"role": "tool", "id": answer.get("id"), "name": answer.get("name"), "content": text}


def flags_of(holder):
    """[(key, flag)] of other trainers in an object; in a list of such, of parts, they are a reject."""
    for key, _ in itertools.chain(*map(flags_of, holder if isinstance(holder, list) else [])):
        raise Reject(f"unsupported_flag: {key} on a part of a message")
    items = holder.items() if isinstance(holder, dict) else ()
    return [(key, flag) for key, flag in items if FLAG.search(key) and flag not in (None, [])]


def weight_of(message, role):
    """0, or None for full loss, from the flags on a message or its metadata; a strange one is a reject."""
    weights = set()
    for key, flag in itertools.chain.from_iterable(map(flags_of, [message, *message.values()])):
        if key not in WEIGHT_FLAGS + MASK_FLAGS or flag not in (0, 1):
            raise Reject(f"unsupported_flag: {key}")
        weights.add(bool(flag) != (key in MASK_FLAGS))
        if role != "assistant" and flag and key in WEIGHT_FLAGS:
            raise Reject(f"unsupported_flag: {key} on a {role} message")
    if len(weights) > 1:
        raise Reject("unsupported_flag: two flags of a turn disagree")
    return 0 if role == "assistant" and weights == {False} else None


def plain_name(name):
    """User, tool-response, isResolved -> user, tool_response, is_resolved; of no text, ""."""
    return re.sub("(?<=[a-z])(?=[A-Z])|-", "_", name).lower() if isinstance(name, str) else ""


def role_of(message):
    if message.get("type") in ITEMS and "role" not in message and "from" not in message:
        return ITEMS[message["type"]]
    name = first_of(message, ("role", "from", "type"))
    role = ROLES.get(plain_name(name))
    if role is None:
        raise Reject(f"unknown_role: {name}")
    if message.get("recipient", "all") not in ("all", None):  # harmony's calls
        raise Reject(f"unsupported_call: to {message['recipient']}")
    return "thought" if message.get("channel") == "analysis" else role


def refuse_media(holder, keys):
    """An image, a sound or a film beside the text is a reject by its name."""
    for key in keys:
        if holder.get(key):
            raise Reject(f"non_text_content: {key}")


def parts_of(message, role):
    """What a message holds under any of its names: {"text": str, "thought", "call", "result": lists}."""
    refuse_media(message, MEDIA_KEYS)
    keys = TEXT_KEYS + MORE_TEXT_KEYS.get(role, ())
    if role not in ("assistant", "thought") and not message.keys() & set(keys):
        raise Reject(f"missing_text: a {message.get('role', role)} message without content")
    key = next((key for key in keys if message.get(key)), keys[0])
    parts = {"text": [], "thought": [], "call": [], "result": []}
    for kind, value in blocks_of(message.get(key)):
        parts[kind].append(value)
    joint = "" if key == "parts" else "\n"  # Gemini's parts are pieces of one text
    parts["text"] = joint.join(parts["text"])
    parts["thought"] = [joint.join(parts["thought"])]
    for value in map(message.get, REASONING_KEYS):
        for block in filter(None, value if isinstance(value, list) else [value]):
            # an encrypted one has no text
            text = first_of(block, THOUGHT_KEYS) if isinstance(block, dict) else block
            parts["thought"].append(plain_text(text))
    return parts


def read_message(message):
    """One message -> neutral ones: {"role", "content", "reasoning_content", "calls", "weight"}, or a tool's
    {"role": "tool", "id", "name", "content"}. Results among the blocks come first, as they were sent."""
    if not isinstance(message, dict):
        raise Reject(f"message_is_no_object: {type(message).__name__}")
    if isinstance(message.get("data"), dict) and "content" in message["data"]:  # LangChain
        message = {**message["data"], "type": message.get("type")}
    role = role_of(message)
    parts = parts_of(message, role)
    text = parts["text"]
    results = parts["result"]
    if role not in ("system", "user", "tool"):
        return [*results, read_answer(message, role, parts)]
    neutral = {"role": role, "content": text, "weight": weight_of(message, role)}
    if any(parts["thought"]) or calls_of(message, role, parts):
        raise Reject(f"misplaced: a call or a reasoning of a {role} message")
    if role == "tool":
        return results or read_result(message, text)
    return results if results and not text else [*results, neutral]


def read_answer(message, role, parts):
    """A message of the assistant, or an item that is its call or its thought; both may be written as text."""
    calls = calls_of(message, role, parts)
    thoughts = parts["thought"]
    content = parts["text"] if role == "assistant" else ""
    if role == "thought":
        thoughts.append(parts["text"])
    while thought := THOUGHT.match(content):
        thoughts.append(thought[1].strip())
        content = content[thought.end() :]
    found = TEXT_CALL.findall(content) if not calls else []
    with contextlib.suppress(Reject):  # a text that only looks like a call stays a text
        calls += [read_call(text) for text in found]
        content = TEXT_CALL.sub("", content).strip() if found else content
    once = {}  # <think> may repeat reasoning_content
    for thought in filter(str.strip, thoughts):
        once.setdefault(thought.strip(), thought)
    reasoning = "\n".join(once.values())
    neutral = {"role": "assistant", "content": content, "reasoning_content": reasoning, "calls": calls}
    return neutral | {"weight": weight_of(message, "assistant")}


def calls_of(message, role, parts):
    """The calls among the blocks and beside them; of an item of the Responses API, itself."""
    calls = parts["call"]
    if role == "call":
        calls += read_calls(parts["text"], message.get("role") or message.get("from"))
    for key in CALL_KEYS:
        beside = read_calls(message[key], key) if message.get(key) else []
        calls += [call for call in beside if call not in calls]  # LangChain has Anthropic's blocks twice
    if message.get("type") in ("function_call", "custom_tool_call") and not calls:
        free_text = {"input": {"input": message["input"]}} if "input" in message else {}
        calls.append(read_call(message | free_text))
    return calls


def read_result(message, text):
    """A tool message; Hermes, which has no ids, wraps one or several results in tags."""
    ids = message.get("tool_call_ids") or [None]
    result = {"role": "tool", "id": first_of(message, RESULT_IDS) or ids[0], "own_id": message.get("id")}
    result["name"] = message.get("name") or None
    wrapped = [] if result["id"] else TEXT_RESULT.findall(text)
    if not wrapped or TEXT_RESULT.sub("", text).strip():
        return [result | {"content": text}]
    results = []
    for answer in wrapped:
        found = result | {"name": None}
        with contextlib.suppress(ValueError, RecursionError):
            value = parse_json(answer)
            if isinstance(value, dict) and {"content"} <= value.keys() <= {"content", "name", "tool_call_id"}:
                found |= {"name": value.get("name"), "id": value.get("tool_call_id") or result["id"]}
                value = value["content"]
                answer = value if isinstance(value, str) else json.dumps(value)
        results.append(found | {"content": answer})
    return results


# 2. Neutral messages -> the normal form of a row
# Gemini CLI and its children (SII CLI, Qwen Code) open with a turn that no model wrote
CONTEXT_ANSWER = "Got it. Thanks for the context!"
# ... and end with a request that asks the model who speaks next: it alone holds the final answer
NEXT_SPEAKER = "Analyze *only* the content and structure of your immediately preceding response"
FINISH_TOOLS = {"finish", "submit", "exit", "complete", "mark_task_complete", "attempt_completion"}


def normalise(messages, notes: Counter):
    """Messages of any form -> (the row's messages, the texts that were left out: pseudo-turns, a cut end).

    notes says what was done or seen: "cut", "merged", "greeting", "unfinished".
    """
    turns: list[dict] = []  # each holds the results of its calls until the end; None: not there yet
    for message in itertools.chain.from_iterable(map(read_message, messages)):
        if message["role"] == "tool":
            take_result(turns, message)
        elif message["role"] == "system" and not message["content"]:
            continue
        elif turns and continues(turns[-1], message):
            merge(turns[-1], message, notes)
        else:
            calls = message.pop("calls", [])
            turns.append(message | {"calls": calls, "results": [None] * len(calls)})
    for turn in turns:  # a text between calls is of their response; after a lost result it is an answer
        if turn.get("text_after_calls") and None in turn["results"]:
            call = turn["calls"][turn["results"].index(None)]
            raise Reject(f"call_without_result: {call['function']['name']}, and an answer follows")
    turns, left_out = drop_pseudo_turns(turns)
    left_out += cut_end(turns, notes)
    mark_greeting(turns, notes)
    return flatten(turns), left_out


def continues(last, message):
    """Old Gemini CLIs log the text and each call of one model turn separately, Codex every item."""
    return message["role"] == last["role"] != "user" and all(answer is None for answer in last["results"])


def merge(last, message, notes):
    if message["weight"] != last["weight"]:
        raise Reject("two_weights: assistant messages in a row with and without loss")
    if last.get("calls") and message["content"]:
        last["text_after_calls"] = True
    notes["merged"] = 1
    for key in ("content", "reasoning_content"):
        if message.get(key):
            last[key] = "\n".join(filter(None, (last.get(key), message[key])))
    calls = message.get("calls", [])
    last["calls"] += calls
    last["results"] += [None] * len(calls)


def take_result(turns, answer):
    """Put a result beside its call: by id; where the call or the result has none, by name and order.

    Results end up in the order of the calls: GLM's and Qwen's templates print no ids, so the order is the
    pairing. A user's word may stand between a call and its result.
    """
    turn = next((turn for turn in reversed(turns) if turn["role"] == "assistant"), {"calls": []})
    id = id_of(answer, turn["calls"])
    by_id, by_name = [], []
    for number, call in enumerate(turn["calls"]):
        if turn["results"][number] is not None:
            continue
        if call["id"] and id:
            by_id += [number] if call["id"] == id else []
        elif turn is turns[-1] and answer["name"] in (None, call["function"]["name"]):
            by_name.append(number)
    if not by_id + by_name:
        raise Reject("result_without_call")
    turn["results"][(by_id + by_name)[0]] = answer["content"]


def id_of(answer, calls):
    """The id of the call that a result answers; tau2 writes it as the message's own id, others do not."""
    own = answer.get("own_id")
    return answer["id"] or (own if own in [call["id"] for call in calls] else None)


def drop_pseudo_turns(turns):
    """Without the turns that the harness made up; the context that it told moves to the system message."""
    start = int(bool(turns) and turns[0]["role"] == "system")
    left_out = []
    if [turn["content"].strip() == CONTEXT_ANSWER for turn in turns[start : start + 2]] == [False, True]:
        content = "\n\n".join(turn["content"] for turn in turns[: start + 1])
        system = {"role": "system", "content": content, "weight": None, "calls": [], "results": []}
        turns = [system, *turns[start + 2 :]]
        left_out.append(CONTEXT_ANSWER)
    if turns and turns[-1]["role"] == "user" and turns[-1]["content"].startswith(NEXT_SPEAKER):
        left_out.append(turns[-1]["content"])
        turns = turns[:-1]
    return turns, left_out


def cut_end(turns, notes):
    """Cut what follows the last assistant turn: results whose answer the log lost, a user's last word.

    A call that ends the episode needs no answer, and keeps its result.
    """
    after = []
    while turns and turns[-1]["role"] != "assistant":
        after.append(turns.pop()["content"])
    if not turns:
        raise Reject("no_assistant_message")
    last = turns[-1]
    names = {call["function"]["name"] for call in last["calls"]}
    if not names & FINISH_TOOLS:
        notes["unfinished"] += bool(after or names)
        after += [result for result in last["results"] if result is not None]
        last["results"] = [None] * len(last["calls"])
    notes["cut"] += bool(after)
    return after


def mark_greeting(turns, notes):
    """An assistant's greeting before the first request is context: no request asked for it."""
    users = [number for number, turn in enumerate(turns) if turn["role"] == "user"]
    if not users:
        raise Reject("no_user_message")
    if not turns[users[0]]["content"].strip():
        raise Reject("missing_text: the first user message is empty")
    for turn in turns[: users[0]]:
        if turn["calls"]:
            raise Reject("starts_with: assistant")
        if turn["role"] == "assistant":
            turn["weight"] = 0
            notes["greeting"] = 1


def flatten(turns):
    """Turns -> messages, each result after its call, every id present and unique."""
    messages, seen = [], set()
    for turn in turns:
        message = {"role": turn["role"], "content": turn["content"]}
        if turn.get("reasoning_content"):
            message["reasoning_content"] = turn["reasoning_content"]
        if turn["calls"]:
            message["tool_calls"] = turn["calls"]
        if turn["role"] == "assistant" and len(message) == 2 and not turn["content"]:
            raise Reject("empty_assistant_message")
        if turn["weight"] == 0:
            message["weight"] = 0
        messages.append(message)
        for call, answer in zip(turn["calls"], turn["results"]):
            call["id"] = unique_id(call["id"], seen)
            if answer is not None:
                messages.append({"role": "tool", "tool_call_id": call["id"], "content": answer})
            elif turn is not turns[-1]:
                raise Reject(f"call_without_result: {call['function']['name']}")
    return messages


def unique_id(id, seen):
    """The id, or a new one where it is missing or taken; seen grows."""
    number = len(seen)
    while not isinstance(id, str) or not id or id in seen:
        id = f"call_{number}"
        number += 1
    seen.add(id)
    return id


GEMINI_TYPES = {"STRING", "NUMBER", "INTEGER", "BOOLEAN", "ARRAY", "OBJECT", "NULL"}


def lower_types(schema):
    """Gemini's "STRING" -> "string", only where a schema stands: never in defaults, enums or examples."""
    if isinstance(schema, list):
        return list(map(lower_types, schema))
    lowered = {}
    for key, value in schema.items() if isinstance(schema, dict) else ():
        if key == "type" and isinstance(value, str) and value in GEMINI_TYPES:
            value = value.lower()
        elif key in ("items", "additionalProperties", "anyOf", "oneOf", "allOf"):
            value = lower_types(value)
        elif key == "properties" and isinstance(value, dict):
            value = {name: lower_types(item) for name, item in value.items()}
        lowered[key] = value
    return lowered if isinstance(schema, dict) else schema


SCHEMA_KEYS = ("parametersJsonSchema", "input_schema", "inputSchema")


def read_tool(tool):
    """One tool of OpenAI, Anthropic or Gemini, or a JSON string of it -> a list of OpenAI schemas."""
    tool = load_json(tool, "tools_are_no_schemas: a text") if isinstance(tool, str) else tool
    if not isinstance(tool, dict):
        raise Reject(f"tools_are_no_schemas: {type(tool).__name__}")
    if "functionDeclarations" in tool:
        return read_tools(tool["functionDeclarations"])
    function = tool.get("function")
    if not isinstance(function, dict):
        function = {key: value for key, value in tool.items() if key != "type"}
    if not isinstance(function.get("name"), str):
        raise Reject(f"tools_are_no_schemas: {tool.get('type', 'no name')}")
    function = {"parameters" if key in SCHEMA_KEYS else key: value for key, value in function.items()}
    parameters = function.get("parameters", {})
    if not isinstance(parameters, dict):
        raise Reject(f"tools_are_no_schemas: parameters of {function['name']}")
    if parameters.get("type") == "OBJECT":
        function["parameters"] = lower_types(parameters)
    return [{"type": "function", "function": function}]


def read_tools(tools):
    """Tool schemas from a list, a JSON string, a list of JSON strings, an object with "tools"; "" is none."""
    if isinstance(tools, str):
        tools = load_json(tools, "tools_are_no_schemas: a text") if tools.strip() else []
    if isinstance(tools, dict):
        tools = tools.get("tools", [tools])
    if not isinstance(tools or [], list):
        raise Reject(f"tools_are_no_schemas: {type(tools).__name__}")
    schemas = []
    for tool in tools or []:
        schemas += read_tool(tool)
    return schemas


# 3. Formats of this file: a record -> a loose row {"messages", "tools", "meta", "left_out"?, "checked"?}
MESSAGE_COLUMNS = ("messages", "conversations", "conversation", "trajectory", "dialogue", "dialog", "chat")
TOOL_COLUMNS = ("tools", "tools_json", "functions", "tool_defs", "available_tools")
SYSTEM_COLUMNS = ("system", "system_prompt", "system_message", "system_instruction")
ID_COLUMNS = ("query_id", "id", "instance_id", "task_id", "traj_id", "trajectory_id", "uuid", "custom_id",
              "session_id", "sessionId", "conversation_id", "item_id")  # fmt: skip
# LIMI's converter writes the tools into the system prompt; the chat template writes them again
TOOL_LIST = "\n\nYou have access to the following tools:\n\n"
TOOL_LINE = re.compile(r"\s*$|\d+\. \*\*(.+?)\*\*|\s+Parameters:|\s+- \S+ \(")
TOOLS_TAG = re.compile(r"<tools>\s*(.*?)\s*</tools>", re.DOTALL)  # Hermes


@dataclass
class Format:
    """A kind of log: fits(record) -> bool, read(record) -> loose row, what it leaves out and why."""

    name: str
    fits: object
    read: object
    kinds: dict[str, str] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    split: object = None  # split(record) -> records, where a record may hold several


def as_list(value):
    """A list, or the JSON string of one; else None."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        with contextlib.suppress(ValueError, RecursionError):
            value = parse_json(value)
    return value if isinstance(value, list) else None


def is_message(value):
    if not isinstance(value, dict):
        return False
    names = [plain_name(value.get(key)) for key in ("role", "from", "type")]
    return any(name in ROLES or name in ITEMS for name in names)


def fits_row(record):
    if isinstance(record, list):
        return bool(record) and all(map(is_message, record))
    if not isinstance(record, dict):
        return False
    has_messages = any(as_list(record.get(key)) is not None for key in MESSAGE_COLUMNS)
    pairs = ({"prompt", "completion"}, {"query", "answers"}, {"chosen", "rejected"})
    return has_messages or any(pair <= record.keys() for pair in pairs)


def take_messages(columns):
    """Remove the conversation's columns and return its messages."""
    if {"chosen", "rejected"} <= columns.keys():
        raise Reject("not_supported: a preference pair (chosen, rejected)")
    for key in MESSAGE_COLUMNS:
        if as_list(columns.get(key)):
            return as_list(columns.pop(key))
    if "completion" in columns:  # TRL
        sides = {"user": columns.pop("prompt"), "assistant": columns.pop("completion")}
    elif "answers" not in columns:
        return []
    else:  # xLAM: calls without results
        sides = {"user": columns.pop("query"), "function_call": columns.pop("answers")}
    messages = []
    for role, side in sides.items():
        messages += side if isinstance(side, list) else [{"role": role, "content": side}]
    return messages


def take_tools(columns):
    """Remove the first column of tools that holds any and return it."""
    for key in TOOL_COLUMNS:
        if key in columns and (tools := columns.pop(key)):
            return tools
    for key in ("metadata", "extra_info"):
        if isinstance(columns.get(key), dict) and "tools" in columns[key]:  # slime, verl
            columns[key] = dict(columns[key])
            return columns[key].pop("tools")
    return None


def read_row(record):
    """Rows of this project, 04's episodes, GAIR/LIMI, public data sets; a bare list of messages."""
    columns = dict(record) if isinstance(record, dict) else {"messages": one_session(record)}
    refuse_media(columns, ("images", "videos", "audios"))
    for key, value in columns.items():
        if FLAG.search(key) and isinstance(value, list):
            raise Reject(f"unsupported_flag: {key}, a list beside the messages")
    messages = take_messages(columns)
    first = messages[0] if messages and isinstance(messages[0], dict) else {}
    tools = take_tools(columns) or first.get("tools")
    beside = [system_of(columns.pop(key)) for key in SYSTEM_COLUMNS if columns.get(key)]
    checked = {"messages": messages, "system": beside, "tools": tools}
    system = not_said(beside, first)
    columns.pop("served", None)  # ids of the tokens that 04's server took and gave; messages have their text
    return {"messages": system + messages, "tools": tools, "meta": row_meta(columns), "checked": checked}


def one_session(messages):
    """A list of messages; one of several sessions is no conversation."""
    for key in ("session_id", "sessionId", "conversation_id", "thread_id", "trajectory_id", "traj_id"):
        if len({str(message[key]) for message in messages if key in message}) > 1:
            raise Reject(f"several_sessions: by {key}; a file or a row holds one")
    return messages


def not_said(beside, first):
    """The system messages of the columns, each once, without the one that the first message is."""
    texts = [read_message(message)[0]["content"] for message in beside]
    opening = read_message(first) if beside and first else []
    said = [message["content"] for message in opening if message["role"] == "system"]
    return [{"role": "system", "content": text} for text in dict.fromkeys(texts) if text not in said]


def row_meta(columns):
    """Every other column; what clashes with our own keys gets another name."""
    own = columns.pop("meta") if isinstance(columns.get("meta"), dict) else {}
    for key, name in (("source", "query_source"), ("format", "row_format")):
        if key in columns:
            columns[name] = columns.pop(key)
    twins = {f"meta_{key}": own[key] for key in own.keys() & columns.keys() if own[key] != columns[key]}
    return own | twins | columns


def fits_dump(record):
    return isinstance(record, dict) and isinstance(record.get("request"), dict) and "response" in record


def body_of(side):
    """A request or response: itself, or the body of a logged HTTP message."""
    side = side.get("body", side) if isinstance(side, dict) else side
    return load_json(side, "unreadable: a body that is no JSON") if isinstance(side, str) else side or {}


def system_of(told):
    """The message of a system prompt: a text, blocks, or Gemini's content with parts."""
    told = {"parts": told["parts"]} if isinstance(told, dict) else {"content": told}
    return {"role": "system"} | told


def answer_of(response):
    """(the messages of a response, why it ended) in any of their forms."""
    if response.get("error"):
        raise Reject("unfinished: the last request failed")
    if response.get("choices"):
        return [response["choices"][0]["message"]], response["choices"][0].get("finish_reason")
    if response.get("candidates"):
        return [response["candidates"][0]["content"]], response["candidates"][0].get("finishReason")
    finish = first_of(response, ("stop_reason", "status", "done_reason"))
    if response.get("message"):  # Ollama
        return [response["message"]], finish
    if "content" in response:
        return [{"role": "assistant", "content": response["content"]}], finish
    return response.get("output") or [], finish


def read_dump(dump):
    """{"request", "response"}: a call of OpenAI's chat or Responses API, Anthropic's, Gemini's, Ollama's."""
    request = body_of(dump["request"])
    answer, finish = answer_of(body_of(dump["response"]))
    tools = request.get("tools") or request.get("functions")
    if not tools:
        raise Reject("request_without_tools: a title, a summary or another helper")
    if first_of(request, ("previous_response_id", "conversation")):
        raise Reject("history_elsewhere: the provider keeps what came before")
    messages = first_of(request, ("messages", "input", "contents"))
    messages = [{"role": "user", "content": messages}] if isinstance(messages, str) else messages
    system = first_of(request, ("system", "instructions", "systemInstruction"))
    system = [system_of(system)] if system else []
    if dump.get("error"):
        raise Reject("unfinished: the last request failed")
    meta = row_meta({key: dump[key] for key in dump.keys() - {"request", "response"}})
    meta |= {"model": request.get("model"), "finish_reason": finish}
    meta["request_metadata"] = request.get("metadata")
    return {"messages": system + messages + answer, "tools": tools, "meta": meta}


DUMP_LEFT_OUT = {"headers": "of the HTTP message", "request.url": "where it was sent",
                 "usage": "counts of tokens", "error": "rejects the dump",
                 "request.tools": "read as schemas", "body.tools": "read as schemas",
                 "request.functions": "read as schemas", "body.functions": "read as schemas"}  # fmt: skip


def states_of(dump):
    """[(message, its reasoning, a hash of the conversation up to it)]; [] for a dump that will be rejected.

    What clients change between two calls stays out: the system prompt, reasoning, ids, spaces at the ends.
    """
    digest, states, thoughts = hashlib.sha256(), [], []
    try:
        for message in read_dump(dump)["messages"]:
            for neutral in read_message(message):
                calls = [call["function"] for call in neutral.get("calls", [])]
                said = [neutral["role"], neutral["content"].strip(), calls]
                thoughts.append(neutral.get("reasoning_content", ""))
                if neutral["role"] != "system" and any(said[1:]):  # a reasoning may be an item of its own
                    digest.update(json.dumps(said, sort_keys=True).encode())
                    thought = "\n".join(filter(None, thoughts)) if neutral["role"] == "assistant" else ""
                    states.append((message, thought, digest.hexdigest()))
                    thoughts = []
    except MALFORMED:
        return []  # make_row() says why
    return states


def restore_thoughts(dump, thoughts):
    """Give earlier answers the reasoning that their own dumps hold: most clients do not send it again."""
    dump["request"] = body_of(dump["request"])
    for message, thought, state in states_of(dump):
        if not thought and state in thoughts:
            message["reasoning_content"] = thoughts[state]


def fits_sii(record):
    events = record.get("events") if isinstance(record, dict) else None
    return isinstance(events, list) and any(isinstance(event, dict) and "type" in event for event in events)


def sii_calls(log):
    """(requests with tools, the conversations that next-speaker checks saw, what else the events say)."""
    requests, beside = [], []
    for event in log["events"]:
        if event.get("type") == "api_request_full":
            data = dict(event["data"])
            requests.append(data.pop("full_request"))
            event = event | {"data": data}
        beside.append(event)
    conversations = [request["messages"] for request in requests]
    checks = [messages for messages in conversations if NEXT_SPEAKER in json.dumps(messages[-1:])]
    return [request for request in requests if request.get("tools")], checks, beside


def read_sii(log):
    """{"events": [{"type": "api_request_full", "data": {"full_request"}}]}: the longest request with tools.

    The last request would be the wrong one: it may be a helper's (compression, next speaker), without tools.
    Requests that begin alike must be in the row too; what begins otherwise is another agent's, and left out.
    """
    requests, checks, beside = sii_calls(log)
    if not requests:
        raise Reject("request_without_tools: no request of the agent in the log")
    request = max(requests, key=lambda request: len(request["messages"]))
    contents = request["messages"]
    conversations = [request["messages"] for request in requests] + checks
    alike = [messages for messages in conversations if messages[:1] == contents[:1]]
    others = [beyond(messages, contents) for messages in alike]
    for check in checks:  # the history that the next-speaker check sees is one answer longer
        if check[: len(contents)] == contents:
            contents = check
    if is_compacted(json.dumps([messages[:2] for messages in alike])):
        raise Reject("compacted")
    meta = {key: value for key, value in log.items() if key != "events"}
    messages = [system_of(request.get("system_instruction")), *contents]
    checked = [request, others, beside]  # an event of a kind that nobody has seen may repeat, not add
    return {"messages": messages, "tools": request["tools"], "meta": meta, "checked": checked}


def beyond(messages, contents):
    """What a conversation says otherwise than another, place by place; requests repeat what came before."""
    pairs = itertools.zip_longest(messages, contents[: len(messages)])
    return [message for message, same in pairs if message != same]


BUILT_IN = [
    Format("openai_dump", fits_dump, read_dump, left_out=DUMP_LEFT_OUT),
    Format("row", fits_row, read_row),
    Format("sii", fits_sii, read_sii),
]


def load_readers(folder):
    """Every *.py of the folder that has fits and read; [] if there is no folder."""
    formats = []
    for path in sorted(Path(folder).glob("*.py")):
        spec = importlib.util.spec_from_file_location(f"reader_{path.stem}", path)
        module = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
            more = {"left_out": getattr(module, "LEFT_OUT", {}), "split": getattr(module, "split", None)}
            formats.append(Format(path.stem, module.fits, module.read, module.KINDS, **more))
        except (ImportError, SyntaxError, *MALFORMED) as error:
            raise InputError(f"{path}: no reader of logs ({type(error).__name__}: {error})") from None
    return formats


def find_format(record, formats):
    """The reader that fits a record, else the format of this file that does; None: not a log."""
    found = []
    for reader in formats:
        with contextlib.suppress(*MALFORMED):
            found += [reader] if reader.fits(record) else []
    if len(found) > 1:
        raise Reject(f"two_readers: {', '.join(reader.name for reader in found)}")
    return next(iter(found + [reader for reader in BUILT_IN if reader.fits(record)]), None)


# 4. Conservation: every text and call of the record stands in the row, or in what was left out by name
SHORTEST = 20  # characters; a shorter string is more often a key word than a text
LONGEST_NAME = 256  # characters; what is longer is no identifier: an image, a file
IDENTIFIER = re.compile(r"[\w.:+/=@#~,-]*"  # a hash, a date, a path
                        r"|(?:\w{3}, )?\d+[ /-]\w+[ /-]\d+ [\d:.,]+ ?[\w+:-]*", re.ASCII)
# Of a reasoning or a call, for the provider's eyes; whatever the format
ENCRYPTED = ("signature", "thought_signature", "thoughtSignature", "encrypted_content",
             "content.encrypted", "reasoning_details.data")  # fmt: skip
TEXT_ENDS = tuple("." + key for key in TEXT_KEYS)
# Whatever these hold is said, however short it is
SAID_KEYS = {"content", "contents", "text", "value", "output", "thought", "thoughts", "thinking", "analysis",
             "thinking_content", "reasoning", "reasoning_content", "monologue", "internal_monologue",
             "explanation", "refusal", "answer", "alternatives", "stdout", "stderr", "error"}  # fmt: skip
KIND_KEYS = ("type", "kind", "role", "subtype", "action", "observation", "source")
CALL_NAMES = ("name", "function_name", "tool_name", "function")
TAGS = re.compile(r"\n|</?\w+>")


def strings_of(value):
    """Every string in a JSON value, keys too."""
    strings, stack = [], [value]
    while stack:
        value = stack.pop()
        if isinstance(value, str):
            strings.append(value)
        elif isinstance(value, dict):
            stack += [*value.keys(), *value.values()]
        elif isinstance(value, list):
            stack += value
    return strings


class Kept:
    """What stands in a row or was left out by name: its texts and its calls."""

    def __init__(self, messages, tools, named):
        texts = strings_of([messages, tools, named])
        self.exact = {text.strip() for text in texts}
        self.joined = "\n".join(texts)
        functions = []
        for message in messages:
            functions += [call["function"] for call in message.get("tool_calls", [])]
        self.calls = {(call["name"], canonical(call["arguments"])) for call in functions}

    def has(self, text):
        """The text as it is, as JSON that was read, or in pieces between line ends and tags."""
        text = text.strip()
        if text in self.exact or text in self.joined:
            return True
        if text[0] in "[{":
            with contextlib.suppress(ValueError, RecursionError):
                parts = strings_of(json.loads(text))
                return all(len(part) < SHORTEST or self.has(part) for part in parts)
        pieces = [piece.strip() for piece in TAGS.split(text)]
        return len(pieces) > 1 and all(self.has_piece(piece) for piece in pieces)

    def has_piece(self, piece):
        return piece in self.joined or piece[:1] in ("[", "{") and len(piece) >= SHORTEST and self.has(piece)

    def has_call(self, name, arguments):
        free_text = isinstance(arguments, str) and canonical(arguments) == arguments
        return (name, canonical(arguments)) in self.calls or free_text and arguments in self.joined


def canonical(arguments):
    """Arguments as one text: equal for an object and its JSON string in any order of keys."""
    while isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except (ValueError, RecursionError):
            return arguments
    return json.dumps(arguments or {}, sort_keys=True)


def lost_content(record, kept: Kept, kinds, left_out):
    """The dotted path of the first text or call of the record that is not kept; None if all are."""
    for path, value in entries_of(record, kinds, left_out):
        if isinstance(value, str):
            if is_text(path, value) and not kept.has(value):
                return path[1:]
        elif call := lost_call(value, kept):
            return f"{path[1:]} call {call}"
    return None


def entries_of(record, kinds, left_out):
    """Yield (".path", value) of the strings and objects of a record, but for what its reader leaves out.

    kinds, left_out: the reader's tables. Passed over is an entry whose kind is "left out: ..." in kinds or is
    in left_out, and what lies under a dotted path of left_out (the end of a path is enough).
    """
    passed = {kind for kind, place in kinds.items() if place.startswith("left out")} | left_out.keys()
    ends = tuple("." + path for path in (*left_out, *ENCRYPTED))
    stack = [("", record)]
    while stack:
        path, value = stack.pop()
        if path.endswith(ends):
            continue
        if isinstance(value, list):
            stack += [(path, item) for item in value]
        elif isinstance(value, str):
            yield path, value
        elif isinstance(value, dict) and not is_passed(value, passed):
            yield path, value
            stack += [(f"{path}.{key}", item) for key, item in value.items()]


def is_passed(entry, passed):
    """Does one of the keys that tell what an entry is name a kind that is passed over?"""
    return any(isinstance(entry.get(key), str) and entry[key] in passed for key in KIND_KEYS)


def is_text(path, value):
    """Long enough for a text, and no identifier; or what a key for texts holds."""
    if path.rpartition(".")[2] in SAID_KEYS:
        return True
    is_long = len(value) > LONGEST_NAME or path.endswith(TEXT_ENDS)
    return len(value) >= SHORTEST and (is_long or not IDENTIFIER.fullmatch(value))


def lost_call(value, kept):
    """The name of the call that an object is, if the row does not have it."""
    name = first_of(value, CALL_NAMES)
    if not isinstance(name, str) or "role" in value:
        return None
    given = [value[key] for key in ("arguments", "args", "input") if isinstance(value.get(key), str | dict)]
    return None if all(kept.has_call(name, arguments) for arguments in given) else name


# 5. Inputs -> files -> records
HUB_SUFFIXES = (".json", ".jsonl", ".ndjson", ".traj", ".parquet", ".log", ".eval")
LOG_SUFFIXES = (*HUB_SUFFIXES, ".md", ".zip")
ARCHIVES = {".zip": "*", ".eval": "samples/*"}  # suffix: names of the logs in it; .eval is Inspect's
HUB_NAME = re.compile(r"(?:hf://datasets/|https://huggingface\.co/datasets/)?(\w[\w.-]*/[\w.-]+?)"
                      r"(?::([\w.-]+))?(?:/([\w.-]+))?(?:@([\w./-]+))?")  # fmt: skip


# One file, or a folder of OpenHands events; label is how rows and rejects name it
Unit = namedtuple("Unit", "path label")


def files_of(name):
    """{file: label} of an input: a file, a folder, a Hub id."""
    path = Path(name).expanduser()
    if path.is_dir() or path.is_file():
        return {file: str(file) for file in (walk(path) if path.is_dir() else [path])}
    if HUB_NAME.fullmatch(name) and not path.parent.is_dir() and path.suffix not in LOG_SUFFIXES:
        return hub_files(name)
    raise InputError(f"{name}: no such file or folder; give files, folders or Hub ids (owner/name)")


def find_units(inputs, own):
    """The files of the inputs, each once; this run's own outputs are left out."""
    units = {}
    for name in inputs:
        for file, label in files_of(name).items():
            if file.resolve() in own:
                check_overwrite(file, name)
                continue
            is_event = file.parent.name == "events" and file.name.startswith("event-")
            unit = Unit(file.parent, os.path.dirname(label)) if is_event else Unit(file, label)
            units.setdefault(unit.path.resolve(), unit)
    return list(units.values())


def check_overwrite(file, named):
    """An input that would be overwritten is an error; an earlier run's output in a folder is passed over."""
    settings = file.with_name(re.sub(r"(\.rejected|\.settings)?\.\w+$", "", file.name) + ".settings.json")
    if Path(named).is_file() or not settings.exists():
        raise InputError(f"{named}: the input {file} would be overwritten by this run's output; "
                         "give another --output_file")  # fmt: skip
    print(f"left out: {file}, this run's own output")


def walk(folder):
    """All files under a folder in order, linked folders included, each folder once."""
    seen = set()
    for root, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(root)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders.sort()
        yield from (path for name in sorted(files) if (path := Path(root, name)).is_file())


def hub_files(name):
    """{data file: label} of owner/name[:config][/split][@revision]; our own reader infers no schema."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    repository, config, split, revision = HUB_NAME.fullmatch(name).groups()

    def fetch(patterns):
        options = {"repo_type": "dataset", "revision": revision, "allow_patterns": patterns}
        return Path(snapshot_download(repository, **options))

    try:
        card = fetch(["README.md"]) / "README.md"
        patterns = data_files(card.read_text() if card.exists() else "", name, config, split)
        folder = fetch(patterns)
    except InputError:
        raise
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        why = " ".join(str(error).split())[:200]
        raise InputError(f"{name}: no such file, and not readable as a Hub data set ({why})") from None
    files = {}
    for file in walk(folder):
        label = str(file.relative_to(folder))
        if any(fnmatch.fnmatch(label, pattern) for pattern in patterns):
            files[file] = f"{repository}/{label}"
    return files


def data_files(card, name, config, split):
    """Patterns of the files of a configuration and split, from the front matter of a data set's card."""
    from datasets.data_files import sanitize_patterns
    from datasets.utils.metadata import MetadataConfigs
    from huggingface_hub import DatasetCard

    configs = MetadataConfigs.from_dataset_card_data(DatasetCard(card, ignore_metadata_errors=True).data)
    if config and config not in configs:
        raise InputError(f"{name}: no configuration {config}; it has {', '.join(configs)}")
    chosen = configs.get(config or configs.get_default_config_name() or next(iter(configs), None), {})
    if "data_files" not in chosen:
        start = f"{chosen.get('data_dir', '')}*{split or ''}*"
        return [f"{start}{suffix}*" for suffix in HUB_SUFFIXES]
    splits = {str(one): patterns for one, patterns in sanitize_patterns(chosen["data_files"]).items()}
    if split and split not in splits:
        raise InputError(f"{name}: no split {split} in its card; it has {', '.join(splits)}")
    return splits[split] if split else sum(splits.values(), [])


def read_bytes(path):
    """A file's content, unpacked if it is .gz or .zst."""
    try:
        if path.suffix == ".zst":
            import pyarrow

            return pyarrow.CompressedInputStream(str(path), "zstd").read()
        content = path.read_bytes()
        return gzip.decompress(content) if path.suffix == ".gz" else content
    except (OSError, EOFError, RuntimeError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise Reject(f"unreadable: {error}") from None


def json_lines(path, notes):
    """Yield (line number, value, or the Reject that says why the line is none) of a JSONL file.

    A last line that a kill cut short is left out and counted, as are the NUL bytes of a lost write.
    """
    is_plain = isinstance(path, Path) and path.suffix not in (".gz", ".zst")
    with open(path, "rb") if is_plain else io.BytesIO(read_bytes(path)) as file:
        for number, line in enumerate(file, 1):
            text = line.strip(b"\0 \r\n\t")
            if not text:
                continue
            try:
                yield number, parse_json(text)
            except (ValueError, RecursionError) as error:
                if number > 1 and not line.endswith(b"\n"):
                    notes["last line cut short: left out"] += 1
                else:
                    yield number, Reject(f"unreadable: line {number} is not valid JSON ({error})")


def json_values(path, notes):
    """The same of a .json file: the elements of an array, lines, or (None, the one value)."""
    content = read_bytes(path)
    try:
        value = parse_json(content)
    except (ValueError, RecursionError) as error:
        with contextlib.suppress(ValueError, RecursionError):
            if isinstance(parse_json(content.split(b"\n", 1)[0]), dict):
                return json_lines(path, notes)
        raise Reject(f"unreadable: not valid JSON ({error})") from None
    return enumerate(value, 1) if isinstance(value, list) else [(None, value)]


def parquet_rows(path):
    """(number, row) of a Parquet file; the nulls that Arrow put into its dicts are taken out again."""
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=100):
            for row in batch.to_pylist():
                number += 1
                yield number, drop_nulls(row)
    except (pyarrow.ArrowException, OSError) as error:
        raise Reject(f"unreadable: {error}") from None


def drop_nulls(value):
    if isinstance(value, dict):
        return {key: drop_nulls(item) for key, item in value.items() if item is not None}
    return [drop_nulls(item) for item in value] if isinstance(value, list) else value


def values_of(path, notes):
    """The (number, value or Reject) of what a file lists, or (None, value) of the one that it holds."""
    name = re.sub(r"\.(gz|zst)$", "", path.name.lower())
    if path.is_dir():
        return enumerate((parse_json(file.read_bytes()) for file in sorted(path.glob("event-*.json"))), 1)
    if name.endswith((".jsonl", ".ndjson")):
        return json_lines(path, notes)
    if name.endswith(".parquet"):
        return parquet_rows(path)
    if name.endswith((".md", ".log")):
        return [(None, read_bytes(path).decode(errors="replace"))]
    if name.endswith(LOG_SUFFIXES):
        return json_values(path, notes)
    raise Reject("not_a_log: no suffix of a log")


def read_unit(unit, readers, notes):
    """Yield (source, format or None, record or Reject) for every session of a file, rows as they come."""
    if unit.path.suffix in ARCHIVES:
        for member in members_of(unit):
            yield from read_safely(member, readers, notes)
        return
    numbered = iter(values_of(unit.path, notes))
    first = next(numbered, (1, Reject("unreadable: nothing in it")))
    numbered = itertools.chain([first], numbered)
    is_own = isinstance(first[1], dict) and any(reader.fits(first[1]) for reader in BUILT_IN)
    is_row = is_own and not find_format([first[1]], readers)  # of this script's, and no session's beginning
    if first[0] is None or ".parquet" in unit.path.name or is_row:
        yield from each(unit, numbered, readers)
    else:
        yield from read_list(unit, list(numbered), readers)


def read_list(unit, numbered, readers):
    """What a file lists is one session, if a reader takes the whole list; else each value is one."""
    values = [value for _, value in numbered if not isinstance(value, Reject)]
    reader = find_format(values, readers) if values else None
    if reader is None and any(find_format(value, readers) for value in values):
        yield from each(unit, numbered, readers)
    elif len(values) < len(numbered):  # a session without one of its lines is none
        yield unit.label, None, next(value for _, value in numbered if isinstance(value, Reject))
    else:
        yield from each(unit, [(None, values)], readers)


def members_of(archive):
    """The files in a zip archive."""
    try:
        packed = zipfile.ZipFile(archive.path)
    except (OSError, zipfile.BadZipFile) as error:
        raise Reject(f"unreadable: {error}") from None
    for name in fnmatch.filter(packed.namelist(), ARCHIVES[archive.path.suffix]):
        if not name.endswith("/"):
            yield Unit(zipfile.Path(packed, name), f"{archive.label}/{name}")


def each(unit, numbered, readers):
    """Every value as a record of its own; one that no reader can take ends none of the others."""
    for number, value in numbered:
        source = f"{unit.label}:{number}" if number else unit.label
        try:
            if isinstance(value, Reject):
                raise value
            reader = find_format(value, readers)
            if reader and reader.split:
                parts = enumerate(reader.split(value), 1)
                yield from [(f"{source}:{part}", reader, record) for part, record in parts]
            elif reader:
                yield source, reader, value
            else:  # say what was met
                one = value[0] if isinstance(value, list) and value else value
                what = f"keys {', '.join([*one][:8])}" if isinstance(one, dict) else type(value).__name__
                raise Reject(f"not_a_log: no reader fits ({what})")
        except MALFORMED as error:
            yield source, None, reject_of(error)


def read_all(units, readers, notes):
    """Yield (source, format or None, record or Reject) for every session of all units.

    Dumps hold one API call each: a call whose conversation continues in another dump is part of that one.
    Hashes of conversations are kept until all files are read; then the files with a last dump are read again.
    """
    dumps, continued, thoughts = {}, set(), {}
    for unit in tqdm(units, unit=" files", disable=None):
        for source, reader, record in read_safely(unit, readers, notes):
            states = states_of(record) if reader and reader.name == "openai_dump" else []
            if states:
                continued.update(state for _, _, state in states[:-1])
                dumps[states[-1][2]] = (unit, source)
                thoughts |= {state: thought for _, thought, state in states if thought}
            else:
                yield source, reader, record
    last = {place: None for key, place in dumps.items() if key not in continued}
    yield from read_dumps(last, readers, thoughts)


def read_dumps(places, readers, thoughts):
    """The dumps at some places, read again and with the reasoning that those before them hold."""
    for unit in dict.fromkeys(unit for unit, _ in places):
        for source, reader, record in read_safely(unit, readers, Counter()):
            if (unit, source) in places:
                restore_thoughts(record, thoughts)
                yield source, reader, record


def read_safely(unit, readers, notes):
    """read_unit(), where a file that cannot be read is one reject and no end of the run."""
    try:
        yield from read_unit(unit, readers, notes)
    except Reject as reject:
        yield unit.label, None, reject
    except (OSError, *MALFORMED) as error:
        yield unit.label, None, Reject(f"unreadable: {error}")


# 6. One record -> one row
# What a column tells, by its name, or without what stands around it: tests_passed, isResolved, success_rate
AROUND = re.compile(r"^(?:(?:is|was|has|task|issue|instance|all|tests?|trajectory|problem|final|total|mean"
                    r"|eval|exit|end|termination)_)+|_rate$|@\d+$")  # fmt: skip
OUTCOMES = {
    "success": "resolved success successful succeeded solved passed pass correct accepted",
    "failure": "failed failure aborted truncated cancelled crashed timeout timed_out is_error has_error",
    "end": "exit_status exit_code finish_reason stop_reason",
    "error": "error exception exception_info error_message error_type failure_mode failure_reason",
    "word": "result status outcome verdict termination reason resolved_status",
    "reward": "reward",
    "done": "completed label target",  # one of False is a failure, any other may be about something else
}
COLUMN_KINDS = {}
for kind, names in OUTCOMES.items():
    COLUMN_KINDS |= dict.fromkeys(names.split(), kind)
GOOD_ENDS = {
    "stop", "end_turn", "tool_calls", "tool_use", "function_call", "stop_sequence", "submitted", "submit",
    "completed", "complete", "success", "successful", "ok", "done", "finished", "finish", "resolved", "",
    "tooluse", "unknown", "end", "eos", "eos_token", "stop_token", "end_of_turn", "finish_reason_stop",
}  # fmt: skip
NO_ERROR = ("", "{}", "none", "null", "no", "false", "unset")
BAD_RESULT = re.compile(r"(?i)(?:not[ _-]\w+ed|max_\w+|\w*(?:errors?|exception|time_?out|fail|failed|failure"
                        r"|unresolved|unsolved|resolved_no|incorrect|incomplete|wrong|cancell?ed|aborted"
                        r"|exceeded|killed))(?::.*)?")  # fmt: skip
# A history that was summarised starts in the middle of its task
COMPACTION = ("<state_snapshot>", "This session is being continued from a previous conversation")


def is_compacted(text):
    return any(mark in text for mark in COMPACTION)


def outcome(columns, depth=0):
    """Why a log says that its task was not solved: "COLUMN=VALUE"; None: it was, or nobody knows."""
    for key, value in columns.items():
        if tells_failure(key, value):
            return f"{key}={value}"
        if isinstance(value, str) and value.startswith("{"):
            with contextlib.suppress(ValueError, RecursionError):
                value = json.loads(value)
        is_told = isinstance(value, dict) and depth < 3 and not key.endswith(("config", "settings"))
        if is_told and (found := outcome(value, depth + 1)):
            return f"{key}.{found}"
    return None


def as_number(text):
    with contextlib.suppress(ValueError):
        return float(text)


def tells_failure(key, value):
    key = plain_name(key)
    kind = COLUMN_KINDS.get(key) or COLUMN_KINDS.get(AROUND.sub("", key))
    text = str(value).lower() if isinstance(value, str | int | float | dict) else ""
    number = as_number(text)
    is_failure = {
        "success": text in ("false", "no", "failed") or number in (0, -1),
        "failure": value is True,
        "end": number != 0 if number is not None else text.replace("-", "_") not in GOOD_ENDS,
        "error": number is None and text not in NO_ERROR,
        "word": value is False or bool(BAD_RESULT.fullmatch(text)),
        "reward": number is not None and number <= 0,
        "done": value is False,
    }
    return is_failure.get(kind, False)


@dataclass
class Run:
    """What all records of a run share."""

    settings: Settings
    tools: dict  # format, or "" for all: schemas
    tasks: dict  # text of the first turn: task
    benchmark: dict  # first words: [(all words, task)]
    conditions: list  # of --where: (column, operator, value)
    tokenizer: object = None
    notes: Counter = field(default_factory=Counter)
    columns: set = field(default_factory=set)  # every column of meta that was met, for --where


def make_row(source, reader: Format, record, run: Run):
    """A record -> its row; raises Reject."""
    try:
        loose = reader.read(record)
        notes = Counter()
        if loose.get("lacks_prompt"):
            loose["messages"].insert(0, prompt_of(source, run.tasks))
        messages, cut = normalise(loose["messages"], notes)
        row = {"query_id": None, "messages": messages, "tools": [], "meta": loose.get("meta") or {}}
        given = read_tools(loose.get("tools"))
        cut += cut_tool_list(row, given)
        row["tools"] = given or tools_for(row, reader.name, run.tools)
        cut += cut_tool_list(row, row["tools"])  # of those that came from outside
        named = [loose.get("left_out"), cut, {} if "checked" in loose else row["meta"]]
        kept = Kept(row["messages"], row["tools"], named)
        if lost := lost_content(loose.get("checked", record), kept, reader.kinds, reader.left_out):
            raise Reject(f"lost_content: {lost}")
        row["query_id"], row["meta"] = describe(row["meta"], repair(source), reader.name)
        tie_to_task(row, run)
        return map_strings(row, repair), notes
    except MALFORMED as error:
        raise reject_of(error) from None


def prompt_of(source, tasks):
    """The prompt of a log that holds none: its file is named after a task."""
    task = tasks.get(re.sub(r"\.jsonl?(\.gz|\.zst)?$", "", Path(source).name))
    if task is None:
        raise Reject("no_prompt: not in the log; name its file QUERY_ID.jsonl after a task of --queries")
    return {"role": "user", "content": task["turns"][0]["query"]}


def cut_tool_list(row, tools):
    """Take the tools out of the system message: the template writes them again. Returns what was cut."""
    system = row["messages"][0]
    if system["role"] != "system":
        return []
    cut = cut_tag(system, tools) or cut_numbered(system, tools)
    if cut and not system["content"].strip():
        del row["messages"][0]
    return cut


def cut_tag(system, tools):
    """Hermes' tag, if the row's tools stand in it, or the row has none: then it takes these."""
    found = TOOLS_TAG.search(system["content"])
    for text in (found[1], found[1].splitlines()) if found else []:  # one JSON, or one a line
        with contextlib.suppress(Reject):
            listed = read_tools(text)
            tools += [] if tools else listed
            if listed and names_of(listed) == names_of(tools):
                system["content"] = system["content"].replace(found[0], "")
                return [found[0]]
    return []


def cut_numbered(system, tools):
    """The list that LIMI's converter wrote."""
    before, mark, after = system["content"].partition(TOOL_LIST)
    if not mark or not tools:
        return []
    described = "\n".join(strings_of(tools))
    names = {None} | names_of(tools)

    def belongs(line):
        found = TOOL_LINE.match(line)
        return line.strip() in described or bool(found) and found[1] in names

    lines = after.split("\n")
    listed = list(itertools.takewhile(belongs, lines))
    rest = "\n".join(lines[len(listed) :])
    system["content"] = f"{before}\n\n{rest}" if rest else before
    return [mark, *listed]


def names_of(tools):
    return {tool["function"]["name"] for tool in tools}


def called_names(messages):
    calls = itertools.chain.from_iterable(message.get("tool_calls", []) for message in messages)
    return [call["function"]["name"] for call in calls]


@functools.cache
def shipped_tools(name):
    path = HERE / "recipes/tools" / f"{name}.py"
    return load_tools(str(path)) if path.exists() else []


def tools_for(row, name, tools):
    """Schemas for a row that has none: those of --tools for its format, for all, or recipes/tools/FORMAT.py.

    Only where calls are, and only a list that has one of the called tools: another harness's list is none.
    """
    called = set(called_names(row["messages"]))
    if not called:
        return []
    for schemas in (tools.get(name, []), tools.get("", []), shipped_tools(name)):
        if called & names_of(schemas):
            return schemas
    raise Reject(f"no_tool_schemas: of {', '.join(sorted(called))[:80]}; give them with --tools")


def describe(meta, source, name):
    """(query_id, the row's meta): where it came from, and every column of the log."""
    # sorted: what a reader takes by a set of keys comes in another order each run, and so would train.jsonl
    meta = {key: meta[key] for key in sorted(meta, key=str) if meta[key] is not None}
    ids = [meta.get(key) for key in ID_COLUMNS]
    query_id = next((str(id) for id in ids if isinstance(id, str | int) and str(id)), None)
    meta.pop("query_id", None)
    if "id" in meta and str(meta["id"]) == query_id:
        del meta["id"]
    query_id = query_id or re.sub(r"[^\w.-]+", "-", Path(source).name)
    return query_id, {"source": source, "format": name} | meta


def squeeze(text):
    return " ".join(text.split())


def load_tasks(path):
    """{first turn's query, or query_id: task} of a stage-1 file."""
    tasks = {}
    lines = Path(path).read_bytes().rstrip().split(b"\n") if path else []
    for number, line in enumerate(lines, 1):
        try:
            task = json.loads(line)
            tasks[squeeze(task["turns"][0]["query"])] = tasks[task["query_id"]] = task
        except MALFORMED as error:
            why = f"no task ({type(error).__name__}: {error})"
            raise InputError(f"--queries {path}:{number}: {why}") from None
    return tasks


def tie_to_task(row, run):
    """Give a row the id, domain and source of its task, found by its id or in what the user says."""
    users = [squeeze(message["content"]) for message in row["messages"] if message["role"] == "user"]
    said = "\n".join(users)
    held = [query for query in run.tasks if len(query) >= SHORTEST and query in said]
    held.sort(key=len, reverse=True)  # one task's text may hold another's
    found = [run.tasks[key] for key in (row["query_id"], *users, *held) if key in run.tasks]
    if found:
        row["query_id"] = found[0]["query_id"]
        names = {"domain": "domain", "subdomain": "subdomain", "source": "query_source"}
        row["meta"] |= {name: found[0][key] for key, name in names.items() if key in found[0]}
    elif run.tasks:
        run.notes["no task of --queries fits the row"] += 1


def map_strings(value, change):
    """A JSON value with every string changed, keys too."""
    if isinstance(value, dict):
        return {change(key): map_strings(item, change) for key, item in value.items()}
    if isinstance(value, list):
        return [map_strings(item, change) for item in value]
    return change(value) if isinstance(value, str) else value


def repair(text):
    """JavaScript cuts strings between the halves of an emoji; tokenizers refuse the half that is left."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


# 7. Checks of one row: each gives reasons; a row without any goes on
MAX_REPEATS = 3  # of the same failing call
MAX_SAME = 10  # of the same call with the same result
EXIT_CODE = re.compile(
    r"(?i)\b(?:exit(?:ed)?[ _]?(?:with )?(?:code|status)?|return_?code)\b[\W_]{1,4}(-?\d+)\b")
FAILURE = re.compile(
    r"(?im)^\W*(?:error|fatal|failure|failed|invalid|unknown tool|killed|aborted|npm err|tool_use_error)\b"
    r"(?!:? \(?none)|^\W*traceback \(most recent|^[\w.]*(?:Error|Exception)\b(?::|$)"
    r"|^.{0,80}(?:command not found|no such file|file not found|permission denied|timed out|does not exist"
    r"|unknown tool|no tool named|not a (?:valid|known) tool|is disabled|disabled by default|cannot access)"
    r"|\b[1-9]\d* (?:failed|errors?)\b|<tool_use_error>")
# One of these stands in whatever FAILURE finds; most results have none, and looking for them is quick
FAILURE_WORDS = (
    "error", "exception", "fail", "fatal", "invalid", "unknown", "killed", "abort", "npm", "traceback",
    "denied", "not found", "no such", "timed out", "not exist", "no tool", "not a", "disabled",
    "cannot access",
)  # fmt: skip


def failed(answer):
    """Did a call fail? By the exit code, if the result has one; else by words where errors stand."""
    if codes := EXIT_CODE.findall(answer):
        return int(codes[-1]) != 0
    words = answer.lower()
    return any(word in words for word in FAILURE_WORDS) and bool(FAILURE.search(answer))


# A call with its result; bad says why it is none that the tools allow
Step = namedtuple("Step", "message name arguments answer failed bad")


def steps_of(messages, tools):
    required = {}
    for tool in tools:
        parameters = tool["function"].get("parameters", {})
        # Go writes null for none
        required[tool["function"]["name"]] = strings_of(parameters.get("required"))[::-1]
    answers = {message.get("tool_call_id"): message["content"] for message in messages}
    steps = []
    for message in messages:
        for call in message.get("tool_calls", []):
            name = call["function"]["name"]
            arguments = call["function"]["arguments"]
            missing = [key for key in required.get(name, []) if key not in arguments]
            bad = f"missing_argument: {name} {', '.join(missing)}" if missing else None
            bad = bad if name in required else f"undeclared_tool: {name}"
            answer = answers.get(call["id"], "")
            steps.append(Step(message, name, arguments, answer, failed(answer), bad))
    return steps


def check_calls(messages, tools, settings):
    """Bad calls and loops; with --weight_bad_calls 0 turns of bad and failed calls lose their weight instead.

    A bad call that the tool answered with an error and that a good call followed stays: it was repaired.
    """
    steps = steps_of(messages, tools)
    reasons = loops(steps)
    if settings.weight_bad_calls == 0:
        for step in steps:
            if step.bad or step.failed:
                step.message["weight"] = 0
        return reasons
    last_good = max((number for number, step in enumerate(steps) if not step.bad), default=-1)
    return reasons + [step.bad for number, step in enumerate(steps)
                      if step.bad and not (step.failed and number < last_good)]  # fmt: skip


def loops(steps):
    """The same call, or two in turn, with the same result again and again: 3 times failing, 10 times at all.

    Numbers in a failure do not count: the time of day changes.
    """
    signatures = []
    for step in steps:
        answer = re.sub(r"\d+", "0", step.answer) if step.failed else step.answer
        signatures.append((step.name, canonical(step.arguments), answer))
    reasons = []
    for period in (1, 2):
        same = 0
        for number in range(period, len(steps)):
            same = same + 1 if signatures[number] == signatures[number - period] else 0
            any_failed = any(step.failed for step in steps[number - period + 1 : number + 1])
            if same >= ((MAX_REPEATS if any_failed else MAX_SAME) - 1) * period:
                reasons.append(f"loop: {steps[number].name}")
    return list(dict.fromkeys(reasons))


def check_structure(row, notes, settings):
    """An outcome worth learning, a whole history, a last answer."""
    reasons = []
    if (why := outcome(row["meta"])) and not settings.keep_failed:
        reasons.append(f"not_solved: {why}")
    users = "\n".join(message["content"] for message in row["messages"] if message["role"] == "user")
    if is_compacted(users):
        reasons.append("compacted")
    if notes["unfinished"] and settings.reject_unfinished:
        reasons.append("no_final_answer")
    return reasons


NGRAM = 13  # words; the usual overlap test for benchmark prompts since GPT-3
CJK = "\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"  # no spaces between words: every character counts as one
WORD = re.compile(rf"[{CJK}]|[^\W_{CJK}]+")


def words_of(text):
    """Words without case, marks, widths and what cannot be seen."""
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text)
        text = "".join(letter for letter in text if unicodedata.category(letter) != "Cf")
    return WORD.findall(text.lower())


def benchmark_texts(name):
    """Yield (task, text) of an AgencyBench clone (v1 tasks and v2 descriptions), or of one file."""
    path = Path(name)
    files = [path] if path.is_file() else [*path.rglob("Task*.json"), *path.rglob("description.json")]
    if not files:
        raise InputError(f"--benchmark {name}: no such file, nor a folder with AgencyBench's task files")
    for file in sorted(files):
        task = file.name if file == path else str(file.relative_to(path))
        try:
            values = [value for _, value in values_of(file, Counter())]
        except Reject:  # a text
            values = [file.read_text(errors="replace")]
        for bad in (value for value in values if isinstance(value, Reject)):
            raise InputError(f"--benchmark {file}: {bad}")
        yield from ((task, text) for text in strings_of(values))


def load_benchmark(paths):
    """{first 5 words: {(up to 13 words, task)}}; a shorter text counts as a whole, under 5 words not."""
    index = defaultdict(set)
    for task, text in itertools.chain.from_iterable(map(benchmark_texts, paths or [])):
        words = words_of(text)
        for start in range(max(len(words) - NGRAM, 0) + 1):
            gram = tuple(words[start : start + NGRAM])
            index[gram[:5]].add((gram, task))
    return {start: grams for start, grams in index.items() if len(start) == 5}


def overlap(messages, benchmark):
    """The tasks of which 13 words in a row (a shorter task: all of it) stand in a row, whoever says them."""
    tasks = set()
    for message in messages if benchmark else []:
        words = words_of("\n".join(strings_of(message)))
        for start in range(len(words) - 4):
            for gram, task in benchmark.get(tuple(words[start : start + 5]), ()):
                if tuple(words[start : start + len(gram)]) == gram:
                    tasks.add(task)
    return [f"benchmark_overlap: {task}" for task in sorted(tasks)]


CONDITION = re.compile(r"([^=!<>]+)(!=|=|<|>)(?!=)(.*)", re.DOTALL)


def conditions_of(settings):
    """[(column, operator, value)] of --where."""
    found = []
    for text in settings.where or []:
        match = CONDITION.fullmatch(text)
        if not match:
            raise InputError(f"--where {text}: write KEY=VALUE, KEY!=VALUE, KEY<NUMBER or KEY>NUMBER")
        found.append((match[1].strip(), match[2], match[3].strip()))
    return found


def column_of(row, name):
    """A column of meta, a.b inside it, or query_id; None if the row does not have it."""
    value = {"query_id": row["query_id"]} | row["meta"]
    if name in value:
        return value[name]
    for key in name.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return value


def holds(value, operator, wanted):
    """Does a column's value fulfil a condition? Texts are compared as texts, numbers as numbers."""
    number = as_number(wanted)
    is_number = isinstance(value, int | float) and number is not None
    if operator in "<>":
        return is_number and (value < number if operator == "<" else value > number)
    equal = str(value).lower() == wanted.lower() or is_number and value == number
    return equal == (operator == "=")


def check_where(row, conditions, columns):
    """Conditions that do not hold; several "=" on one column are alternatives."""
    wanted = defaultdict(list)
    for name, operator, value in conditions:
        found = column_of(row, name)
        columns |= {name} if found is not None else set()
        wanted[name, operator == "=" or value].append(holds(found, operator, value))
    return [f"not_selected: {name}" for (name, _), results in wanted.items() if not any(results)]


# 8. Secrets and private names
# What pybetterleaks 0.6.2 does not find; letters first and \b after: re looks for letters ten times as fast
NEXT = r"(?:\s|\\+[nr])+(?:\d*[^\w+/=\\-]{1,4})?"  # a line's end, also in JSON, and what begins the next
OWN_SECRETS = {
    "aws-access-key-id": re.compile(r"A(?<!\wA)(?:KIA|SIA)[A-Z0-9]{16}\b"),
    "aws-secret-access-key": re.compile(r"(?i)(?<=secret_access_key)[\"' ]*[:=][\"' ]*[a-z0-9/+=]{40}\b"),
    "github-fine-grained-pat": re.compile(r"github_pat_\w{22,}"),
    "openai-api-key": re.compile(  # SiliconFlow's have no digit
        r"sk-(?<!\wsk-)(?!ant-|or-)(?:proj-|svcacct-)?(?=[A-Za-z_]*\d|[a-z]{48}\b)[A-Za-z0-9_]{32,}"),
    "huggingface-token": re.compile(r"hf_(?<!\whf_)[A-Za-z0-9]{30,}"),
    "zai-api-key": re.compile(r"\b[0-9a-f]{32}\.[A-Za-z0-9]{16}\b"),
    "bearer-token": re.compile(r"[Bb]earer (?=[A-Za-z._-]*\d)[\w.~+/-]{30,}=*"),
    "authorization": re.compile(r"[Aa]uthorization[\"': ]+[Bb]asic [\w+/]{30,}=*"
                                r"|[Xx]-[Aa][Pp][Ii]-[Kk]ey[\"': ]+(?=[A-Za-z._-]*\d)[\w.-]{30,}"),
    "named-token": re.compile(r"\b(?:(?:sk-ant-[a-z]+\d+-|sk-lf-|pcsk_|whsec_|GOCSPX-|ya29\.|tskey-|sntrys_"
                              r"|ATATT3|tvly-)[\w-]{20}|lsv2_[ps][tk]_[0-9a-f]{32}_|ntn_[A-Za-z0-9]{40}"
                              r"|e2b_[0-9a-f]{40}|fc-[0-9a-f]{32})[\w-]*"),
    "telegram-bot-token": re.compile(r":AA(?<=\d{8}:AA)[\w-]{33}\b"),
    "azure-sas": re.compile(r"[?&]sig=[\w%+/]{40,}"),
    "private-key-cut": re.compile(rf"-----BEGIN [A-Z ]*PRIVATE KEY(?: BLOCK)?-----(?:{NEXT}[\w-]+: .*)*"
                                  rf"(?:{NEXT}-?[A-Za-z0-9+/=]{{30,}})+(?:{NEXT}-----END [A-Z ]*-----)?"),
    "password-in-url": re.compile(r"\b[a-z][a-z0-9+.-]{1,20}://[^\s/:@<>{}$*]{0,64}:[^\s/:@]{3,128}@"
                                  r"(?!localhost|127\.|10\.|192\.168\.|\[::1\]|0\.0\.0\.0)[\w.-]+"),
}  # fmt: skip
NO_SECRETS = re.compile(  # AWS's documentation, jwt.io, passwords that everybody has
    r"EXAMPLE|eyJzdWIiOiIxMjM0NTY3ODkw|://[^/]*(?i::(?:guest|pass|password|postgres|root|user|admin|example"
    r"|secret|test|xxx+|\*+|[<{$].*|your[_-]?\w*|my[_-]?\w*)@)")
PRIVATE = (  # replaced by --redact; git@host is nobody's address, name@2x.png and lodash@4.17.js no mail
    (re.compile(r"((?:/home|/Users|\\Users)[/\\]+)[\w.-]+"), r"\1user"),
    (re.compile(r"([/\\](?:[A-Z]-)?-(?:home|Users)-)\w+"), r"\1user"),  # a folder of Claude Code
    (re.compile(r"\b(?!git@)[\w.+-]{1,64}@(?!\d+(?:x|\.\d))(?:[\w-]{1,64}\.){1,8}"
                r"(?!(?:png|jpe?g|gif|svg|webp|[cm]?[jt]sx?|py|md|json|css|html?)\b)[A-Za-z]{2,}\b"),
     "user@example.com"),
)  # fmt: skip
APART = "\n\x1f\n"  # between two strings: no secret holds it
# Characters of a scan. It costs 10 ms before it begins, and looks for every kind of secret whose key word
# stands somewhere in them: 1 MB of Python code takes 2.8 s at once, 1.9 s in such pieces
PIECE = 250_000


def scan(texts):
    """{secret: its kind} of texts, by pybetterleaks, on all cores: it holds no lock of Python's."""
    try:
        from pybetterleaks import scan_text
    except ImportError:
        raise InputError("secrets are found by pybetterleaks: pip install pybetterleaks==0.6.2") from None
    pieces, size = [], PIECE
    for text in texts:
        if size >= PIECE:
            pieces.append([])
            size = 0
        pieces[-1].append(text)
        size += len(text)
    found = {}
    with ThreadPoolExecutor() as pool:
        look = functools.partial(scan_text, redact=False, raise_on_error=True)
        for result in pool.map(look, map(APART.join, pieces)):
            found |= {finding.secret: finding.rule_id for finding in result.findings}
    return found


def find_secrets(rows):
    """[{secret: its kind}] for each row; what several of them say is looked at once."""
    strings = [dict.fromkeys(strings_of(row)) for row in rows]
    scanned = scan(dict.fromkeys(itertools.chain(*strings)))
    found = []
    for text in map(APART.join, strings):
        secrets = {secret: kind for secret, kind in scanned.items() if secret in text}
        for kind, pattern in OWN_SECRETS.items():
            for match in pattern.finditer(text):
                secrets.setdefault(match[0].strip(), kind)
        found.append({secret: kind for secret, kind in secrets.items() if not NO_SECRETS.search(secret)})
    return found


def redact(row, secrets):
    """The row without its secrets (longest first: one may hold another), home paths and addresses."""
    def clean(text):
        for secret in sorted(secrets, key=len, reverse=True):
            text = text.replace(secret, f"<{secrets[secret]}>")
        for pattern, replacement in PRIVATE:
            text = pattern.sub(replacement, text)
        return text

    return map_strings(row, clean)


# 9. The run: rows in a nameless file -> comparison of rows -> files
def load_tokenizer(name):
    """The tokenizer by its tokenizer.json; AutoTokenizer, five times as slow to import, only without one."""
    from transformers import PreTrainedTokenizerFast

    try:
        try:
            tokenizer = PreTrainedTokenizerFast.from_pretrained(name)
        except (OSError, ValueError):
            from transformers import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise InputError(f"--tokenizer {name}: {str(error).partition(chr(10))[0]}") from None
    if not tokenizer.chat_template:
        raise InputError(f"--tokenizer {name}: it has no chat template; name the model that is trained")
    if tokenizer.is_fast:  # count_tokens() asks the tokenizer beneath, which may be told to cut
        tokenizer.backend_tokenizer.no_truncation()
        tokenizer.backend_tokenizer.no_padding()
    return tokenizer


def load_tools(path):
    """Schemas of a JSON list, of any object with "tools" (a logged request), or of a tools file's TOOLS."""
    try:
        if path.endswith(".py"):
            return read_tools(runpy.run_path(path)["TOOLS"])
        return read_tools(json.loads(Path(path).read_bytes()))
    except (ImportError, NameError, SyntaxError, *MALFORMED) as error:
        why = f"{type(error).__name__}: {error}"
        raise InputError(f"--tools {path}: no list of tool schemas ({why})") from None


def check_length(row, run):
    """Count a row's tokens, by the chat template; more than --max_length are a reason."""
    from jinja2 import TemplateError

    tokenizer = run.tokenizer
    try:
        text = tokenizer.apply_chat_template(row["messages"], tools=row["tools"] or None, tokenize=False)
    except TemplateError as error:
        return [f"chat_template: {error}"]
    if tokenizer.is_fast:
        [encoded] = tokenizer.backend_tokenizer.encode_batch_fast([text], add_special_tokens=False)
    else:
        encoded = tokenizer(text, add_special_tokens=False)["input_ids"]
    row["meta"]["n_tokens"] = len(encoded)
    return [f"over_long: {len(encoded)} tokens"] if len(encoded) > run.settings.max_length else []


def finish_row(row, notes, secrets, run):
    """The checks of a row that is complete: (row, reasons)."""
    settings = run.settings
    for _ in range(3 if settings.redact else 0):  # a pair is found as one: then its rest comes to light
        row = redact(row, secrets)
        secrets = secrets and find_secrets([row])[0]
    reasons = [f"secret: {kind}" for kind in sorted(set(secrets.values()))]
    reasons += check_structure(row, notes, settings) + check_calls(row["messages"], row["tools"], settings)
    reasons += overlap(row["messages"], run.benchmark)
    if run.tokenizer and not reasons:
        reasons += check_length(row, run)
    reasons += check_where(row, run.conditions, run.columns)
    return row, reasons


TOLD = {"cut": "what follows the last answer was cut", "greeting": "a greeting is context",
        "merged": "assistant messages in a row became one"}  # fmt: skip
BATCH = 64  # rows whose secrets are looked for together: what they share is looked at once


def make_all(records, run):
    """Yield (source, format, row, notes) of every record, or (source, format, None, the reject)."""
    for source, reader, record in records:
        name = reader.name if reader else "none"
        try:
            if isinstance(record, Reject):
                raise record
            yield source, name, *make_row(source, reader, record, run)
        except Reject as reject:
            yield source, name, None, reject


def format_all(records, run):
    """Yield (source, format, row or None, reasons) of every record."""
    made = make_all(records, run)
    with ThreadPoolExecutor() as pool:  # counting tokens holds no lock of Python's either
        while batch := list(itertools.islice(made, BATCH)):
            secrets = iter(find_secrets([row for _, _, row, _ in batch if row]))
            finished = {}
            for place, (_, _, row, notes) in enumerate(batch):
                if row:
                    finished[place] = pool.submit(finish_row, row, notes, next(secrets), run)
            for place, (source, name, row, notes) in enumerate(batch):
                row, reasons = finished[place].result() if row else (None, [str(notes)])
                if not reasons:
                    run.notes.update(text for key, text in TOLD.items() if notes[key])
                yield source, name, row, reasons


@dataclass(eq=False)  # counted by identity
class Card:
    """What stays in memory of a record: why it is no row, or what the comparison of rows needs of its row."""

    source: str
    format: str
    reasons: list[str]
    place: int  # of its line in the spill file
    key: str = ""  # the same for equal conversations
    lines: array | tuple = ()  # hashes of the lines that are not the system's
    domain: str = ""
    tokens: int = 0


def said(message):
    """What a message says, without its ids: role, text, reasoning, calls."""
    calls = [json.dumps(call["function"], sort_keys=True) for call in message.get("tool_calls", [])]
    return [message["role"], message["content"], message.get("reasoning_content", ""), *calls]


def describe_row(card, row):
    messages = list(map(said, row["messages"]))
    lines = set()
    for role, text, reasoning, *calls in messages:
        if role != "system":
            lines |= {line.strip() for line in f"{text}\n{reasoning}".splitlines()} | set(calls)
    card.lines = array("I", sorted(zlib.crc32(line.encode()) for line in lines if line))
    card.key = hashlib.sha256(json.dumps(messages).encode()).hexdigest()
    card.domain = str(row["meta"].get("domain", "unknown"))
    card.tokens = row["meta"].get("n_tokens", 0)


def rows_of(cards):
    return [card for card in cards if not card.reasons]


def reject_duplicates(cards, settings):
    """Equal conversations but the first; of near-duplicates the longer one stays."""
    first = {}
    for card in cards:
        if first.setdefault(card.key, card) is not card:
            card.reasons = [f"duplicate: of {first[card.key].source}"]
    owners = defaultdict(list)  # hash of a line: the kept rows that have it
    for card in sorted(first.values(), key=lambda card: -len(card.lines)):
        if near := nearest(card, owners, settings.near_duplicate):
            card.reasons = [f"near_duplicate: of {near.source}"]
            continue
        for line in card.lines:
            owners[line].append(card)


def nearest(card, owners, share):
    """A longer row that has this share of a row's lines, among the three with most of 64 of them; None."""
    lines = set(card.lines)
    shared = Counter()
    for line in card.lines[:64]:  # the same ones for equal sets of lines
        shared.update(owners.get(line, ()))
    for owner, _ in shared.most_common(3) if len(lines) >= 5 else []:
        if len(lines.intersection(owner.lines)) >= share * len(lines):
            return owner
    return None


def stratify(cards, seed):
    """Cards in an order of which every prefix has the domains in proportion; by rows and seed alone."""
    order = sorted(cards, key=lambda card: hashlib.sha256(f"{seed} {card.key}".encode()).digest())
    sizes = Counter(card.domain for card in cards)
    ranks = defaultdict(itertools.count)
    places = {card.place: (next(ranks[card.domain]) + 0.5) / sizes[card.domain] for card in order}
    return sorted(order, key=lambda card: places[card.place])


@contextlib.contextmanager
def only_run(output):
    """One run per output; the lock lies in the system's temporary folder and ends with the process."""
    name = hashlib.sha256(str(output.resolve()).encode()).hexdigest()[:16]
    with open(Path(tempfile.gettempdir(), f"02_format_trajectories.{name}.lock"), "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            told = f"another run writes {output}; wait for it or give another --output_file"
            raise InputError(told) from None
        yield


def publish(files):
    """Write {path: lines} under temporary names, then rename all: nobody sees a half-written file."""
    partials = {path: path.with_name(path.name + ".partial") for path in files}
    try:
        for path, lines in files.items():
            with open(partials[path], "w") as file:
                file.writelines(lines)
        for path, partial in partials.items():
            partial.replace(path)
    finally:
        for partial in partials.values():
            partial.unlink(missing_ok=True)


def spill_rows(entries, spill):
    """Write the rows into the spill file, a line of strict JSON each; returns a card for every record."""
    cards = []
    for source, name, row, reasons in entries:
        reasons = [repair(reason)[:200] for reason in dict.fromkeys(reasons)]
        card = Card(repair(source), name, reasons, spill.tell())
        cards.append(card)
        try:
            if not reasons:
                line = json.dumps(row, default=str, allow_nan=False)
                spill.write(line.encode() + b"\n")
                describe_row(card, row)
        except ValueError:
            card.reasons = ["not_strict_json: NaN or infinity"]
    return cards


def read_places(spill, places):
    for place in sorted(places):
        spill.seek(place)
        yield spill.readline().decode()


def count_reasons(cards):
    """[(reason, rejects)]; kinds of entries that no reader knows are counted by name too."""
    counts, kinds = Counter(), Counter()
    for card in cards:
        counts.update({reason.partition(":")[0] for reason in card.reasons})
        kinds.update(reason for reason in card.reasons if reason.startswith("unknown_kind"))
    return counts.most_common() + kinds.most_common()


def print_summary(cards, notes):
    """The terminal table: what came in by format, what went out and why."""
    print(f"{'format':<18}{'records':>10}{'rows':>10}{'tokens':>14}")
    for name, count in sorted(Counter(card.format for card in cards).items()):
        tokens = [card.tokens for card in rows_of(cards) if card.format == name]
        told = sum(tokens) or "-"  # without --tokenizer they are not counted
        print(f"{name:<18}{count:>10}{len(tokens):>10}{told:>14}")
    for text, count in sorted(notes.items()):
        print(f"{count} rows: {text}")
    for reason, count in count_reasons(cards):
        print(f"rejected {count:>9}  {reason}")


def settings_record(settings, units, counts):
    """What made the rows: settings, versions, the inputs' hashes."""
    hashes = {}
    for unit in units:
        if unit.path.is_file():
            with open(unit.path, "rb") as file:
                hashes[repair(unit.label)] = hashlib.file_digest(file, "sha256").hexdigest()
    versions = {"python": platform.python_version(),
                "script": hashlib.sha256(Path(__file__).read_bytes()).hexdigest()}  # fmt: skip
    for package in ("trl", "transformers", "pybetterleaks", "pyarrow"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    record = {"settings": asdict(settings), "versions": versions, "inputs": hashes, "counts": counts}
    return json.dumps(record, indent=1) + "\n"


def check_settings(settings):
    """Settings that cannot be, select nothing or do nothing are errors."""
    check_kinds(settings)
    if settings.max_samples is not None and settings.max_samples < 1:
        raise InputError(f"--max_samples {settings.max_samples}: at least 1")
    if settings.weight_bad_calls not in (0, 1):
        raise InputError(f"--weight_bad_calls {settings.weight_bad_calls}: 0 or 1")
    if settings.max_length != Settings.max_length and not settings.tokenizer:
        raise InputError("--max_length counts tokens: give --tokenizer")
    if Path(settings.output_file).is_dir():
        raise InputError(f"--output_file {settings.output_file}: a folder; name a file")
    if settings.readers != Settings.readers and not Path(settings.readers).is_dir():
        raise InputError(f"--readers {settings.readers}: no such folder")


def check_kinds(settings):
    """YAML may hold a value of another kind; a single name in it becomes a list."""
    for name in ("tools", "benchmark", "where"):
        if isinstance(getattr(settings, name), str):
            setattr(settings, name, [getattr(settings, name)])
    kinds = {name: (kind, ...) for name, kind in get_type_hints(Settings).items()}
    values = pydantic.create_model("Values", __config__=pydantic.ConfigDict(strict=True), **kinds)
    try:
        values.model_validate(vars(settings))
    except pydantic.ValidationError as error:
        problem = error.errors()[0]
        name = problem["loc"][0]
        raise InputError(f"--{name} {getattr(settings, name)!r}: {problem['msg']}") from None


def make_run(settings):
    tools = {}
    for spec in settings.tools or []:
        name, path = re.fullmatch(r"(?:(\w+)=)?(.*)", spec).groups("")
        if name in tools:
            raise InputError(f"--tools {spec}: a second list for {name or 'all formats'}; write FORMAT=FILE")
        tools[name] = load_tools(path)
    tokenizer = load_tokenizer(settings.tokenizer) if settings.tokenizer else None
    tasks, benchmark = load_tasks(settings.queries), load_benchmark(settings.benchmark)
    return Run(settings, tools, tasks, benchmark, conditions_of(settings), tokenizer)


def tools_seen(records):
    """{format: schemas} of the called tools and their argument names, a start for one's own list."""
    seen = defaultdict(lambda: defaultdict(dict))
    for _, reader, record in records:
        with contextlib.suppress(*MALFORMED):
            for message in normalise(reader.read(record)["messages"], Counter())[0]:
                for call in message.get("tool_calls", []):
                    names = dict.fromkeys(call["function"]["arguments"])
                    seen[reader.name][call["function"]["name"]] |= {name: {} for name in names}
    schemas = defaultdict(list)
    for name, tools in seen.items():
        for tool, properties in tools.items():
            parameters = {"type": "object", "properties": properties}
            schemas[name].append({"type": "function", "function": {
                "name": tool, "description": "", "parameters": parameters}})  # fmt: skip
    return schemas


def write_all(records, units, run, paths):
    """Format, compare, write; returns a card for every record."""
    output, rejected, record = paths
    settings = run.settings
    output.parent.mkdir(parents=True, exist_ok=True)
    with only_run(output), tempfile.TemporaryFile(dir=output.parent) as spill:
        cards = spill_rows(format_all(records, run), spill)
        unknown = {name for name, _, _ in run.conditions} - run.columns
        if unknown and cards:
            raise InputError(f"--where {', '.join(sorted(unknown))}: no row has such a column")
        reject_duplicates(rows_of(cards), settings)
        if settings.max_samples:
            for card in stratify(rows_of(cards), settings.seed)[settings.max_samples :]:
                card.reasons = ["not_selected: max_samples"]
        print_summary(cards, run.notes)
        rejects = [{"source": card.source, "format": card.format, "reasons": card.reasons}
                   for card in cards if card.reasons]  # fmt: skip
        files = {rejected: (json.dumps(reject) + "\n" for reject in rejects)}
        if rows := rows_of(cards):
            counts = {"rows": len(rows), "rejected": dict(count_reasons(cards)), "notes": run.notes}
            files[record] = [settings_record(settings, units, counts)]
            files[output] = read_places(spill, [card.place for card in rows])
        publish(files)
    return cards


def output_paths(settings):
    """The files of rows, rejects and settings; none that a setting names to be read."""
    output = Path(settings.output_file)
    rejected = output.with_name(f"{output.stem}.rejected.jsonl")
    paths = (output, rejected, output.with_name(f"{output.stem}.settings.json"))
    for name in [settings.queries, *(settings.benchmark or []), *(settings.tools or [])]:
        if name and Path(name.rpartition("=")[2]).resolve() in [path.resolve() for path in paths]:
            raise InputError(f"{name}: would be overwritten by this run's output; give another --output_file")
    return paths


def main(settings, positional):
    inputs = [positional.inputs] if isinstance(positional.inputs, str) else positional.inputs
    if not inputs:
        raise InputError("no inputs; name files, folders or Hub ids before the options")
    check_settings(settings)
    paths = output_paths(settings)
    units = find_units(inputs, {path.resolve() for path in paths})
    run = make_run(settings)
    readers = load_readers(settings.readers)
    formats = {reader.name for reader in readers + BUILT_IN}
    if unknown := run.tools.keys() - formats - {""}:
        told = f"no such format; there are {', '.join(sorted(formats))}"
        raise InputError(f"--tools {unknown.pop()}=...: {told}")
    records = read_all(units, readers, run.notes)
    if settings.tools_seen:
        print(json.dumps(tools_seen(records), indent=1))
        return
    print(f"inputs: {len(units)} files", flush=True)
    cards = write_all(records, units, run, paths)
    rows = rows_of(cards)
    if not rows:
        names = ", ".join(reason for reason, _ in count_reasons(cards))
        told = f"no trajectory left of {len(cards)} ({names}); see {paths[1]}"
        raise InputError(f"{told}; {paths[0]} was not written")
    print(f"rows: {len(rows)} -> {paths[0]}\nrejected: {len(cards) - len(rows)} -> {paths[1]}")


def command_line():
    parser = TrlParser(Settings)
    kinds = "Files, folders, Hub ids: owner/name[:config][/split][@revision]."
    parser.add_argument("inputs", nargs="*", help=kinds)
    return parser


if __name__ == "__main__":
    try:
        main(*parse_settings(command_line()))
    except (InputError, OSError) as error:
        print(f"{Path(__file__).name}: {error}", file=sys.stderr)
        sys.exit(2)
