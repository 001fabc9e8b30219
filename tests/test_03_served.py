"""What was trained is what is served: equality to the token, with vLLM on a CPU and stage 4's own agent loop.

A tiny random model learns four trajectories by heart (with and without thoughts, one user turn and two); then vLLM serves
the export, 04 runs the same tasks, and the ids of every prompt and answer that vLLM reports must be those of the samples
that 03 trained. The trajectories are episodes of 04 itself, with a scripted model.
"""

import json
import os

import pytest
from scripted import call

from recipes import label_doctor

pytestmark = pytest.mark.usefixtures("one_thread")

TOOLS = '''
def look(path):
    return f"{path} holds three lines:\\n a = 1\\n\\n b = 2"


TOOLS = [{"type": "function", "function": {"name": "look", "description": "Shows a file.", "parameters": {
    "type": "object", "properties": {"path": {"type": "string"}, "depth": {"type": "integer"}}, "required": ["path"]}}}]
'''
STOPS = {"glm": ["<|endoftext|>", "<|user|>", "<|observation|>"], "qwen": ["<|im_end|>", "<|endoftext|>"]}
QWEN = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
QWEN_ADDED = ["<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"]


def answers(name, thinks, turns):
    """What the scripted model says in a task: text with a call, a bare call, an answer; in the second turn again."""
    why = (lambda text: {"reasoning": text}) if thinks else (lambda text: {})
    script = []
    for turn in range(turns):
        script += [
            call("look", path=f"/{name}/{turn}.py") | {"content": f"I look at {name}."} | why(f"First {name}."),
            call("look", path=f"/{name}", depth=turn + 2) | why("Then\nthe rest."),
            {"content": f"{name}: turn {turn} is done.\n\nIt was easy."} | why("That is all."),
        ]
    return script


KINDS = {"plain": (False, 1), "thinking": (True, 1), "plain twice": (False, 2), "thinking twice": (True, 2)}


def task(kind):
    name = kind.replace(" ", "-")
    return name, [(f"Do {kind}, part {turn + 1}.", "true") for turn in range(KINDS[kind][1])]


@pytest.fixture
def rows(endpoint, evaluate, tmp_path):
    """The four trajectories: episodes of 04."""
    (tmp_path / "tools.py").write_text(TOOLS)
    tasks = [task(kind) for kind in KINDS]
    for kind, (name, turns) in zip(KINDS, tasks):
        endpoint.script[turns[0][0]] = answers(name, *KINDS[kind])
    episodes, _ = evaluate(*tasks, tools=str(tmp_path / "tools.py"), output_dir=tmp_path / "teacher", rounds=1)
    assert len(episodes) == 4
    return [{key: episode[key] for key in ("query_id", "messages", "tools")} for episode in episodes.values()]


def tokenizer(family, make_model, texts):
    from importlib.resources import files

    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    if family == "glm":
        return make_model.make_tokenizer(texts, vocab_size=700)
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=690, initial_alphabet=alphabet, show_progress=False))
    bpe.add_special_tokens(QWEN)
    bpe.add_tokens([AddedToken(token, special=False, normalized=False) for token in QWEN_ADDED])
    template = files("trl").joinpath("chat_templates/qwen3.jinja").read_text()
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>",
                                   chat_template=template)


def random_base(family, make_model, texts, folder):
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig, Qwen3Config

    tok = tokenizer(family, make_model, texts)
    stops = tok.convert_tokens_to_ids(STOPS[family])
    if family == "qwen":
        config = Qwen3Config(vocab_size=len(tok), hidden_size=128, intermediate_size=256, num_hidden_layers=2, head_dim=32,
                             num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=4096, dtype="bfloat16",
                             tie_word_embeddings=False, eos_token_id=stops, pad_token_id=tok.pad_token_id)
    else:
        config = make_model.make_config(tok)
        config.update(dict(hidden_size=128, intermediate_size=256, moe_intermediate_size=64, num_hidden_layers=2))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).to(torch.bfloat16)
    model.generation_config = GenerationConfig(eos_token_id=stops, pad_token_id=tok.pad_token_id)
    model.save_pretrained(folder)
    tok.save_pretrained(folder)


def learn_by_heart(sft, base, train_file, folder):
    flags = ["--model_name_or_path", base, "--train_file", train_file, "--output_dir", folder, "--learning_rate", 3e-3]
    flags += ["--global_batch_size", 4, "--per_device_train_batch_size", 4, "--max_steps", 120, "--warmup_steps", 20]
    flags += ["--weight_decay", 0, "--adam_beta2", 0.95, "--gradient_checkpointing", "false", "--logging_steps", 20]
    sft.main(*sft.read_settings(sft.make_parser(), [str(flag) for flag in flags]))
    recipe = json.loads((folder / "recipe.json").read_text())
    assert recipe["loss"][-1] < 0.03, recipe["loss"]
    return [json.loads(line) for line in (folder / "tokenized.jsonl").read_text().splitlines()]


