"""Stage 4: every outcome of a request has a name, and a fault of the endpoint is no score."""

import asyncio
import contextlib
import gzip
import json
import shutil
import socket
import socketserver
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
from scripted import call, calls, say, tool_outputs

ROOT = Path(__file__).resolve().parent.parent
CASES = ROOT.parent / "shared" / "cases" / "serve"
needs_bwrap = pytest.mark.skipif(not shutil.which("bwrap"), reason="needs bubblewrap")


@pytest.fixture(scope="module")
def m(stage):
    return stage("04_eval")


@pytest.fixture
def ask(m, endpoint):
    """ask(*answers, **settings) -> what complete() makes of them: a Reply, or the NotRun that it raises. An answer is
    (status, body) or a message; the last one is given for ever."""

    def run(*answers, wire=None, with_tools=True, **settings):
        waiting = list(answers)

        def answer(body):
            reply = waiting.pop(0) if len(waiting) > 1 else waiting[0]
            if isinstance(reply, dict):
                return dict(reply)
            status, content = reply
            return status, {}, content if isinstance(content, str) else json.dumps(content)

        endpoint.script["q"] = answer
        wire = wire or [{"role": "user", "content": "q"}]
        settings = m.Settings(model="x", **{"patience": 0} | settings)
        tools = m.TOOLS if with_tools else []

        async def complete():
            client = m.Endpoint(settings, endpoint.url, ["OPENAI_API_KEY"])
            try:
                return await client.complete(wire, tools, seed=0)
            except m.NotRun as fault:
                return fault

        return asyncio.run(complete())

    return run


def whole(message, finish="stop", **more):
    """(200, a chat completion)"""
    choice = {"message": {"role": "assistant"} | message, "finish_reason": finish} | more
    return 200, {"choices": [choice], "usage": {"prompt_tokens": 7, "completion_tokens": 3}}


def error(text, **more):
    return {"error": {"message": text} | more}


FULL = {
    "OpenAI": (400, "This model's maximum context length is 8192 tokens. However, your messages resulted in 9000."),
    "OpenAI, newer": (400, "Your input exceeds the context window of this model. Please adjust your input."),
    "OpenAI, limit": (400, "Input tokens exceed the configured limit of 272000 tokens."),
    "OpenAI, by code": (400, {"error": {"message": "too long", "code": "context_length_exceeded"}}),
    "Anthropic": (400, "prompt is too long: 200251 tokens > 200000 maximum"),
    "Anthropic, sum": (400, "input length and `max_tokens` exceed context limit: 190000 + 20000 > 200000"),
    "vLLM": (400, "'max_tokens' is too large: 99. This model's maximum context length is 64 tokens"),
    "vLLM, prompt": (400, "The decoder prompt (length 99) is longer than the maximum model length of 64."),
    "SGLang": (400, "The input (33056 tokens) is longer than the model's context length (32768 tokens)."),
    "SGLang, sum": (400, "Requested token count exceeds the model's maximum context length of 32768 tokens."),
    "llama.cpp": (400, "request (33056 tokens) exceeds the available context size (32768 tokens), try increasing it"),
    "llama.cpp, by type": (400, {"error": {"message": "no", "type": "exceed_context_size_error"}}),
    "Ollama": (500, "the input length exceeds the context length"),
    "Ollama, prompt": (400, "prompt too long; exceeded max context length by 12 tokens"),
    "LM Studio": (400, "The number of tokens to keep from the initial prompt is greater than the context length."),
    "Zhipu": (400, {"error": {"code": "1261", "message": "Prompt exceeds max length"}}),
    "Zhipu, Chinese": (400, {"error": {"code": "1261", "message": "Prompt 超长"}}),
    "DeepSeek": (400, "This model's maximum context length is 131072 tokens. However, you requested 140000 tokens"),
    "Moonshot": (400, "Invalid request: Your request exceeded model token limit: 262144"),
    "Gemini": (400, "The input token count (1048577) exceeds the maximum number of tokens allowed (1048576)."),
    "Mistral": (400, "Prompt contains 40000 tokens, too large for model with 32768 maximum context length"),
    "Together": (422, "Input validation error: `inputs` tokens + `max_new_tokens` must be <= 4097"),
    "TGI": (422, "Input validation error: `inputs` must have less than 1024 tokens. Given: 5000"),
    "Groq": (400, "Please reduce the length of the messages or completion."),
    "DashScope": (400, "Range of input length should be [1, 129024]"),
    "Bedrock": (400, "Input is too long for requested model."),
    "xAI": (400, "This model's maximum prompt length is 131072 but the request contains 140000 tokens."),
    "MiniMax": (400, "invalid params, context window exceeds limit"),
    "LiteLLM": (400, "litellm.ContextWindowExceededError: too much"),
    "Cohere": (400, "too many tokens: size limit exceeded by 11 tokens"),
    "OpenRouter, in a 200": (200, error("This endpoint's maximum context length is 8192 tokens.", code=400)),
    "a proxy": (413, "Request Entity Too Large"),
    "an error as it stands": (200, {"object": "error", "message": "maximum context length is 64", "code": 400}),
    "MiniMax, in a 200": (200, {"base_resp": {"status_code": 2013, "status_msg": "context window exceeds limit"}}),
    "finish model_context_window_exceeded": whole({"content": "x"}, "model_context_window_exceeded"),
}


@pytest.mark.parametrize("who", FULL)
def test_a_conversation_that_does_not_fit_is_told_by_every_providers_words(ask, who):
    status, text = FULL[who]
    assert ask((status, text if isinstance(text, dict) else error(text))).stop == "context_full"


REFUSED = {
    "Azure": (400, error("The response was filtered due to Azure OpenAI's content management policy.")),
    "Azure, by code": (400, error("no", code="content_filter")),
    "OpenAI": (400, error("Invalid prompt: your prompt was flagged as potentially violating our usage policy.")),
    "DeepSeek": (400, error("Content Exists Risk")),
    "Zhipu": (400, error("系统检测到输入或生成内容可能包含不安全或敏感内容", code="1301")),
    "Moonshot": (400, error("The request was rejected because it was considered high risk")),
    "DashScope": (400, error("Input data may contain inappropriate content.", code="data_inspection_failed")),
    "finish content_filter": whole({"content": None}, "content_filter"),
    "finish sensitive": whole({"content": ""}, "sensitive"),
    "finish SAFETY": whole({"content": None}, "SAFETY"),
    "finish PROHIBITED_CONTENT": whole({"content": None}, "PROHIBITED_CONTENT"),
    "a refusal beside no text": whole({"content": None, "refusal": "I can't help with that."}),
    "a refusal as a part": whole({"content": [{"type": "refusal", "refusal": "I can't help with that."}]}),
    "finish blocked": whole({"content": ""}, "blocked"),
    "finish policy_violation": whole({"content": "half"}, "policy_violation"),
    "finish moderation": whole({"content": None}, "moderation"),
}


