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

    def __init__(self, source, stops, switches):
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
        environment.filters["tojson"] = lambda value, **how: json.dumps(value, **({"ensure_ascii": False} | how))
        environment.globals["raise_exception"] = self.refuse
        environment.globals["strftime_now"] = lambda how: datetime.now().strftime(how)
        self.template = environment.from_string(source)
        self.stops = stops
        self.switches = switches

    @staticmethod
    def refuse(message):
        raise jinja2.TemplateError(message)

    def render(self, messages, tools, prompt=False):
        return self.template.render(messages=messages, tools=tools, add_generation_prompt=prompt, bos_token="<BOS>",
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
        users = [j for j, message in enumerate(messages) if message["role"] == "user" and j > i]
        end = users[0] if users else len(messages)
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


def tokenizer(template, stops, switches):
    """One token a byte, and the stop tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    bpe = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.add_tokens([AddedToken(stop, special=False, normalized=False) for stop in stops])
    tok = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<BOS>", eos_token=stops[0], chat_template=template)
    tok.stop_ids = set(tok.convert_tokens_to_ids(stops))
    tok.template_kwargs = switches
    return tok


def trained_turns(tok, samples):
    """[(text before, trained text)] of every run of labels."""
    turns = []
    for sample in samples:
        labels = sample["labels"]
        starts = [i for i, label in enumerate(labels) if label != -100 and (i == 0 or labels[i - 1] == -100)]
        for start in starts:
            end = start
            while end < len(labels) and labels[end] != -100:
                end += 1
            turns.append((tok.decode(sample["input_ids"][:start]), tok.decode(sample["input_ids"][start:end])))
    return turns


KINDS = {"leaves it out": "left out", "rewrites": "rewritten", "does not take": "not taken", "out": "left out",
         "has no stop token": "no stop"}


def kind_of(refusal):
    return next(kind for words, kind in KINDS.items() if words in refusal)


def outcomes(sft, family):
    """{conversation: (oracle's verdict, what 03 did)}; both are turns, or why the row cannot be trained."""
    name, stops, switches, _ = FAMILIES[family]
    source = template_of(name)
    oracle = Oracle(source, stops, switches)
    tok = tokenizer(source, stops, switches)
    tok.end_id = sft.token_after_an_answer(tok)
    found = {}
    for title, messages in CONVERSATIONS.items():
        tools = TOOLS if any("tool_calls" in message for message in messages) else None
        row = {"query_id": title, "where": "f:1", "messages": messages, "tools": tools}
        samples, _, refused = sft.tokenize(tok, [row], 10**6)
        found[title] = (oracle.verdict(messages, tools), refused or trained_turns(tok, samples))
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


def test_a_template_that_drops_a_part_is_caught(stage):
    """GLM-4.5's own template broken at one place at a time: the second call, an argument, the results, a thought."""
    sft = stage("03_sft")
    whole = template_of("trl:glm4moe")
    breaks = {
        "for tc in m.tool_calls": ("for tc in m.tool_calls[:1]", "two calls", "tool_calls[1].function.name"),
        "for k, v in _args.items()": ("for k, v in {}.items()", "a call", "tool_calls[0].function.arguments"),
        "reasoning_content.strip() +": ("'' +", "thoughts", "reasoning_content"),
        "+ content.strip()": ("", "plain", "content"),
    }
    for old, (new, title, field) in breaks.items():
        assert old in whole, old
        tok = tokenizer(whole.replace(old, new), FAMILIES["GLM-4.5, 4.6"][1], {})
        tok.end_id = tok.convert_tokens_to_ids("<|user|>")
        row = {"query_id": "q", "where": "f:7", "messages": CONVERSATIONS[title], "tools": TOOLS}
        samples, _, refused = sft.tokenize(tok, [row], 10**6)
        assert not samples and refused[0].startswith("f:7: messages[") and f".{field}" in refused[0], refused


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