def steps_of(episode):
    """[ids of a prompt + ids of the answer] of every model call; 04 keeps of a prompt that the next one begins with
    its length alone."""
    steps = []
    following = []
    for step in reversed(episode["served"]):
        prompt = step["prompt_token_ids"]
        following = following[:prompt] if isinstance(prompt, int) else prompt
        steps.append(following + step["token_ids"])
    return steps


@pytest.mark.vllm
@pytest.mark.parametrize("family", ["glm", "qwen"])
def test_a_trained_trajectory_is_served_to_the_token(stage, make_model, rows, evaluate, tmp_path, family):
    m, sft = stage("04_eval"), stage("03_sft")
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    random_base(family, make_model, [path.read_text()], tmp_path / "base")
    samples = learn_by_heart(sft, tmp_path / "base", path, tmp_path / "tuned")
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"
    args = "--dtype float32 --enforce-eager --max-model-len 4096"
    parsers = dict(tool_call_parser="hf", reasoning_parser="hf")
    served = m.Settings(model=str(tmp_path / "tuned"), vllm_args=args, **parsers)
    with m.vllm_server(served, tmp_path / "vllm.log") as (url, _):
        settings = dict(base_url=[url], model=str(tmp_path / "tuned"), tools=str(tmp_path / "tools.py"), rounds=1)
        settings |= dict(temperature=0.0, top_p=1.0, max_tokens=200, output_dir=tmp_path / "replayed")
        episodes, _ = evaluate(*[task(kind) for kind in KINDS], **settings)
    tok = sft.load_tokenizer(str(tmp_path / "tuned"))
    for row in rows:
        episode = episodes[row["query_id"], 0]
        told = [message["content"].strip() for message in episode["messages"]]  # templates strip them
        assert told == [message["content"].strip() for message in row["messages"]]
        trained = []
        for sample in samples:
            if sample["query_id"] == row["query_id"]:
                last = max(i for i, label in enumerate(sample["labels"]) if label != -100)
                trained.append(sample["input_ids"][: last + 1])
        steps = steps_of(episode)
        assert all(any(ids[: len(step)] == step for ids in trained) for step in steps), row["query_id"]
        assert all(ids in steps for ids in trained), row["query_id"]
        turns = label_doctor.expected_turns(sft, tok, row)  # what the label doctor calls right
        assert [turn.context + turn.target for turn in turns] == steps[::-1], row["query_id"]
        assert [turn.target for turn in turns] == [step["token_ids"] for step in episode["served"]]


# Families whose exported tokenizer describes its answers, so that vLLM needs no parser of its own for them
DESCRIBED = ["GLM-4.5, 4.6", "Qwen2.5", "Qwen3", "Qwen3-2507 Instruct", "Qwen3.5, thinking", "Qwen3.5, not thinking",
             "Qwen3.6"]


def read_back(parser, tok, tools, given, written, stops):
    """(thought, text, calls) that vLLM makes of what the model wrote."""
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

    for stop in stops:
        written = written.removesuffix(stop)
    question = [{"role": "user", "content": "U"}]
    request = ChatCompletionRequest(model="m", messages=question, tools=tools)
    reader = parser(tok, request.tools)
    reader.set_prompt_token_ids(tok(given, add_special_tokens=False)["input_ids"])
    thought, text, calls = reader.parse(written, request, enable_auto_tools=True)
    calls = [(call.name, json.loads(call.arguments)) for call in calls or []]
    return (thought or "").strip(), (text or "").strip(), calls


@pytest.mark.vllm
@pytest.mark.parametrize("family", DESCRIBED)
def test_an_answer_is_read_back_as_it_was_trained(stage, tmp_path, family):
    """vLLM's parsers "hf" on every turn that test_03_families.py trains: message in, message out."""
    from test_03_families import CONVERSATIONS, FAMILIES, TOOLS, Oracle, template_of, tokenizer
    from transformers import AutoTokenizer
    from vllm.parser.parser_manager import ParserManager

    name, stops, switches, _ = FAMILIES[family]
    source = template_of(name)
    stage("03_sft").save_tokenizer(tokenizer(source, stops, switches), tmp_path)
    tok = AutoTokenizer.from_pretrained(tmp_path)
    thinks = "hf" if "thinking" in tok.response_template["fields"] else None
    parser = ParserManager.get_parser(tool_parser_name="hf", reasoning_parser_name=thinks, enable_auto_tools=True)
    oracle = Oracle(source, stops, switches)
    turns = 0
    for title, messages in CONVERSATIONS.items():
        tools = TOOLS if any("tool_calls" in message for message in messages) else None
        right = oracle.verdict(messages, tools)
        if isinstance(right, str):
            continue
        trained = [m for m in messages if m["role"] == "assistant" and m.get("weight", 1)]
        for message, (given, written) in zip(trained, right, strict=True):
            functions = [call["function"] for call in message.get("tool_calls", [])]
            calls = [(function["name"], function["arguments"]) for function in functions]
            expected = (message.get("reasoning_content", ""), message["content"].strip(), calls)
            assert read_back(parser, tok, tools, given, written, stops) == expected, title
            turns += 1
    assert turns >= 65