@pytest.mark.parametrize("who", REFUSED)
def test_a_refusal_is_the_end_of_that_round_alone(ask, who):
    assert ask(REFUSED[who]).stop == "refused"


UNPARSED = {
    "Ollama": (500, error("error parsing tool call: raw='{\"command\"', err=unexpected end of JSON input")),
    "llama.cpp": (500, error("Failed to parse tool call arguments as JSON: parse error at line 1, column 131")),
    "vLLM, gpt-oss": (500, error("unexpected tokens remaining in message header: ['to=functions.x']")),
    "Groq": (400, error("Failed to call a function. See failed_generation.", code="tool_use_failed")),
    "Gemini": whole({"content": None}, "MALFORMED_FUNCTION_CALL"),
    "Gemini, behind a gateway": whole({"content": None}, "function_call_filter: MALFORMED_FUNCTION_CALL"),
    "a call as text": whole({"content": '<tool_call>{"name": "glob"}</tool_call>'}),
    "a call of GLM as text": whole({"content": "<tool_call>glob<arg_key>pattern</arg_key>"}),
    "a call that never came": whole({"content": ""}, "tool_calls"),
    "a call that never came, Anthropic": whole({"content": "I look."}, "tool_use"),
    "a call that never came, old": whole({"content": "I look."}, "function_call"),
    "finish tool_use_failed": whole({"content": ""}, "tool_use_failed"),
}


@pytest.mark.parametrize("who", UNPARSED)
def test_a_call_that_nobody_can_parse_has_its_own_name(ask, who):
    assert ask(UNPARSED[who], patience=9).stop == "unparsed_call"


def test_a_call_that_could_not_be_parsed_is_asked_for_again_with_another_seed(ask, endpoint):
    reply = ask(UNPARSED["Ollama"], UNPARSED["llama.cpp"], say("done"), patience=9)
    assert reply.stop == "answer" and [body["seed"] for body in endpoint.requests] == [0, 1000, 2000]


DONE = {"choices": [{"message": {"content": "done"}}]}
FAULTS = {
    "a dead provider": whole({"content": ""}, "error", error={"code": 502, "message": "Upstream error"}),
    "finish error": whole({"content": ""}, "error"),
    "finish network_error": whole({"content": "half"}, "network_error"),
    "finish insufficient_system_resource": whole({"content": "half"}, "insufficient_system_resource"),
    "an error in a 200": (200, error("Provider returned error", code=502)),
    "an error text in a 200": (200, {"error": "overloaded"}),
    "no choices": (200, {"choices": []}),
    "choices null": (200, {"choices": None}),
    "no message": (200, {"choices": [{}]}),
    "a message that is a list": (200, {"choices": [{"message": []}]}),
    "content that is a number": whole({"content": 5}),
    "a call without a function": whole({"content": None, "tool_calls": [{"id": "1"}]}),
    "HTML": (200, "<html>Welcome</html>"),
    "half a body": (200, '{"choices": [{"mess'),
    "an empty body": (200, ""),
    "a list": (200, "[1]"),
    "very deep": (200, "[" * 200_000),
    "400": (400, error("unknown parameter foo; the context length is fine")),
    "401": (401, "wrong key"),
    "402": (402, error("Insufficient Balance")),
    "403": (403, "no"),
    "404": (404, "no such route"),
    "422": (422, error("extra fields not allowed: seed")),
    "429": (429, "slow down"),
    "429 of tokens a minute": (429, error("Request too large for model on tokens per minute (TPM): Limit 6000")),
    "413 of tokens a minute": (413, error("Request too large: tokens per minute (TPM) limit 6000")),
    "500": (500, "boom"),
    "502": (502, "bad gateway"),
    "503": (503, "starting"),
    "529": (529, error("Overloaded")),
    "a redirect": (301, ""),
    "a key that is wrong": (401, error("Incorrect API key: keys are case-sensitive, for your safety")),
    "a model that is not there": (404, error("no such model; names are case sensitive")),
    "our body": (400, error("We could not parse the JSON body of your request.")),
    "an error as it stands": (200, {"object": "error", "message": "boom", "code": 500}),
    "another server's form": (200, {"code": 500, "msg": "404 NOT_FOUND", "success": False}),
    "a conversation that is sent back": (400, error("no") | {"input": "x" * 3000 + "maximum context length, flagged"}),
    "finish abort": whole({"content": "half"}, "abort"),
    "finish cancelled": whole({"content": "half"}, "cancelled"),
    "events": (200, 'data: {"choices": [{"delta": {"content": "x"}}]}\n\ndata: [DONE]\n'),
    "finish failed": whole({"content": "half"}, "failed"),
    "finish interrupted": whole({"content": "half"}, "interrupted"),
    "an error in the message": whole({"content": "", "error": {"message": "timed out", "code": 504}}),
    "a list of errors": (200, {"error": [{"message": "boom"}]}),
    "errors": (200, {"errors": [{"message": "boom"}]}),
    "an error without words": (200, DONE | {"error": {"code": 0, "message": ""}}),
    "no success": (200, {"success": False, "choices": [], "message": "boom"}),
    "Anthropic's own error": (200, {"type": "error", "error": {"type": "overloaded_error"}}),
    "Anthropic's own answer": (200, {"type": "message", "content": [{"type": "text", "text": "hi"}]}),
    "Ollama's own answer": (200, {"message": {"role": "assistant", "content": "hi"}, "done": True}),
    "an answer of responses": (200, {"object": "response", "output": [{"type": "message", "content": []}]}),
    "an old completion": (200, {"choices": [{"text": "hi"}]}),
    "a piece of a stream": (200, {"choices": [{"delta": {"content": "hi"}, "finish_reason": "stop"}]}),
    "choices by name": (200, {"choices": {"0": {"message": {"content": "x"}}}}),
    "content by name": whole({"content": {"text": "x"}}),
    "calls by name": whole({"content": None, "tool_calls": {"id": "1", "function": {"name": "glob"}}}),
    "a call that is null": whole({"content": None, "tool_calls": [None]}),
    "a call of another type": whole({"content": None, "tool_calls": [{"custom": {"name": "glob"}}]}),
    "two answers in a row": (200, json.dumps(DONE) * 2),
    "a comment before it": (200, f": PROCESSING\n\n{json.dumps(DONE)}"),
    "a number of 5,000 digits": (200, json.dumps(DONE | {"usage": "N"}).replace('"N"', "9" * 5000)),
    "204": (204, ""),
    "300": (300, ""),
    "418": (418, "teapot"),
    "451 for no content": (451, "no"),
    "499": (499, "closed"),
    "520": (520, "unknown"),
    "999": (999, "x"),
}


@pytest.mark.parametrize("who", FAULTS)
def test_a_fault_of_the_endpoint_is_never_an_answer(ask, m, who):
    fault = ask(FAULTS[who])
    assert isinstance(fault, m.NotRun) and fault.reason == "endpoint_error"
    assert "--base_url" in fault.detail and "\n" not in fault.detail


PASSING = {
    "429": (429, "slow down"),
    "503": (503, "starting"),
    "half a body": (200, "{"),
    "no choices": (200, {"choices": []}),
    "a 400 of the provider behind it": (400, error("Provider returned error")),
}


@pytest.mark.parametrize("who", PASSING)
def test_what_may_pass_is_asked_again(ask, who):
    assert ask(PASSING[who], say("done"), patience=9).stop == "answer"


def test_an_unknown_refusal_is_asked_twice_and_no_more(ask, m, endpoint):
    assert isinstance(ask((400, "no"), patience=99), m.NotRun) and len(endpoint.requests) == 2


def test_a_retry_after_of_zero_is_no_licence_to_hammer(ask, endpoint):
    endpoint.script["q"] = lambda body: (429, {"retry-after": "0"}, "slow down")
    started = time.monotonic()
    ask((429, "slow down"), patience=3)
    assert len(endpoint.requests) <= 4 and time.monotonic() - started >= 1


WAITS = {"7": 7, "2.5": 2.5, "99999": 60, "0": 0, None: 0, "": 0, "-5": 0, "nan": 0, "1e9": 0}
WAITS |= {"\u00b2": 0, "soon": 0, "Wed, 21 Oct 2026 07:28:00 GMT": 0}


@pytest.mark.parametrize("text", WAITS)
def test_a_retry_after_that_is_no_number_of_seconds_is_none(m, text):
    assert m.Refusal(429, "slow down", text).wait == WAITS[text]


@pytest.mark.parametrize("raw, kind", {"": "provider", "prompt is too long": "context_full", "content_filter": "refused"}.items())
def test_a_provider_behind_another_may_be_well_again(m, raw, kind):
    """Four tries, unless it says what it is."""
    text = json.dumps({"error": {"message": "Provider returned error", "metadata": {"raw": raw}}})
    assert m.Refusal(400, text).kind == kind and m.GIVEN_UP["provider"] == 4


READ = {
    "text": (say("done"), "answer", "done", None),
    "no text": (say(""), "empty", "", None),
    "null": (say(None), "empty", "", None),
    "no content at all": ({"role": "assistant"}, "empty", "", None),
    "a thought alone": (say("", reasoning="hm"), "empty", "", "hm"),
    "a thought beside it": (say("done", reasoning_content="hm"), "answer", "done", "hm"),
    "parts": (say([{"type": "text", "text": "do"}, {"type": "text", "text": "ne"}]), "answer", "done", None),
    "a part that thinks": (
        say([{"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]}, {"type": "text", "text": "done"}]),
        "answer",
        "done",
        "hm",
    ),
    "cut": (say("do", finish_reason="length"), "length", "do", None),
    "cut, Mistral": (say("do", finish_reason="model_length"), "length", "do", None),
    "cut, responses": (say("do", finish_reason="max_output_tokens"), "length", "do", None),
    "half an emoji": (say("a\ud83d"), "answer", "a\ufffd", None),
    "cut, by another word": (say("do", finish_reason="token_limit"), "length", "do", None),
    "an end of its own": (say("done", finish_reason="end_turn"), "answer", "done", None),
    "an end that is no text": (say("done", finish_reason=["stop"]), "answer", "done", None),
    "no end": (say("done", finish_reason=None), "answer", "done", None),
    "thoughts by name": (say("done", reasoning={"summary": "hm"}), "answer", "done", None),
    "a picture": (say([{"type": "image_url", "image_url": {"url": "x"}}]), "empty", "", None),
    "parts of responses": (say([{"type": "output_text", "text": "done"}]), "answer", "done", None),
    "another role": (say("done", role="user"), "answer", "done", None),
    "a zero character": (say("a\0b"), "answer", "a\0b", None),
}


@pytest.mark.parametrize("what", READ)
def test_what_an_endpoint_says_is_read_in_all_its_forms(ask, what):
    message, stop, text, thoughts = READ[what]
    reply = ask(message)
    assert (reply.stop, reply.message["content"], reply.message.get("reasoning_content")) == (stop, text, thoughts)
    assert reply.message.get("weight") == (0 if stop == "empty" or not text else None)
    assert reply.wire["content"]  # no empty message is ever sent


CALLS = {
    "a string": ({"arguments": '{"pattern": "*"}'}, {"pattern": "*"}, None),
    "an object": ({"arguments": {"pattern": "*"}}, {"pattern": "*"}, None),
    "nothing": ({"arguments": ""}, {}, None),
    "null": ({"arguments": None}, {}, None),
    "no arguments": ({}, {}, None),
    "cut": ({"arguments": '{"pattern": '}, {"invalid_json": '{"pattern": '}, 0),
    "a list": ({"arguments": "[1]"}, {"invalid_json": "[1]"}, 0),
    "no number": ({"arguments": '{"pattern": NaN}'}, {"invalid_json": '{"pattern": NaN}'}, 0),
    "a list without end": ({"arguments": [float("inf")]}, {"invalid_json": "[Infinity]"}, 0),
    "no end": ({"arguments": '{"pattern": 1e999}'}, {"invalid_json": '{"pattern": 1e999}'}, 0),
    "half an emoji": ({"arguments": '{"pattern": "a\\ud83d"}'}, {"pattern": "a\ufffd"}, None),
    "a list that is no text": ({"arguments": [1]}, {"invalid_json": "[1]"}, 0),
    "a number": ({"arguments": 5}, {"invalid_json": "5"}, 0),
    "text in text": ({"arguments": '"{}"'}, {"invalid_json": '"{}"'}, 0),
    "a comment": ({"arguments": "{} // all"}, {"invalid_json": "{} // all"}, 0),
}


@pytest.mark.parametrize("what", CALLS)
def test_a_bad_call_is_kept_as_it_was_and_never_trained(ask, what):
    given, arguments, weight = CALLS[what]
    reply = ask({"content": None, "tool_calls": [{"id": "1", "function": {"name": "glob"} | given}]})
    assert reply.stop is None and reply.message["tool_calls"][0]["function"]["arguments"] == arguments
    assert reply.message.get("weight") == weight and bool(reply.errors[0]) == (weight == 0)


ODD = [None, 0, -1, 1e400, float("nan"), True, "", "x", "error", [], [None], [[]], {}, {"a": 1}, {"text": None}, 10**400]
CALL = {"id": "a", "type": "function", "function": {"name": "glob", "arguments": '{"pattern": "*"}'}}
SAID = {"role": "assistant", "content": [{"type": "text", "text": "hi"}], "refusal": None}
WHOLE = {
    "a call": {"choices": [{"finish_reason": "tool_calls", "message": SAID | {"tool_calls": [CALL]}}], "usage": {}},
    "an answer": {"choices": [{"finish_reason": "stop", "message": SAID}], "usage": {"prompt_tokens": 1}, "error": None},
}


def places(value, path=()):
    """The path of every value inside a JSON value."""
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in parts:
        yield (*path, key)
        yield from places(part, (*path, key))


@pytest.mark.parametrize("what", WHOLE)
def test_whatever_stands_in_a_reply_is_a_stop_or_a_refusal(m, what):
    for path in places(WHOLE[what]):
        for odd in ODD:
            data = json.loads(json.dumps(WHOLE[what]))
            inner = data
            for key in path[:-1]:
                inner = inner[key]
            inner[path[-1]] = odd
            try:
                reply = m.read_reply(data, set(), True)
            except m.Refusal as refusal:
                assert refusal.kind in ("again", "unknown"), (path, odd)
                continue
            except (ValueError, LookupError, TypeError, AttributeError):
                continue  # post() makes "not a chat completion" of these
            assert reply.stop in (*m.GRADED, None) and (reply.stop is None) == ("tool_calls" in reply.message)
            json.dumps(reply.message, allow_nan=False)  # a row is JSON


def test_calls_without_an_id_or_with_the_same_get_their_own(ask):
    made = [{"id": identity, "function": {"name": "glob"}} for identity in ("a", "a", "", None, 5)]
    reply = ask({"content": None, "tool_calls": made})
    assert [call["id"] for call in reply.message["tool_calls"]] == ["a", "call_1", "call_2", "call_3", "call_4"]
    assert [call["id"] for call in reply.wire["tool_calls"]] == ["a", "call_1", "call_2", "call_3", "call_4"]


NAMES = {"glob": "glob", "read file": "read_file", "": "_", None: "None", "x" * 99: "x" * 64}
NAMES |= {"functions.glob:0": "functions_glob_0", "lies\u00e9": "lies_"}


@pytest.mark.parametrize("name", NAMES)
def test_a_name_that_no_endpoint_takes_back_is_sent_as_one_that_it_takes(ask, name):
    """Else the model's own slip would be the endpoint's refusal, and its failure no part of the mean."""
    reply = ask({"content": None, "tool_calls": [{"id": "1", "function": {"name": name}}]})
    assert reply.message["tool_calls"][0]["function"]["name"] == str(name)
    assert reply.wire["tool_calls"][0]["function"]["name"] == NAMES[name]


def test_the_old_form_of_a_call_is_read(ask):
    reply = ask({"content": None, "function_call": {"name": "glob", "arguments": "{}"}})
    assert reply.message["tool_calls"][0]["function"] == {"name": "glob", "arguments": {}}


USAGE = [  # what stands there -> prompt and generated tokens
    ({"prompt_tokens": "7", "completion_tokens": 1e400}, (7, 0)),
    ({"prompt_tokens": -5, "completion_tokens": "3 tokens"}, (0, 0)),
    ({"prompt_tokens": {"total": 5}, "completion_tokens": 2.9}, (0, 2)),
    ({}, (0, 0)),
    (None, (0, 0)),
    ([1], (0, 0)),
    ("none", (0, 0)),
]


@pytest.mark.parametrize("usage, tokens", USAGE)
def test_usage_may_be_anything(ask, usage, tokens):
    reply = ask((200, {"choices": [{"message": say("x")}], "usage": usage}))
    assert (reply.stop, reply.prompt_tokens, reply.completion_tokens) == ("answer", *tokens)


def test_usage_may_be_missing_and_the_first_of_two_choices_counts(ask):
    reply = ask((200, {"choices": [{"message": say("one")}, {"message": say("two")}]}))
    assert (reply.message["content"], reply.prompt_tokens) == ("one", 0)


@pytest.mark.parametrize("ids, prompt", [([1], None), ("1", [1]), ([1], "1")])
def test_token_ids_that_are_half_there_are_none(m, endpoint, ids, prompt):
    """A server may say that it is a vLLM, and be another version of it."""
    choice = {"message": say("done"), "token_ids": ids}
    answer = json.dumps({"choices": [choice], "prompt_token_ids": prompt})
    endpoint.script["q"] = lambda body: (200, {}, answer)

    async def complete():
        client = m.Endpoint(m.Settings(model="x"), endpoint.url, ["NONE"])
        client.is_vllm = True
        return await client.complete([{"role": "user", "content": "q"}], [], 0)

    reply = asyncio.run(complete())
    assert (reply.stop, reply.served) == ("answer", None)


def test_reasoning_goes_back_under_its_name_with_what_stands_beside_a_call(endpoint, evaluate):
    first = calls(("glob", {"pattern": "*"})) | {"reasoning": "hm", "reasoning_details": [{"type": "x"}]}
    first["tool_calls"][0]["extra_content"] = {"google": {"thought_signature": "c2ln"}}
    endpoint.script["q"] = [first, say("done")]
    episodes, _ = evaluate(("t", [("q", "true")]))
    sent = endpoint.requests[-1]["messages"][2]
    assert sent["reasoning"] == "hm" and "reasoning_content" not in sent and sent["reasoning_details"] == [{"type": "x"}]
    assert sent["tool_calls"][0]["extra_content"] == {"google": {"thought_signature": "c2ln"}}
    row = episodes["t", 0]["messages"][2]
    assert row["reasoning_content"] == "hm" and row.keys() == {"role", "content", "reasoning_content", "tool_calls"}
    assert row["tool_calls"][0].keys() == {"id", "type", "function"}


def test_an_endpoint_that_takes_no_reasoning_back_gets_none(ask, endpoint):
    wire = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "reasoning_content": "hm"}]
    wire.append({"role": "user", "content": "go on"})
    refusal = (400, error("'messages.1' : property 'reasoning_content' is unsupported"))
    assert ask(refusal, say("done"), wire=wire).stop == "answer"
    assert ["reasoning_content" in body["messages"][1] for body in endpoint.requests] == [True, False]
    endpoint.requests.clear()
    ask(say("done"), wire=wire, send_reasoning=False)
    assert "reasoning_content" not in endpoint.requests[0]["messages"][1]


def test_the_body_is_the_users_to_change(ask, endpoint):
    changes = {"temperature": None, "seed": None, "max_tokens": None, "max_completion_tokens": 9, "top_k": 20}
    ask(say("done"), request=changes, max_tokens=9)
    body = endpoint.requests[-1]
    assert not body.keys() & {"temperature", "seed", "max_tokens"}
    assert (body["top_p"], body["max_completion_tokens"], body["top_k"]) == (0.95, 9, 20)


def test_keys_and_versions_in_the_address(m, monkeypatch):
    monkeypatch.setenv("AZURE_KEY", "k")
    settings = m.Settings(model="x", headers={"api-key": "$AZURE_KEY"})
    client = m.Endpoint(settings, "https://me.example/openai/deployments/g?api-version=2024-10-21", ["NONE"]).client
    request = client.build_request("POST", "chat/completions")
    assert str(request.url) == "https://me.example/openai/deployments/g/chat/completions?api-version=2024-10-21"
    assert request.headers["api-key"] == "k" and "authorization" not in request.headers
    assert "k" not in json.dumps(settings.headers).replace("api-key", "").replace("AZURE_KEY", "")


def test_a_key_that_is_not_there_is_told(m, monkeypatch):
    monkeypatch.delenv("NOT_SET", raising=False)
    with pytest.raises(m.InputError, match="headers: api-key"):
        m.Endpoint(m.Settings(model="x", headers={"api-key": "$NOT_SET"}), "http://x/v1", ["NONE"])
    monkeypatch.setenv("PASTED", "k \n")  # httpx would say the whole key in its complaint
    for key in ("secret\nb", "secret\u043a"):
        monkeypatch.setenv("BAD_KEY", key)
        with pytest.raises(m.InputError, match="headers: Authorization: not of characters") as error:
            m.Endpoint(m.Settings(model="x"), "http://x/v1", ["BAD_KEY"])
        assert "secret" not in str(error.value)
    for name, value in (("a b", "x"), ("a", "x\ny"), ("\u00e4", "x")):
        with pytest.raises(m.InputError, match=f"headers: {name}: not of characters"):
            m.Endpoint(m.Settings(model="x", headers={name: value}), "http://x/v1", ["NONE"])
    client = m.Endpoint(m.Settings(model="x", headers={"x-number": 5}), "http://x/v1", ["PASTED"]).client
    assert client.headers["authorization"] == "Bearer k" and client.headers["x-number"] == "5"


GOOD = json.dumps(DONE).encode()
CHUNKS = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"


def raw(body=GOOD, *headers, status="200 OK", length=None):
    """The bytes of a response."""
    head = [f"HTTP/1.1 {status}", f"content-length: {len(body) if length is None else length}", *headers]
    return "".join(f"{line}\r\n" for line in [*head, "connection: close", ""]).encode("latin-1") + body


RAW = {  # bytes of a response, and is it an answer?
    "chunks": (CHUNKS + b"%x\r\n%s\r\n0\r\n\r\n" % (len(GOOD), GOOD), True),
    "chunks that end": (CHUNKS + b"9\r\n%s\r\n" % GOOD[:9], False),
    "a body that ends": (raw(GOOD[:-5], length=len(GOOD)), False),
    "said to be a page": (raw(GOOD, "content-type: text/html"), True),
    "said to be events": (raw(GOOD, "content-type: text/event-stream"), True),
    "compressed": (raw(gzip.compress(GOOD), "content-encoding: gzip"), True),
    "compressed twice": (raw(gzip.compress(gzip.compress(GOOD)), "content-encoding: gzip, gzip"), True),
    "said to be compressed": (raw(GOOD, "content-encoding: gzip"), False),
    "compressed and cut": (raw(gzip.compress(GOOD)[:-12], "content-encoding: gzip"), False),
    "an encoding that nobody knows": (raw(GOOD, "content-encoding: foo"), True),
    "a charset that is none": (raw(GOOD, "content-type: application/json; charset=zlib_codec"), True),
    "refused in one that is none": (raw(b"no", "content-type: x/y; charset=zlib", status="400 x"), False),
    "away in one that is none": (raw(b"no", "content-type: text/plain; charset=hex", status="500 x"), False),
    "a mark at its beginning": (raw(b"\xef\xbb\xbf" + GOOD), True),
    "two bytes a character": (raw(GOOD.decode().encode("utf-16")), True),
    "bytes that are no text": (raw(GOOD.replace(b"done", b"caf\xe9")), False),
    "blank lines before it": (raw(b"\n\n \n" + GOOD), True),
    "30 MB of blanks": (raw(b" " * (30 << 20) + GOOD), True),
    "201": (raw(status="201 Created"), True),
    "204": (raw(b"", status="204 No Content"), False),
    "a hint before it": (b"HTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\n" + raw(), True),
    "a header of 300 KB": (raw(GOOD, "x-long: " + "x" * 300_000), False),
    "a wait of two times": (raw(b"", "retry-after: 1", "retry-after: 2", status="529 x"), False),
    "another protocol": (b"SSH-2.0-OpenSSH_9\r\n", False),
    "no head": (GOOD, False),
    "nothing": (b"", False),
}


@pytest.fixture
def ask_raw(m):
    """ask_raw(bytes) -> the Reply to what a server sends, or the NotRun that comes of it."""

    class Handler(socketserver.StreamRequestHandler):
        def handle(self):
            length = 0
            while (line := self.rfile.readline().lower()) not in (b"\r\n", b""):
                length = int(line.split(b":")[1]) if line.startswith(b"content-length") else length
            self.rfile.read(length)
            with contextlib.suppress(OSError):
                self.wfile.write(self.server.response)

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}/v1"

        async def complete():
            try:
                return await m.Endpoint(m.Settings(model="x", patience=0), url, ["NONE"]).complete([], [], 0)
            except m.NotRun as fault:
                return fault

        def run(response):
            server.response = response
            return asyncio.run(complete())

        yield run
        server.shutdown()


@pytest.mark.parametrize("what", RAW)
def test_however_an_answer_is_sent_it_is_an_answer_or_a_fault(ask_raw, what):
    response, good = RAW[what]
    told = ask_raw(response)
    assert told.message["content"] == "done" if good else told.reason == "endpoint_error", told


def test_where_a_server_sends_on_to_is_said(ask_raw):
    response = raw(b"", "location: https://me.example/v2/", status="307 Temporary Redirect")
    assert "HTTP 307: https://me.example/v2/" in ask_raw(response).detail


def test_what_an_endpoint_writes_to_the_terminal_is_text(ask):
    assert ask((400, "\x1b]0;a title\x07\x1b[2Jno")).detail.count("HTTP 400: ]0;a title[2Jno") == 1


class Trickle(BaseHTTPRequestHandler):
    """Headers, then a byte a tenth of a second, for ever."""

    def do_POST(self):
        self.server.asked += 1
        self.send_response(200)
        self.end_headers()
        try:
            while True:
                self.wfile.write(b" ")
                time.sleep(0.1)
        except OSError:
            pass  # nobody reads any more

    do_GET = do_POST

    def log_message(self, *args):
        pass


@pytest.fixture
def trickle():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Trickle)
    server.asked = 0
    server.url = f"http://127.0.0.1:{server.server_port}/v1"
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield server
    server.shutdown()


def test_an_answer_that_never_ends_is_asked_for_twice(m, trickle):
    settings = m.Settings(model="x", request_seconds=1, patience=600)

    async def complete():
        return await m.Endpoint(settings, trickle.url, ["NONE"]).complete([], [], 0)

    with pytest.raises(m.NotRun, match="no answer within 1 s") as fault:
        asyncio.run(complete())
    assert fault.value.reason == "endpoint_error" and trickle.asked == 2


def test_what_an_endpoint_is_asked_beside_is_asked_for_a_while_only(m, trickle, monkeypatch):
    """Its list of models and its version: a run neither waits for them at its start nor before its summary."""
    monkeypatch.setattr(m, "MOMENT", 1)
    assert asyncio.run(m.version_at(trickle.url)) is None
    with pytest.raises(m.InputError, match="probe: .*no answer within 1 s"):
        asyncio.run(m.probe(m.Endpoint(m.Settings(model="x", request_seconds=1), trickle.url, ["NONE"]), {}, "s"))


def test_a_server_on_this_machine_is_never_asked_through_a_proxy(ask, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    assert ask(say("done")).stop == "answer"


PROXIES = {"ALL_PROXY": "socks5://127.0.0.1:1080", "HTTPS_PROXY": "ftp://proxy:1", "HTTP_PROXY": "http://[::1"}


@pytest.mark.parametrize("name", PROXIES)
def test_a_proxy_that_cannot_be_used_is_told(m, monkeypatch, name):
    monkeypatch.setenv(name, PROXIES[name])
    with pytest.raises(m.InputError, match="https://me.example/v1: .* proxy that the environment names"):
        m.Endpoint(m.Settings(model="x"), "https://me.example/v1", ["NONE"])


def test_an_endpoint_that_cannot_be_reached_is_not_out_of_the_rounds_time(m, monkeypatch):
    async def away(*_, **__):
        raise m.httpx.ConnectTimeout("away")

    monkeypatch.setattr(m.httpx.AsyncClient, "post", away)
    endpoint = m.Endpoint(m.Settings(model="x", patience=0), "http://x/v1", ["NONE"])
    with pytest.raises(m.NotRun, match="HTTP 503: ConnectTimeout away") as fault:
        asyncio.run(endpoint.complete([], [], 0, seconds=100))
    assert fault.value.reason == "endpoint_error"


# --------------------------------------------------------------------------------------------------------------------
# Whole runs


@needs_bwrap
def test_an_endpoint_that_is_away_for_a_while_costs_a_round_no_time(endpoint, evaluate, m, monkeypatch):
    """A minute of which the round has thirty seconds; the clock is ours."""
    ahead = []
    sleep, now = asyncio.sleep, time.monotonic

    async def skip(seconds):
        ahead.append(seconds if seconds == 60 else 0)
        await sleep(0 if seconds == 60 else seconds)

    monkeypatch.setattr(m.asyncio, "sleep", skip)
    monkeypatch.setattr(m.time, "monotonic", lambda: now() + sum(ahead))
    answers = [say("x"), (503, {"retry-after": "60"}, ""), call("glob", pattern="*"), say("done")]
    endpoint.script["q"] = endpoint.otherwise = lambda body: answers.pop(0)
    episodes, _ = evaluate(("t", [("q", "true")]), max_seconds=30, patience=90)
    assert sum(ahead) == 60 and episodes["t", 0]["rounds"][0]["stop"] == "answer"


def test_no_dollar_to_spend_is_no_dollar_spent(m):
    with pytest.raises(m.Stopped, match="--max_usd 0.0: 0.00 dollars are spent"):
        m.Ledger(m.Settings(max_usd=0.0, price_in=1.0), None, {}).stop_in_time()


def test_only_failures_at_the_endpoint_in_a_row_end_a_run(m):
    ledger = m.Ledger(m.Settings(), None, {})
    for n in range(30):
        ledger.failed(("asked", n), m.NotRun("endpoint_error", "boom"))
        ledger.failed(("answered", n), m.NotRun("bailed_out", "no compiler"))
        ledger.stop_in_time()
    for n in range(20):
        ledger.failed(("asked", n), m.NotRun("endpoint_error", "boom"))
        ledger.failed(("never asked", n), m.NotRun("missing_need", "g++"))
    with pytest.raises(m.Stopped, match="the last 20 episodes all failed"):
        ledger.stop_in_time()


@needs_bwrap
def test_one_refused_episode_is_named_and_the_others_run(endpoint, evaluate):
    endpoint.script |= {"a": [say("x")], "c": [say("x")], "b": lambda body: (400, {}, "no")}
    episodes, summary = evaluate(*((name, [(name, "true")]) for name in "abc"), patience=3)
    assert sorted(episodes) == [("a", 0), ("c", 0)] and summary["not_run"] == {"endpoint_error": 1}
    rows = [json.loads(line) for line in (endpoint.folder / "out/not_run.jsonl").read_text().splitlines()]
    assert [(row["query_id"], row["run"], row["reason"]) for row in rows] == [("b", 0, "endpoint_error")]
    endpoint.script["b"] = [say("x")]
    episodes, summary = evaluate(*((name, [(name, "true")]) for name in "abc"))  # the same command tries it again
    assert len(episodes) == 3 and summary["not_run"] == {}


@needs_bwrap
def test_a_run_ends_when_twenty_episodes_in_a_row_fail(endpoint, evaluate):
    endpoint.script |= {f"q{n}": lambda body: (500, {}, "boom") for n in range(30)}
    _, summary = evaluate(*((f"t{n}", [(f"q{n}", "true")]) for n in range(30)), concurrency=1)
    assert summary["not_run"] == {"endpoint_error": 30}
    assert len({body["messages"][1]["content"] for body in endpoint.requests}) == 20 + 1  # and the probe


@needs_bwrap
def test_spending_stops_where_it_is_told_to(endpoint, evaluate):
    endpoint.script |= {f"q{n}": [say("x")] for n in range(30)}
    tasks = [(f"t{n}", [(f"q{n}", "true")]) for n in range(30)]
    prices = {"price_in": 1e5, "price_out": 0.0, "max_usd": 2.5, "concurrency": 1}  # 10 prompt tokens: a dollar
    _, summary = evaluate(*tasks, **prices)
    assert summary["episodes"] == 3 and summary["usd"] == 3 and sum(summary["not_run"].values()) == 27
    asked = len(endpoint.requests)
    _, summary = evaluate(*tasks, **prices | {"max_usd": 3.5})  # what earlier starts spent is spent
    assert summary["episodes"] == 4 and len(endpoint.requests) == asked + 2


@needs_bwrap
def test_what_an_episode_costs_that_came_to_nothing_is_spent_too(endpoint, evaluate):
    for n in range(4):
        endpoint.script[f"q{n}"] = lambda body: call("glob", pattern="*") if len(body["messages"]) < 3 else (500, {}, "")
    prices = {"price_in": 1e5, "price_out": 0.0, "max_usd": 1.5, "concurrency": 1}
    _, summary = evaluate(*((f"t{n}", [(f"q{n}", "true")]) for n in range(4)), **prices)
    asked = {body["messages"][1]["content"] for body in endpoint.requests[1:]}
    assert asked == {"q0", "q1"} and sum(summary["not_run"].values()) == 4


@needs_bwrap
def test_after_a_round_without_a_message_the_user_does_not_speak_twice(endpoint, evaluate):
    """Templates and providers that want the roles to alternate would refuse every further request."""
    full = (400, {}, json.dumps(error("maximum context length")))
    endpoint.script["q"] = lambda body: full if len(body["messages"]) < 3 else say("done")
    episodes, _ = evaluate(("t", [("q", "true"), ("more", "true")]))
    roles = [message["role"] for message in endpoint.requests[-1]["messages"]]
    assert roles == ["system", "user", "assistant", "user"]
    assert [message["role"] for message in episodes["t", 0]["messages"]] == ["system", "user", "user", "assistant"]


DYING = """
import http.server, json, os, sys
class Server(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"{}")
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if "q" == body["messages"][-1]["content"]:
            print("INFO fine\\nRuntimeError: Engine core failed. See root cause above.\\nOutOfMemoryError: 3 GiB", flush=True)
            os._exit(7)
        text = json.dumps({"choices": [{"message": {"content": "yes"}}]}).encode()
        self.send_response(200)
        self.end_headers()
        self.wfile.write(text)
http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[-1])), Server).serve_forever()
"""


@needs_bwrap
def test_a_server_of_our_own_that_dies_is_told_at_once(m, evaluate, tmp_path, monkeypatch):
    """With the first root cause of its log, not after the whole patience, though a proxy is set."""
    for name in ("http_proxy", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setattr(m, "vllm_command", lambda settings: [sys.executable, "-c", DYING])
    with pytest.raises(m.InputError, match="exit code 7, see .*vllm.log: OutOfMemoryError: 3 GiB"):
        evaluate(("t", [("q", "true")]), base_url=None, patience=600)


@needs_bwrap
def test_a_run_in_which_nothing_worked_is_told_in_words(endpoint, evaluate):
    endpoint.script["q"] = [say("I think", finish_reason="length") for _ in range(3)]
    _, summary = evaluate(("t", [("q", "false")]))
    assert "cut by its length" in summary["warnings"][0]
    full = json.dumps(error("maximum context length"))
    endpoint.script["r"] = lambda body: (400, {}, full)
    _, summary = evaluate(("t", [("r", "false")]), output_dir=endpoint.folder / "second")
    assert "no episode has a single step" in summary["warnings"][0]


@pytest.mark.parametrize("stop, told", [("empty", 1), ("refused", 1), ("answer", 0), ("max_steps", 0)])
def test_a_run_in_which_nobody_answered_is_told_in_words(m, stop, told):
    episodes = [{"meta": {"steps": 1, "completion_tokens": 0}}]
    warnings = m.warnings_of(episodes, m.Counter({stop: 3}))
    assert [f"every round ended by {stop}; " in text for text in warnings] == [True] * told
    assert m.warnings_of(episodes, m.Counter({stop: 3, "max_seconds": 1})) == []


@needs_bwrap
def test_a_prompt_that_is_cut_in_silence_is_no_score(endpoint, evaluate):
    """Ollama's way: prompt_tokens stay at the window while the conversation grows."""

    def answer(body):
        made = calls(("run_shell_command", {"command": "seq 300"}))
        return 200, {}, json.dumps({"choices": [{"message": made}], "usage": {"prompt_tokens": 4096}})

    endpoint.script["q"] = answer
    _, summary = evaluate(("t", [("q", "true")]))
    assert summary["not_run"] == {"endpoint_error": 1} and "prompt is cut" in told(endpoint)[0]["detail"]


def told(endpoint):
    return [json.loads(line) for line in (endpoint.folder / "out/not_run.jsonl").read_text().splitlines()]


@needs_bwrap
@pytest.mark.parametrize(
    "reply, text",
    [
        ((400, {}, json.dumps(error("maximum context length is 64"))), "do not fit the window"),
        ((400, {}, json.dumps(error("'temperature' does not support 0.6"))), "request: {temperature: null}"),
        ((400, {}, json.dumps(error('"auto" tool choice requires --enable-auto-tool-choice'))), "--no_tools"),
        (say("<tool_call>\n{}"), "came back as text"),
        (call("read_file"), "without its arguments"),
        ((401, {}, "wrong key"), "wrong key"),
    ],
)
def test_the_probe_tells_before_anything_is_paid_for(endpoint, evaluate, m, reply, text):
    endpoint.script["Read /workspace/probe.txt with the tool read_file."] = lambda body: (
        dict(reply) if isinstance(reply, dict) else reply
    )
    with pytest.raises(m.InputError, match=text):
        evaluate(("t", [("q", "true")]))
    assert not endpoint.folder.joinpath("out/summary.json").exists()


def test_a_model_that_cannot_write_calls_is_measured(m):
    """Where 04 chose the parser by the template, a call that it cannot read is the model's: a half-trained one's."""
    reply = SimpleNamespace(stop="unparsed_call", message=None)
    assert "the model has not learned it" in m.what_came_back(reply, parser_fits=True)
    with pytest.raises(m.InputError, match="came back as text"):
        m.what_came_back(reply, parser_fits=False)


@needs_bwrap
def test_an_endpoint_that_goes_away_and_comes_back(endpoint, make_endpoint, evaluate):
    """It dies in the middle of an episode, its connections with it; another one takes its place after a while."""

    def second(body):
        def die():
            endpoint.shutdown()
            endpoint.server_close()
            time.sleep(1)
            make_endpoint(endpoint.server_port).script["q"] = [None, say("done")]

        threading.Thread(target=die).start()
        time.sleep(0.3)
        return 500, {}, "going down"

    endpoint.script["q"] = lambda body: second(body) if len(body["messages"]) > 2 else call("glob", pattern="*")
    episodes, _ = evaluate(("t", [("q", "true")]), patience=20)
    assert episodes["t", 0]["meta"]["steps"] == 2 and episodes["t", 0]["meta"]["solved"]


@needs_bwrap
def test_a_file_name_that_is_no_text_harms_nobody(endpoint, evaluate):
    make = "python3 -c \"open(b'/workspace/a\\xff', 'w')\""
    endpoint.script["q"] = [call("run_shell_command", command=make), call("list_directory", path="/workspace"), say("x")]
    episodes, summary = evaluate(("t", [("q", "true")]))
    assert tool_outputs(episodes["t", 0])[1] == "Directory listing for /workspace:\na\ufffd" and not summary["not_run"]


MODES = {  # mode of the scripted endpoint -> (outcome of the task that meets it, of the others)
    "openrouter_choice_error": ("endpoint_error", "answer"),
    "openrouter_error_200": ("endpoint_error", "answer"),
    "lmstudio_empty_200": ("empty", "answer"),
    "gemini_malformed": ("unparsed_call", "answer"),
    "refusal": ("refused", "answer"),
    "ctx_llamacpp": ("context_full", "answer"),
    "content_filter": ("refused", "answer"),
    "toolcall500": ("unparsed_call", "answer"),
    "openrouter_dead": ("endpoint_error", "endpoint_error"),
    "ollama_trunc": ("endpoint_error", "endpoint_error"),
    "groq_strict": ("answer", "answer"),
    "gemini3": ("answer", "answer"),
    "content_parts": ("answer", "answer"),
    "default_max_tokens": ("length", "length"),
    "openrouter_400_provider": ("answer", "answer"),
    "kimi_empty": ("empty", "empty"),
}
NEEDS = {  # mode -> settings without which the probe ends the run, its words, settings with which all goes well
    "gpt5_sampling": ({}, "temperature: null", {"request": {"temperature": None, "top_p": None, "max_tokens": None}}),
    "claude_sampling": ({}, "temperature: null", {"request": {"top_p": None}}),
    "vllm_max_tokens": ({"max_tokens": 8192}, "do not fit the window", {"max_tokens": 900}),
}


@pytest.fixture
def served(m, tmp_path):
    """served(mode, **settings) -> how each task's first round ended at the scripted endpoint that stands beside the
    project, in the manner of services."""
    if not CASES.exists():
        pytest.skip("needs ../shared/cases")
    servers = []

    def run(mode, **settings):
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            port = sock.getsockname()[1]
        command = [sys.executable, CASES / "endpoint.py", str(port), mode, tmp_path / "log"]
        servers.append(subprocess.Popen(command, stderr=subprocess.DEVNULL))
        while socket.socket().connect_ex(("127.0.0.1", port)):
            time.sleep(0.05)
        given = {"model": "m", "base_url": [f"http://127.0.0.1:{port}/v1"], "rounds": 2, "patience": 1}
        given |= {"tasks": [str(CASES / "queries.jsonl")], "output_dir": str(tmp_path / "out")}
        m.main(m.Settings(**given | settings))
        ended = {row["query_id"]: row["rounds"][0]["stop"] for row in lines_of(tmp_path / "out/episodes.jsonl")}
        return ended | {row["query_id"]: row["reason"] for row in lines_of(tmp_path / "out/not_run.jsonl")}

    yield run
    for server in servers:
        server.kill()


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@needs_bwrap
@pytest.mark.parametrize("mode", MODES)
def test_other_peoples_servers(mode, served):
    bad, good = MODES[mode]
    assert served(mode) == {"bad-1": bad, "good-1": good, "good-2": good, "good-3": good}


@needs_bwrap
@pytest.mark.parametrize("mode", NEEDS)
def test_a_refusal_names_the_setting_that_helps(mode, served, m):
    without, words, remedy = NEEDS[mode]
    with pytest.raises(m.InputError, match=words):
        served(mode, **without)
    assert set(served(mode, **remedy).values()) == {"answer"}


@needs_bwrap
@pytest.mark.parametrize("mode", ["reasoning_only_once", "bad_args_once"])
def test_a_slip_on_the_way_costs_no_row(mode, served, tmp_path, run_stage):
    """An episode that is solved in the end goes through 02, and what the model did wrong is never trained."""
    served(mode)
    rows = tmp_path / "train.jsonl"
    result = run_stage("02_format_trajectories.py", tmp_path / "out/episodes.jsonl", "--output_file", rows)
    assert result.returncode == 0, result.stderr
    assert lines_of(rows)  # the four tell the same story: 02 keeps one
    for row in lines_of(rows):
        weights = [message.get("weight", 1) for message in row["messages"] if message["role"] == "assistant"]
        assert weights[0] == 0 and set(weights[1:]) == {1}


@pytest.mark.parametrize("path", sorted(ROOT.glob("recipes/endpoints/*.yaml")), ids=lambda path: path.stem)
def test_a_provider_is_five_lines_of_yaml(m, path, monkeypatch):
    from trl import TrlParser

    (settings,) = TrlParser(m.Settings).parse_args_and_config(["--config", str(path), "--model", "x"])
    m.check_settings(settings)
    monkeypatch.setenv("AZURE_OPENAI_API_KEY", "k")
    client = m.Endpoint(settings, settings.base_url[0], [settings.api_key_env])
    assert client.body([], [], 0)["model"] == "x"
