"""Stage 3: which tokens carry loss, the same loss on any layout, what is saved, and what is refused."""

import contextlib
import json
import os
import re
import resource
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# --------------------------------------------------------------------------------------------------------------------
# Two tokenizers of one token per byte, so that ids can be written by hand; special tokens and template are the models'

pytestmark = pytest.mark.usefixtures("one_thread")

GLM = dict(zip(
    ["<|endoftext|>", "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>", "<|system|>", "<|user|>", "<|assistant|>",
     "<|observation|>", "<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>",
     "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>", "/nothink"], range(256, 277)))  # fmt: skip
QWEN = dict(zip(
    ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>", "<tool_call>", "</tool_call>",
     "<tool_response>", "</tool_response>"], range(256, 265)))  # fmt: skip


@pytest.fixture(scope="session")
def work(tmp_path_factory):
    return tmp_path_factory.mktemp("sft")


@pytest.fixture(scope="session")
def glm_base(work, make_model):
    """A GLM-4.5 of two layers (one dense, one of 4 experts) as it lies on the Hub: bf16, router bias in fp32."""
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    tok = make_model.make_tokenizer(["a"], vocab_size=277)
    config = make_model.make_config(tok)
    config.update(dict(hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=2,
                       n_routed_experts=4, num_attention_heads=2, num_key_value_heads=1))  # fmt: skip
    return save_base(work / "glm", AutoModelForCausalLM, GenerationConfig, torch, tok, config)


@pytest.fixture(scope="session")
def qwen_base(work):
    """A Qwen3 of two layers with tied embeddings."""
    import torch
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerFast, Qwen3Config

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(["a"], trainers.BpeTrainer(vocab_size=256, initial_alphabet=alphabet, show_progress=False))
    bpe.add_special_tokens(list(QWEN)[:3])
    bpe.add_tokens([AddedToken(token, special=False, normalized=False) for token in list(QWEN)[3:]])
    template = files("trl").joinpath("chat_templates/qwen3.jinja").read_text()
    tok = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>",
                                  chat_template=template)  # fmt: skip
    config = Qwen3Config(vocab_size=265, hidden_size=32, intermediate_size=48, num_hidden_layers=2, head_dim=32,
                         num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=True, dtype="bfloat16",
                         max_position_embeddings=40960, eos_token_id=[258, 256], pad_token_id=256)  # fmt: skip
    return save_base(work / "qwen", AutoModelForCausalLM, GenerationConfig, torch, tok, config)


def save_base(path, AutoModelForCausalLM, GenerationConfig, torch, tok, config):
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).to(torch.bfloat16)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.data = torch.linspace(-0.1, 0.1, buffer.numel())  # values that bf16 cannot hold
    model.generation_config = GenerationConfig(eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id)
    model.save_pretrained(path)
    tok.save_pretrained(path)
    return path


def by_hand(marked, special):
    """(input_ids, labels) of a text whose trained spans stand in [[ ]]. Printable ASCII is numbered from '!' = 0."""
    ids, labels, trained = [], [], False
    while marked:
        if marked[:2] in ("[[", "]]"):
            trained, marked = marked[:2] == "[[", marked[2:]
            continue
        token = next((token for token in special if marked.startswith(token)), marked[0])
        number = special.get(token, {"\n": 198, " ": 220}.get(token, ord(token[0]) - 33))
        ids.append(number)
        labels.append(number if trained else -100)
        marked = marked[len(token) :]
    return ids, labels


def user(text):
    return {"role": "user", "content": text}


def assistant(text, *calls, why=None):
    message = {"role": "assistant", "content": text} | ({"reasoning_content": why} if why else {})
    if calls:
        message["tool_calls"] = [
            {"id": f"call_{i}", "type": "function", "function": {"name": name, "arguments": arguments}}
            for i, (name, arguments) in enumerate(calls)
        ]
    return message


def tool(text, number=0):
    return {"role": "tool", "content": text, "tool_call_id": f"call_{number}"}


def schema(name):
    return {"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": {}}}}


TOOLS = [schema("f"), schema("g")]

# One user turn: reasoning, two parallel calls, their two results, a call without text, the answer
ONE = [{"role": "system", "content": "S"}, user("U"), assistant("C", ("f", {"p": "x", "n": 2}), ("g", {}), why="R"),
       tool("T1"), tool("T2", 1), assistant("", ("f", {"p": "y"})), tool("T3"), assistant("D")]  # fmt: skip
GLM_ONE = (
    "[gMASK]<sop><|system|>\nS<|user|>\nU<|assistant|>[[\n<think>R</think>\nC"
    "\n<tool_call>f\n<arg_key>p</arg_key>\n<arg_value>x</arg_value>\n<arg_key>n</arg_key>\n<arg_value>2</arg_value>\n"
    "</tool_call>\n<tool_call>g\n</tool_call><|observation|>]]\n<tool_response>\nT1\n</tool_response>"
    "\n<tool_response>\nT2\n</tool_response><|assistant|>[[\n<think></think>"
    "\n<tool_call>f\n<arg_key>p</arg_key>\n<arg_value>y</arg_value>\n</tool_call><|observation|>]]"
    "\n<tool_response>\nT3\n</tool_response><|assistant|>[[\n<think></think>\nD<|user|>]]"
)
QWEN_ONE = (
    "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\n"
    '[[<think>\nR\n</think>\n\nC\n<tool_call>\n{"name": "f", "arguments": {"p": "x", "n": 2}}\n</tool_call>'
    '\n<tool_call>\n{"name": "g", "arguments": {}}\n</tool_call><|im_end|>]]\n<|im_start|>user'
    "\n<tool_response>\nT1\n</tool_response>\n<tool_response>\nT2\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
    '[[<tool_call>\n{"name": "f", "arguments": {"p": "y"}}\n</tool_call><|im_end|>]]\n<|im_start|>user'
    "\n<tool_response>\nT3\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
    "[[<think>\n\n</think>\n\nD<|im_end|>]]\n"
)
# Two user turns with reasoning in the first: each is trained in the context that inference gives it
TWO = [user("U"), assistant("C", ("g", {}), why="R"), tool("T"), assistant("D"), user("V"), assistant("E", why="Q")]
GLM_TWO = (
    "[gMASK]<sop><|user|>\nU<|assistant|>[[\n<think>R</think>\nC\n<tool_call>g\n</tool_call><|observation|>]]"
    "\n<tool_response>\nT\n</tool_response><|assistant|>[[\n<think></think>\nD<|user|>]]",
    "[gMASK]<sop><|user|>\nU<|assistant|>\n<think></think>\nC\n<tool_call>g\n</tool_call><|observation|>"
    "\n<tool_response>\nT\n</tool_response><|assistant|>\n<think></think>\nD<|user|>"
    "\nV<|assistant|>[[\n<think>Q</think>\nE<|user|>]]",
)
QWEN_CALL = '<tool_call>\n{"name": "g", "arguments": {}}\n</tool_call><|im_end|>'
QWEN_TWO = (
    f"<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\n[[<think>\nR\n</think>\n\nC\n{QWEN_CALL}]]"
    "\n<|im_start|>user\n<tool_response>\nT\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
    "[[<think>\n\n</think>\n\nD<|im_end|>]]\n",
    f"<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\nC\n{QWEN_CALL}"
    "\n<|im_start|>user\n<tool_response>\nT\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
    "D<|im_end|>\n<|im_start|>user\nV<|im_end|>\n<|im_start|>assistant\n[[<think>\nQ\n</think>\n\nE<|im_end|>]]\n",
)
# Two user turns, reasoning only after the last: nothing is dropped later, one sample trains both
PLAIN = [user("U"), assistant("D"), user("V"), assistant("E", why="Q")]
GLM_PLAIN = (
    "[gMASK]<sop><|user|>\nU<|assistant|>[[\n<think></think>\nD<|user|>]]\nV<|assistant|>"
    "[[\n<think>Q</think>\nE<|user|>]]"
)

# Two user turns without reasoning: Qwen3 writes an empty thought into the last turn only, so each is a sample
BARE = [user("U"), assistant("D"), user("V"), assistant("E")]
QWEN_BARE = (
    "<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\n[[<think>\n\n</think>\n\nD<|im_end|>]]\n",
    "<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\nD<|im_end|>\n<|im_start|>user\nV<|im_end|>\n"
    "<|im_start|>assistant\n[[<think>\n\n</think>\n\nE<|im_end|>]]\n",
)


@pytest.mark.parametrize(
    "base, special, messages, expected",
    [
        ("glm_base", GLM, ONE, [GLM_ONE]),
        ("qwen_base", QWEN, ONE, [QWEN_ONE]),
        ("glm_base", GLM, TWO, GLM_TWO),
        ("qwen_base", QWEN, TWO, QWEN_TWO),
        ("glm_base", GLM, PLAIN, [GLM_PLAIN]),
        ("qwen_base", QWEN, BARE, QWEN_BARE),
    ],
)
def test_labels_are_what_the_engine_must_generate(stage, request, base, special, messages, expected):
    sft = stage("03_sft")
    tok = sft.load_tokenizer(str(request.getfixturevalue(base)))
    samples, dropped, refused = sft.tokenize(tok, [{"query_id": "q", "where": "here", "messages": messages}], 10_000)
    assert not dropped and not refused
    assert [(s["input_ids"], s["labels"]) for s in samples] == [by_hand(text, special) for text in expected]


def test_ids_of_one_turn_digit_by_digit(stage, glm_base):
    sft = stage("03_sft")
    ids, labels = sft.encode(sft.load_tokenizer(str(glm_base)), [user("hi"), assistant("Yo")], None)
    #      [gMASK] <sop> <|user|> \n   h   i  <|assistant|> \n  <think> </think> \n  Y   o  <|user|>
    assert ids == [258, 260, 263, 198, 71, 72, 264, 198, 266, 267, 198, 56, 78, 263]
    assert labels == [-100] * 7 + [198, 266, 267, 198, 56, 78, 263]


def test_stop_tokens_are_those_of_the_engine(stage, glm_base, qwen_base):
    sft = stage("03_sft")
    glm, qwen = sft.load_tokenizer(str(glm_base)), sft.load_tokenizer(str(qwen_base))
    assert (glm.stop_ids, glm.end_id) == ({256, 263, 265}, 263)
    assert (qwen.stop_ids, qwen.end_id) == ({258, 256}, None)  # its template writes <|im_end|> itself


def test_ablations_by_hand(stage, glm_base, qwen_base):
    """Without the stop token's label only the labels change; without reasoning the rows are rendered as if they had
    none, in one sample, because there is nothing left that inference would drop."""
    sft, row = stage("03_sft"), {"query_id": "q", "where": "here", "messages": TWO}
    glm, qwen = sft.load_tokenizer(str(glm_base)), sft.load_tokenizer(str(qwen_base))

    def pairs(tok, **ablation):
        return [(s["input_ids"], s["labels"]) for s in sft.tokenize(tok, [row], 10_000, **ablation)[0]]

    assert pairs(glm, no_stop_token=True) == [
        by_hand(text.replace("<|user|>]]", "]]<|user|>").replace("<|observation|>]]", "]]<|observation|>"), GLM)
        for text in GLM_TWO
    ]
    qwen_two = [text.replace("<|im_end|>]]", "]]<|im_end|>") for text in QWEN_TWO]
    assert pairs(qwen, no_stop_token=True) == [by_hand(text, QWEN) for text in qwen_two]
    bare = (
        "[gMASK]<sop><|user|>\nU<|assistant|>[[\n<think></think>\nC\n<tool_call>g\n</tool_call><|observation|>]]"
        "\n<tool_response>\nT\n</tool_response><|assistant|>[[\n<think></think>\nD<|user|>]]"
        "\nV<|assistant|>[[\n<think></think>\nE<|user|>]]"
    )
    assert pairs(glm, no_reasoning=True) == [by_hand(bare, GLM)]
    inline = [m | {"content": f"<think>{m.pop('reasoning_content')}</think>\n{m['content']}"}
              if "reasoning_content" in m else m for m in map(dict, TWO)]  # fmt: skip
    row = row | {"messages": inline}
    assert pairs(glm, no_reasoning=True) == [by_hand(bare, GLM)]


def test_tool_schemas_are_in_the_context_and_carry_no_loss(stage, glm_base):
    sft = stage("03_sft")
    tok = sft.load_tokenizer(str(glm_base))
    tools = [{"type": "function", "function": {"name": "g", "parameters": {"type": "object", "properties": {}}}}]
    ids, labels = sft.encode(tok, ONE, tools)
    assert '{"name": "g", "parameters"' in tok.decode([t for t, label in zip(ids, labels) if label == -100])
    assert [label for label in labels if label != -100] == [t for t in by_hand(GLM_ONE, GLM)[1] if t != -100]


def test_no_label_is_invented(stage, glm_base):
    sft = stage("03_sft")
    tok = sft.load_tokenizer(str(glm_base))
    with pytest.raises(sft.Refused, match=r"messages\[1\]: has no stop token"):  # two assistant messages in a row
        sft.encode(tok, [user("U"), assistant("C"), assistant("D")], None)
    glm = tok.chat_template
    tok.chat_template = "{{ messages | length }}" + glm
    with pytest.raises(sft.Refused, match=r"messages\[1\]: the chat template rewrites what stands before it"):
        sft.encode(tok, [user("U"), assistant("C")], None)


def test_a_turn_that_begins_inside_a_token_is_refused(stage, make_model):
    """Qwen3's prompt ends with a newline; where a tokenizer joins two of them, the engine would see other tokens."""
    sft = stage("03_sft")
    tok = make_model.make_tokenizer(["a" + "\n" * 2] * 9, vocab_size=278)
    tok.chat_template = files("trl").joinpath("chat_templates/qwen3.jinja").read_text()
    tok.stop_ids, tok.end_id = {tok.convert_tokens_to_ids("<|user|>")}, tok.convert_tokens_to_ids("<|user|>")
    tok.template_kwargs = {}
    assert len(tok("\n\n")["input_ids"]) == 1
    with pytest.raises(sft.Refused, match=r"messages\[1\]: begins inside a token"):
        sft.encode(tok, [user("U"), assistant("\n\nC"), tool("T")], None)


def test_long_samples_are_left_out_and_counted_and_spelled_stops_refused(stage, glm_base):
    sft = stage("03_sft")
    talks = [[user("U"), assistant("D" * n)] for n in (5, 50)] + [[user("U"), assistant("then <|user|> came")]]
    talks += [[user("a log shows <|user|> here"), assistant("D")]]  # in the context it does no harm
    rows = [{"query_id": f"q{i}", "where": f"f:{i}", "messages": talk} for i, talk in enumerate(talks)]
    samples, dropped, refused = sft.tokenize(sft.load_tokenizer(str(glm_base)), rows, 60)
    assert [s["query_id"] for s in samples] == ["q0", "q3"]
    assert dropped == {"longer than max_length 60 tokens": 1}
    assert refused == ["f:2: messages[1]: spells out a stop token"]


def test_global_batches_hold_every_sample_once_a_pass(stage):
    sft = stage("03_sft")
    lengths = [10, 70, 30, 90, 50]
    order = sft.global_batches(lengths, 12, 4, seed=42)
    assert len(order) == 12 and order == sft.global_batches(lengths, 12, 4, seed=42)
    assert order != sft.global_batches(lengths, 12, 4, seed=43)
    for start in (0, 4, 8):  # longest first, so that the processes of one step hold samples of like length
        batch = [lengths[i] for i in order[start : start + 4]]
        assert batch == sorted(batch, reverse=True)
    assert len(set(order[:4])) == 4
    counts = [order.count(i) for i in range(5)]
    assert sum(counts) == 12 and min(counts) >= 2 and max(counts) <= 3


# --------------------------------------------------------------------------------------------------------------------
# Training: five conversations of unlike length, global batches of 4, so no two steps see the same samples


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def train_file(work):
    talks = [ONE, TWO[:4], PLAIN, [user("U" * 90), assistant("D" * 7)], [user("U"), assistant("D" * 60)]]
    tools = [TOOLS, TOOLS, [], [], []]
    rows = [{"query_id": f"q{i}", "messages": m, "tools": t} for i, (m, t) in enumerate(zip(talks, tools))]
    return write_rows(work / "train.jsonl", rows)


FLAGS = ["--global_batch_size", 4, "--max_steps", 3, "--learning_rate", 1e-3, "--gradient_checkpointing", "false",
         "--save_steps", 2, "--save_total_limit", 5]  # fmt: skip


# An adapter begins at 0: the first gradients of some weights are noise, which Adam would blow up to a whole step
LORA = ["--lora", "--adam_epsilon", 1e-5]
EXPERTS = ["--lora_experts", "--adam_epsilon", 1e-5]
NO_WARM_UP = ["--warmup_steps", 0]


def train(sft, base, train_file, output_dir, *flags):
    """Run the stage in this process; its recipe.json."""
    flags = ["--model_name_or_path", base, "--train_file", train_file, "--output_dir", output_dir, *FLAGS, *flags]
    sft.main(*sft.read_settings(sft.make_parser(), [str(flag) for flag in flags]))
    return json.loads((output_dir / "recipe.json").read_text())


def weights(path):
    from safetensors.torch import load_file

    return load_file(path / "model.safetensors")


def assert_same_run(recipe, path, reference):
    """Equal to 1e-6 in every loss and in every fp32 parameter after 3 steps."""
    expected, reference_path = reference
    assert recipe["loss"] == pytest.approx(expected["loss"], abs=1e-6)
    ours, theirs = weights(path / "checkpoint-3"), weights(reference_path / "checkpoint-3")
    assert ours.keys() == theirs.keys()
    assert max((ours[name] - theirs[name]).abs().max().item() for name in theirs) < 1e-6


@pytest.fixture(scope="session")
def glm_run(stage, glm_base, train_file, work):
    """One process, four samples accumulated."""
    return train(stage("03_sft"), glm_base, train_file, work / "glm-1"), work / "glm-1"


def test_loss_is_the_mean_over_all_trained_tokens_of_the_global_batch(stage, glm_run, glm_base, train_file):
    """By hand: sum of the cross-entropy over all labels of the batch / number of labels, on the base's weights."""
    import torch
    from transformers import AutoModelForCausalLM

    sft, (recipe, _) = stage("03_sft"), glm_run
    samples, _, _ = sft.tokenize(sft.load_tokenizer(str(glm_base)), sft.read_rows(train_file)[0], 10_000)
    order = sft.global_batches([len(s["input_ids"]) for s in samples], 12, 4, seed=42)
    model = AutoModelForCausalLM.from_pretrained(glm_base, dtype=torch.float32)
    total, count = 0.0, 0
    for i in order[:4]:
        with torch.no_grad():
            logits = model(torch.tensor([samples[i]["input_ids"]])).logits[0, :-1]
        labels = torch.tensor(samples[i]["labels"][1:])
        total += torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum").item()
        count += (labels != -100).sum().item()
    assert recipe["loss"][0] == pytest.approx(total / count, abs=2e-6)
    assert recipe["loss"][2] < recipe["loss"][0] - 0.01


@pytest.fixture(scope="session")
def qwen_run(stage, qwen_base, train_file, work):
    return train(stage("03_sft"), qwen_base, train_file, work / "qwen-1"), work / "qwen-1"


@pytest.fixture(scope="session")
def lora_run(stage, glm_base, train_file, work):
    return train(stage("03_sft"), glm_base, train_file, work / "lora-1", *LORA), work / "lora-1"


@pytest.fixture(scope="session")
def experts_run(stage, glm_base, train_file, work):
    return train(stage("03_sft"), glm_base, train_file, work / "experts-1", *EXPERTS), work / "experts-1"


@pytest.fixture(scope="session")
def bf16_run(stage, glm_base, train_file, work):
    return train(stage("03_sft"), glm_base, train_file, work / "bf16-1", "--bf16_master"), work / "bf16-1"


def test_batches_of_two_equal_accumulation(stage, glm_run, glm_base, train_file, work):
    recipe = train(stage("03_sft"), glm_base, train_file, work / "glm-b2", "--per_device_train_batch_size", 2)
    assert_same_run(recipe, work / "glm-b2", glm_run)


def launch(config, script, *arguments, returncode=0):
    """Start a script on two processes with accelerate's launcher and a YAML, as a user does."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", free_port()]
    command += ["--config_file", config, "--num_processes", 2, "--mixed_precision", "no", script, *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_TORCH_DEVICE": "cpu"}
    command = [str(part) for part in command]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1800, cwd=ROOT)
    assert result.returncode == returncode, result.stderr
    return result


def free_port():
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


# As a user's command, but several runs in the same two processes; the second on a disk that takes no optimizer's
# state, the last, with a user's mistake, as the script itself
PLAIN_DATA_PARALLEL = """
import importlib, json, resource, runpy, sys, torch
sys.path.insert(0, ".")
sft = importlib.import_module("03_sft")
for flags, limit in json.loads(sys.argv[1]):
    parsed = sft.read_settings(sft.make_parser(), flags)
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit or hard, hard))
    try:
        sft.main(*parsed)
    except OSError as error:
        sys.stdout.write(f"{torch.distributed.get_rank()} {error}\\n")  # at one go, or the lines of both mix
resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
sys.argv = ["03_sft.py", *json.loads(sys.argv[2])]
runpy.run_path("03_sft.py", run_name="__main__")
"""


@pytest.fixture(scope="session")
def two_processes(glm_base, train_file, work):
    (work / "two.yaml").write_text("distributed_type: MULTI_GPU\nnum_machines: 1\nnum_processes: 2\n")
    (work / "two.py").write_text(PLAIN_DATA_PARALLEL)
    runs = []
    for name, limit in (("glm-2", None), ("one-disk", 200_000)):
        flags = ["--model_name_or_path", glm_base, "--train_file", train_file, "--output_dir", work / name, *FLAGS]
        runs.append([[str(flag) for flag in flags], limit])
    path = write_rows(work / "mistake.jsonl", [{"messages": [user("U"), assistant("D")]}, {"messages": []}])
    mistake = ["--model_name_or_path", glm_base, "--train_file", path, "--output_dir", work / "none"]
    mistake = json.dumps([str(flag) for flag in mistake])
    return launch(work / "two.yaml", work / "two.py", json.dumps(runs), mistake, returncode=1)  # the launcher's own


def test_two_processes_equal_one(two_processes, glm_run, work):
    recipe = json.loads((work / "glm-2/recipe.json").read_text())
    assert recipe["processes"] == 2
    assert_same_run(recipe, work / "glm-2", glm_run)


def test_full_disk_of_one_process_ends_the_other(two_processes, work):
    """Without FSDP the first process alone writes; the second must not wait for it in the next update."""
    told = sorted(line for line in two_processes.stdout.splitlines() if "no space for it" in line)
    assert [line[0] for line in told] == ["0", "1"] and "inline_container" in told[0] and told[1].endswith("before. ")
    assert not list((work / "one-disk").glob("checkpoint-*"))


# accelerate takes FSDP on CPU for a mistake and trains without it, not saying so; this makes it see devices. All else
# is as on GPUs: the recipe's YAML, transformers' sharded loading, torch's FSDP2 over gloo, sharded checkpoints
FSDP_ON_CPU = """
import importlib, json, resource, shutil, sys, torch
from accelerate.state import GradientState, PartialState
from accelerate.utils import DistributedType
torch.distributed.init_process_group("gloo")
PartialState._prepare_backend = lambda *_: ("gloo", DistributedType.MULTI_GPU)
sys.path.insert(0, ".")
sft = importlib.import_module("03_sft")
for source, flags, *limit in json.loads(sys.argv[1]):
    if source and torch.distributed.get_rank() == 0:  # a run that was killed after its second update
        target = flags[flags.index("--output_dir") + 1]
        shutil.copytree(source, target, ignore=lambda *_: ["checkpoint-3", "recipe.json"])
    torch.distributed.barrier()
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit[0] if limit else unlimited[0], unlimited[1]))
    try:
        sft.main(*sft.make_parser().parse_args_and_config(args=flags))
        assert not limit
    except OSError as error:
        assert limit
        sys.stdout.write(f"{torch.distributed.get_rank()} {error}\\n")  # at one go, or the lines of both mix
    resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
print("plugin_kwargs", GradientState().plugin_kwargs)
torch.distributed.destroy_process_group()
"""


@pytest.fixture(scope="session")
def fsdp_runs(glm_base, qwen_base, train_file, work):
    """Real FSDP2 on two processes: GLM-4.5 whole, interrupted and resumed, with LoRA; Qwen3 with tied embeddings."""

    def flags(base, name, *more):
        paths = ["--model_name_or_path", base, "--train_file", train_file, "--output_dir", work / name]
        return [str(flag) for flag in [*paths, *FLAGS, "--gradient_checkpointing", "true", *more]]

    runs = [(None, flags(glm_base, "fsdp-glm")), (str(work / "fsdp-glm"), flags(glm_base, "fsdp-resumed"))]
    runs += [(None, flags(glm_base, "fsdp-lora", *LORA)), (None, flags(qwen_base, "fsdp-qwen"))]
    runs += [(None, flags(glm_base, "fsdp-experts", *EXPERTS)), (None, flags(glm_base, "fsdp-bf16", "--bf16_master"))]
    runs += [(str(work / "fsdp-bf16"), flags(glm_base, "fsdp-bf16-resumed", "--bf16_master"))]
    runs += [(None, flags(glm_base, "fsdp-experts-bf16", *EXPERTS, "--bf16_master"))]
    disk = flags(glm_base, "fsdp-disk")
    runs += [(str(work / "fsdp-glm"), disk, 20_000), (None, disk)]
    (work / "fsdp_on_cpu.py").write_text(FSDP_ON_CPU)
    return launch(ROOT / "recipes/qwen3-8b/accelerate.yaml", work / "fsdp_on_cpu.py", json.dumps(runs))


# torch's ring attention runs on GPUs only. This shares a sample out in contiguous parts and lets every process gather
# all keys and values; the trainer, accelerate's meshes, the loss and the order of the data around it are the real ones
RING_ON_CPU = """
import contextlib, torch
import torch.distributed.nn.functional as collective
import torch.distributed.tensor.experimental as experimental
@contextlib.contextmanager
def ring(mesh, *, buffers, buffer_seq_dims, no_restore_buffers=None):
    rank, size, attention = mesh.get_local_rank(), mesh.size(), torch.nn.functional.scaled_dot_product_attention
    for buffer, dim in zip(buffers, buffer_seq_dims):
        part = buffer.chunk(size, dim)[rank].clone()
        buffer.resize_(part.shape).copy_(part)
    def gathered(query, key, value, **options):
        assert options.pop("is_causal") and options.pop("attn_mask", None) is None
        key, value = (torch.cat(collective.all_gather(x.contiguous(), mesh.get_group()), 2) for x in (key, value))
        part = query.shape[2]
        mask = torch.ones(part, part * size, dtype=torch.bool).tril(rank * part)
        return attention(query, key, value, attn_mask=mask, **options)
    torch.nn.functional.scaled_dot_product_attention = gathered
    try:
        yield
    finally:
        torch.nn.functional.scaled_dot_product_attention = attention
experimental.context_parallel = ring
"""


def test_context_parallel_equals_one_process(glm_run, glm_base, train_file, work):
    """The YAML of qwen3-32b with two devices to a sample instead of eight."""
    yaml = (ROOT / "recipes/qwen3-32b/accelerate.yaml").read_text()
    assert "cp_size: 8" in yaml and "num_processes: 8" in yaml
    yaml = yaml.replace("cp_size: 8", "cp_size: 2").replace("num_processes: 8", "num_processes: 2")
    (work / "cp.yaml").write_text(yaml)
    (work / "cp_on_cpu.py").write_text(RING_ON_CPU + FSDP_ON_CPU)
    flags = ["--model_name_or_path", glm_base, "--train_file", train_file, "--output_dir", work / "cp", *FLAGS]
    flags += ["--gradient_checkpointing", "true"]
    result = launch(work / "cp.yaml", work / "cp_on_cpu.py", json.dumps([(None, [str(flag) for flag in flags])]))
    assert "1 data-parallel x 1 x 4 accumulated" in result.stdout
    recipe, folder = glm_run
    assert losses(work / "cp") == pytest.approx(recipe["loss"], abs=1e-6)
    assert_same_export(work / "cp", folder)


def sharded_weights(checkpoint, work):
    import torch
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    dcp_to_torch_save(checkpoint / "pytorch_model_fsdp_0", work / "whole.pt")
    return torch.load(work / "whole.pt")["model"]


def test_fsdp2_equals_one_process(fsdp_runs, stage, glm_run, glm_base, work):
    assert "'sync_each_batch': True" in fsdp_runs.stdout  # else gradients are kept whole between micro-batches
    recipe, folder = glm_run
    assert losses(work / "fsdp-glm") == pytest.approx(recipe["loss"], abs=1e-6)
    ours, theirs = sharded_weights(work / "fsdp-glm/checkpoint-3", work), weights(folder / "checkpoint-3")
    assert len(ours) == 29  # layer 1's experts are two stacked tensors while training, 12 in a checkpoint of the Hub
    for name in ours.keys() & theirs.keys():
        assert (ours[name] - theirs[name]).abs().max() < 1e-6, name
    experts = {name for name in theirs if ".experts." in name}
    assert theirs.keys() - ours.keys() == experts
    stacked = ours["model.layers.1.mlp.experts.down_proj"]
    for i in range(4):
        assert (stacked[i] - theirs[f"model.layers.1.mlp.experts.{i}.down_proj.weight"]).abs().max() < 1e-6
    assert_same_export(work / "fsdp-glm", folder)


def test_fsdp2_equals_one_process_with_tied_embeddings(fsdp_runs, stage, qwen_run, work):
    recipe, folder = qwen_run
    assert losses(work / "fsdp-qwen") == pytest.approx(recipe["loss"], abs=1e-6)
    assert_same_export(work / "fsdp-qwen", folder)


def test_fsdp2_equals_one_process_with_lora(fsdp_runs, lora_run, work):
    recipe, folder = lora_run
    assert losses(work / "fsdp-lora") == pytest.approx(recipe["loss"], abs=1e-6)
    assert_same_export(work / "fsdp-lora", folder)


def test_fsdp2_resumes_exactly(fsdp_runs, work):
    import torch

    assert "going on from" in fsdp_runs.stdout
    assert losses(work / "fsdp-resumed") == losses(work / "fsdp-glm")
    ours, theirs = (sharded_weights(work / name / "checkpoint-3", work) for name in ("fsdp-resumed", "fsdp-glm"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_fsdp2_equals_one_process_with_lora_on_experts(fsdp_runs, experts_run, work):
    recipe, folder = experts_run
    assert losses(work / "fsdp-experts-bf16") == pytest.approx(recipe["loss"], abs=0.02)  # frozen weights in bf16
    assert losses(work / "fsdp-experts") == pytest.approx(recipe["loss"], abs=1e-6)
    assert_same_export(work / "fsdp-experts", folder)


def test_fsdp2_keeps_bf16_weights_and_resumes_exactly(fsdp_runs, bf16_run, work):
    """Equal to one process as far as gradients in bf16 are."""
    import torch

    assert losses(work / "fsdp-bf16") == pytest.approx(bf16_run[0]["loss"], abs=2e-3)
    assert losses(work / "fsdp-bf16-resumed") == losses(work / "fsdp-bf16")
    ours, theirs = (sharded_weights(work / name / "checkpoint-3", work) for name in ("fsdp-bf16-resumed", "fsdp-bf16"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    bias = {name for name, tensor in ours.items() if tensor.dtype != torch.bfloat16}
    assert bias == {"model.layers.1.mlp.gate.e_score_correction_bias"}


def test_full_disk_under_fsdp2_leaves_the_old_checkpoint(fsdp_runs, work):
    """The shards of the weights do not fit: every process ends with one line, and the same command goes on exactly."""
    told = [line for line in fsdp_runs.stdout.splitlines() if "no space for it" in line]
    assert sorted(line[0] for line in told) == ["0", "1"] and all("checkpoint-3: " in line for line in told)
    assert f"going on from {work / 'fsdp-disk/checkpoint-2'}" in fsdp_runs.stdout
    assert losses(work / "fsdp-disk") == losses(work / "fsdp-glm")


def losses(folder):
    return json.loads((folder / "recipe.json").read_text())["loss"]


def assert_same_export(folder, reference):
    """Equal but for the rounding to bf16 of values that differ by less than 1e-6."""
    assert json.loads((folder / "config.json").read_text()) == json.loads((reference / "config.json").read_text())
    ours, theirs = weights(folder), weights(reference)
    assert ours.keys() == theirs.keys()
    for name in theirs:
        assert ours[name].dtype == theirs[name].dtype
        off = (ours[name].float() - theirs[name].float()).abs()
        assert (off <= 1e-6 + 2**-8 * theirs[name].float().abs()).all() and (off > 0).float().mean() < 0.01, name


# --------------------------------------------------------------------------------------------------------------------
# bf16 weights


def test_random_rounding_keeps_the_mean(stage):
    """1 + 3/1024 lies 3/8 of the way between two numbers of bf16; 2**20 roundings, 6 standard deviations."""
    import torch

    def rounded(values):
        return stage("03_sft").random_rounding(values, torch.Generator().manual_seed(1))

    values = rounded(torch.full((2**20,), 1 + 3 / 1024))
    assert values.dtype == torch.bfloat16 and values.unique().tolist() == [1, 1 + 8 / 1024]
    assert (values > 1).float().mean().item() == pytest.approx(3 / 8, abs=6 * (3 / 8 * 5 / 8 / 2**20) ** 0.5)
    assert torch.equal(rounded(torch.full((2**20,), -1 - 3 / 1024)), -values)
    exact = torch.tensor([0.0, -1.5, float("inf")])
    assert torch.equal(rounded(exact), exact.bfloat16())
    assert rounded(torch.tensor([float("nan")])).isnan().all()


def test_bf16_weights_take_the_whole_update(stage):
    """The recipe's learning rates on weights of the usual size: the mean projection on what fp32 AdamW does."""
    import torch

    sft = stage("03_sft")
    torch.manual_seed(0)
    start = (0.02 * torch.randn(2**18)).bfloat16()
    grads, rates = [torch.randn(2**18).bfloat16() for _ in range(8)], [0, 5, 10, 9.4, 7.8, 5.5, 3.3, 1.6]

    def update(optimizer, dtype):
        weight = torch.nn.Parameter(start.to(dtype, copy=True))
        optimizer = optimizer([weight], lr=1e-5, betas=(0.9, 0.98), eps=1e-8, weight_decay=0.1)
        for rate, grad in zip(rates, grads):
            optimizer.param_groups[0]["lr"], weight.grad = rate * 1e-6, grad.to(dtype)
            optimizer.step()
        assert weight.dtype == dtype
        return (weight - start).detach().float(), optimizer.state[weight]

    wanted, state = update(torch.optim.AdamW, torch.float32)
    plain, _ = update(torch.optim.AdamW, torch.bfloat16)
    ours, ours_state = update(sft.RoundingAdamW, torch.bfloat16)
    assert plain @ wanted / (wanted @ wanted) < 0.15
    assert ours @ wanted / (wanted @ wanted) == pytest.approx(1, abs=0.02)
    for name in ("exp_avg", "exp_avg_sq"):
        assert ours_state[name].dtype == torch.bfloat16
        slope = ours_state[name].float() @ state[name] / (state[name] @ state[name])
        assert slope == pytest.approx(1, abs=1e-3), name
    assert torch.equal(ours, update(sft.RoundingAdamW, torch.bfloat16)[0])
    flat, turned = (torch.nn.Parameter(start.view(512, 512).clone()) for _ in range(2))
    flat.grad, turned.grad = grads[0].view(512, 512), grads[0].view(512, 512).T.contiguous().T  # as experts may have it
    sft.RoundingAdamW([flat], lr=1e-5).step()
    sft.RoundingAdamW([turned], lr=1e-5).step()
    assert torch.equal(flat, turned) and not torch.equal(flat.flatten(), start)


def test_bf16_moments_forget(stage):
    """100 updates without a gradient: the second moment decays by 0.1 % each; to the nearest it would stay."""
    import torch

    weight = torch.nn.Parameter(torch.zeros(2**16, dtype=torch.bfloat16))
    optimizer = stage("03_sft").RoundingAdamW([weight], lr=0.0, betas=(0.9, 0.999))
    for grad in [1.0] + 100 * [0.0]:
        weight.grad = torch.full_like(weight, grad)
        optimizer.step()
    assert optimizer.state[weight]["exp_avg_sq"].double().mean().item() == pytest.approx(0.001 * 0.999**100, rel=1e-3)
    assert not weight.any()


def test_bf16_weights_in_a_run(bf16_run, glm_run):
    """Half the memory in weights and moments; the loss is that of fp32 weights as far as bf16 can tell."""
    import torch

    recipe, folder = bf16_run
    assert recipe["loss"] == pytest.approx(glm_run[0]["loss"], abs=0.02)
    assert {part.dtype for part in weights(folder / "checkpoint-3").values()} == {torch.bfloat16, torch.float32}
    state = torch.load(folder / "checkpoint-3/optimizer.pt")["state"]
    assert {part["exp_avg"].dtype for part in state.values()} == {torch.bfloat16}
    assert {part["exp_avg_sq"].dtype for part in state.values()} == {torch.bfloat16}
    exported, kept = weights(folder), weights(folder / "checkpoint-3")
    assert all(torch.equal(exported[name], kept[name]) for name in exported)


# --------------------------------------------------------------------------------------------------------------------
# Interrupted runs


@pytest.mark.parametrize("run", ["glm_run", "lora_run", "experts_run", "bf16_run"])
def test_a_killed_run_goes_on_exactly(stage, request, train_file, tmp_path, run):
    """The checkpoint after update 2 and nothing later: the third update must be the same. For an MoE too, whose
    experts the trainer alone would leave as they were in the base."""
    import shutil

    import torch

    recipe, folder = request.getfixturevalue(run)
    shutil.copytree(folder, tmp_path / "out", ignore=lambda *_: ["checkpoint-3", "recipe.json"])
    (tmp_path / "out/checkpoint-9").mkdir()  # a kill while saving leaves a folder without trainer_state.json
    flags = {"lora_run": LORA, "experts_run": EXPERTS, "bf16_run": ["--bf16_master"]}.get(run, [])
    again = train(stage("03_sft"), recipe["settings"]["model_name_or_path"], train_file, tmp_path / "out", *flags)
    assert again["loss"] == recipe["loss"]
    assert sorted(file.name for file in (tmp_path / "out").glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-3"]
    ours, theirs = weights(tmp_path / "out"), weights(folder)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


# Every run is a fork of a process that has imported everything, so that most of its time is in the run itself
KILLS = """
import importlib, json, os, random, signal, sys, time
sys.path.insert(0, ".")
sft = importlib.import_module("03_sft")
flags, folder, wanted = json.loads(sys.argv[1]), sys.argv[2], int(sys.argv[3])
dice = random.Random(0)
def run(name, longest=None):
    child = os.fork()
    if child == 0:
        sft.main(*sft.read_settings(sft.make_parser(), [*flags, "--output_dir", f"{folder}/{name}"]))
        os._exit(0)
    if longest is not None:
        time.sleep(dice.uniform(0, longest))
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
begun = time.monotonic()
codes = [run("whole")]
seconds = time.monotonic() - begun
kills = runs = 0
while kills < wanted:
    code = run(runs, seconds)
    kills += code == -9
    if code == 0:
        runs += 1
    elif code != -9:
        codes.append(code)
codes.append(run(runs))
print(json.dumps([kills, runs + 1, codes]))
"""


@pytest.mark.kills
def test_twenty_kills_change_nothing(glm_base, train_file, tmp_path):
    """SIGKILL at any time of a run, twenty times: every run that ends has the losses and the export of a whole one."""
    flags = ["--model_name_or_path", glm_base, "--train_file", train_file, *FLAGS, "--save_steps", 1, "--max_steps", 5]
    command = [sys.executable, "-c", KILLS, json.dumps([str(flag) for flag in flags]), str(tmp_path), "20"]
    one = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=one, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    kills, runs, codes = json.loads(result.stdout.splitlines()[-1])
    print(f"{kills} kills, {runs} runs ended, {result.stdout.count('going on from')} times from a checkpoint")
    assert kills == 20 and set(codes) == {0}
    expected = (tmp_path / "whole/model.safetensors").read_bytes()
    for number in range(runs):
        assert losses(tmp_path / str(number)) == losses(tmp_path / "whole")
        assert (tmp_path / str(number) / "model.safetensors").read_bytes() == expected


def test_sigterm_saves_and_the_same_command_finishes(stage, monkeypatch, glm_run, glm_base, train_file, tmp_path):
    import signal

    import torch

    sft, (recipe, folder) = stage("03_sft"), glm_run
    before = signal.getsignal(signal.SIGTERM)

    def taken_away(self, args, state, control, **kwargs):
        if state.global_step == 0:
            signal.raise_signal(signal.SIGTERM)  # in the middle of the first update
        self.step_started = self.said = self.micro_batches = 0

    with monkeypatch.context() as patch:
        patch.setattr(sft.Watch, "on_step_begin", taken_away)
        with pytest.raises(SystemExit) as exit_:
            train(sft, glm_base, train_file, tmp_path / "out", "--save_steps", 0)
    assert exit_.value.code == 143
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-1"]
    assert not (tmp_path / "out/recipe.json").exists()
    assert train(sft, glm_base, train_file, tmp_path / "out")["loss"] == recipe["loss"]
    ours, theirs = weights(tmp_path / "out"), weights(folder)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    signal.signal(signal.SIGTERM, before)


def test_a_checkpoint_of_another_run_is_refused(stage, glm_run, glm_base, train_file):
    sft = stage("03_sft")
    with pytest.raises(sft.InputError, match="learning_rate was 0.001"):
        train(sft, glm_base, train_file, glm_run[1], "--learning_rate", 1e-4)


def test_a_named_checkpoint_of_another_run_is_refused(stage, glm_run, glm_base, train_file, tmp_path):
    sft = stage("03_sft")
    flags = ["--learning_rate", 1e-4, "--resume_from_checkpoint", glm_run[1] / "checkpoint-2"]
    with pytest.raises(sft.InputError, match=f"{glm_run[1]} is of another run .learning_rate was 0.001"):
        train(sft, glm_base, train_file, tmp_path / "out", *flags)


def test_a_model_that_no_run_wrote_is_not_overwritten(stage, glm_base, train_file, tmp_path):
    """Such as the base itself."""
    import shutil

    sft = stage("03_sft")
    shutil.copytree(glm_base, tmp_path / "base")
    before = {path.name: path.read_bytes() for path in (tmp_path / "base").iterdir()}
    with pytest.raises(sft.InputError, match="base is of another run .it has no run.json"):
        train(sft, tmp_path / "base", train_file, tmp_path / "base", "--max_steps", 2)
    assert {path.name: path.read_bytes() for path in (tmp_path / "base").iterdir()} == before


def test_a_run_goes_on_with_the_tokens_it_began_with(stage, monkeypatch, glm_run, glm_base, train_file, tmp_path):
    """A template may write the date, and another day another one."""
    import shutil

    sft, (recipe, folder) = stage("03_sft"), glm_run
    shutil.copytree(folder, tmp_path / "out", ignore=lambda *_: ["checkpoint-3", "recipe.json"])
    tokenize = sft.tokenize

    def another_day(*arguments, **options):
        samples, *others = tokenize(*arguments, **options)
        return [sample | {"input_ids": [0, *sample["input_ids"][1:]]} for sample in samples], *others

    monkeypatch.setattr(sft, "tokenize", another_day)
    assert train(sft, glm_base, train_file, tmp_path / "out")["loss"] == recipe["loss"]
    assert (tmp_path / "out/tokenized.jsonl").read_bytes() == (folder / "tokenized.jsonl").read_bytes()


def test_a_finished_run_is_not_overwritten_by_another(stage, glm_base, train_file, tmp_path):
    """Without checkpoints too, and not by a dry run; the page in its folder shows what it was trained on."""
    sft = stage("03_sft")
    train(sft, glm_base, train_file, tmp_path, "--no_stop_token", "--max_steps", 1, "--save_steps", 0, *NO_WARM_UP)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    assert before.keys() >= {"model.safetensors", "recipe.json", "tokenized.jsonl"}
    for flags in (["--max_steps", 1], ["--no_stop_token", "--max_steps", 2], ["--dry_run", "--max_steps", 1]):
        flags += NO_WARM_UP
        with pytest.raises(sft.InputError, match=f"{tmp_path} is of another run .*choose another --output_dir"):
            train(sft, glm_base, train_file, tmp_path, *flags)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before


def test_a_loss_that_is_no_number_ends_the_run(stage, glm_base, train_file, tmp_path):
    sft = stage("03_sft")
    with pytest.raises(sft.InputError, match="grad_norm nan"):
        flags = ["--learning_rate", 1e30, "--warmup_steps", 0, "--save_steps", 1]
        train(sft, glm_base, train_file, tmp_path / "out", *flags)
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-1"]
    assert not (tmp_path / "out/model.safetensors").exists()


# --------------------------------------------------------------------------------------------------------------------
# What is written


@pytest.mark.parametrize("base, run", [("glm_base", "glm_run"), ("qwen_base", "qwen_run")])
def test_export_is_bf16_with_the_names_of_the_base(request, base, run):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base, (_, folder) = request.getfixturevalue(base), request.getfixturevalue(run)
    before, after = weights(base), weights(folder)
    assert after.keys() == before.keys()
    for name, tensor in after.items():
        bias = name.endswith("e_score_correction_bias")
        assert tensor.dtype == (torch.float32 if bias else torch.bfloat16), name
        assert not bias or torch.equal(tensor, before[name])  # training leaves it alone
    assert any(not torch.equal(after[name], before[name]) for name in after)
    config = json.loads((folder / "config.json").read_text())
    assert config["dtype"] == "bfloat16" and config["use_cache"] is True
    assert config["eos_token_id"] == json.loads((base / "config.json").read_text())["eos_token_id"]
    assert (folder / "generation_config.json").exists()
    described = json.loads((folder / "tokenizer_config.json").read_text())["response_template"]
    assert set(described["fields"]) == {"thinking", "tool_calls", "content"}  # for vLLM's parsers "hf"
    assert AutoTokenizer.from_pretrained(folder).chat_template == AutoTokenizer.from_pretrained(base).chat_template
    exported = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    trained = AutoModelForCausalLM.from_pretrained(folder / "checkpoint-3", dtype=torch.float32).state_dict()
    for name, tensor in trained.items():
        wanted = tensor if name.endswith("e_score_correction_bias") else tensor.to(torch.bfloat16).float()
        assert torch.equal(exported[name], wanted), name


def test_recipe_json_tells_the_whole_run(glm_run, train_file):
    import hashlib

    recipe, _ = glm_run
    assert recipe["settings"]["global_batch_size"] == 4 and recipe["settings"]["adam_beta2"] == 0.98
    assert recipe["settings"]["max_length"] == 125_000 and recipe["settings"]["num_train_epochs"] == 8
    assert {"torch", "transformers", "trl", "accelerate", "datasets"} == recipe["versions"].keys()
    assert recipe["train_file_sha256"] == hashlib.sha256(train_file.read_bytes()).hexdigest()
    assert recipe["data"]["rows"] == recipe["data"]["samples"] == 5 and recipe["data"]["left_out"] == {}
    assert recipe["attention"] == ["FLASH_ATTENTION"] and recipe["data"]["reasoning"] is True
    assert [row["epoch"] for row in recipe["log"]] == [4 / 5, 8 / 5, 12 / 5]  # passes over five samples
    rates = [row["learning_rate"] for row in recipe["log"]]
    assert rates[:2] == [5e-4, 1e-3] and 1e-6 < rates[2] < 1e-3  # no update at 0
    assert recipe["steps"] == len(recipe["loss"]) == 3
    assert {"commit", "processes", "seconds", "python"} <= recipe.keys()
    assert [(row["step"], row["tokens_per_second"] > 0) for row in recipe["log"]] == [(1, True), (2, True), (3, True)]


def test_recipe_defaults_are_the_released_values(stage):
    _, args = stage("03_sft").make_parser().parse_args_and_config(args=[])
    assert (args.learning_rate, args.adam_beta2, args.weight_decay, args.max_length) == (1e-5, 0.98, 0.1, 125_000)
    assert args.lr_scheduler_kwargs == {"min_lr": 1e-6} and args.warmup_steps == 2 and args.num_train_epochs == 8


def test_lora_trains_attention_and_saves_a_merged_model(lora_run, glm_base):
    import torch

    before, after = weights(glm_base), weights(lora_run[1])
    assert after.keys() == before.keys()
    changed = {name.split(".")[-2] for name in after if not torch.equal(after[name], before[name])}
    assert changed == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert not (lora_run[1] / "adapter_config.json").exists()


def test_full_disk_leaves_the_old_checkpoint(stage, glm_base, train_file, tmp_path):
    """The weights fit, the optimizer's state does not: the run that goes on later starts at the checkpoint before."""
    sft = stage("03_sft")
    with pytest.raises(OSError, match="checkpoint-1: no space for it"):
        with full_disk_after(200_000):
            train(sft, glm_base, train_file, tmp_path / "out", "--save_steps", 1)
    assert not list((tmp_path / "out").glob("checkpoint-*"))
    assert train(sft, glm_base, train_file, tmp_path / "out")["steps"] == 3


def test_dry_run_writes_what_will_be_trained(stage, glm_base, train_file, work):
    sft, folder = stage("03_sft"), work / "dry"
    flags = ["--model_name_or_path", glm_base, "--train_file", train_file, "--output_dir", folder, "--dry_run"]
    flags += ["--global_batch_size", 2, "--num_train_epochs", 1, "--per_device_train_batch_size", 2]
    sft.main(*sft.read_settings(sft.make_parser(), [str(flag) for flag in flags]))
    written = {"tokenized.jsonl", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    assert {file.name for file in folder.iterdir()} == written  # recipes/view.py needs no more
    samples = [json.loads(line) for line in (folder / "tokenized.jsonl").read_text().splitlines()]
    assert samples[2] == dict(zip(("query_id", "input_ids", "labels"), ("q2", *by_hand(GLM_PLAIN, GLM))))


@contextlib.contextmanager
def full_disk_after(size):
    """No file may grow beyond `size` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_full_disk_leaves_the_old_export(stage, glm_base, glm_run, tmp_path):
    import shutil

    from transformers import AutoModelForCausalLM

    sft = stage("03_sft")
    shutil.copytree(glm_run[1], tmp_path / "out", ignore=shutil.ignore_patterns("checkpoint-*"))
    before = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    model, tok = AutoModelForCausalLM.from_pretrained(glm_base), sft.load_tokenizer(str(glm_base))
    with pytest.raises(sft.SafetensorError, match="File too large"), full_disk_after(20_000):
        sft.export(model, tok, tmp_path / "out")
    assert {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()} == before


# --------------------------------------------------------------------------------------------------------------------
# What is refused: one line, exit code 2 (through the command line for one of each kind; each start costs seconds)

GOOD = {"query_id": "q", "messages": [user("U"), assistant("D")]}


CALL = assistant("", ("f", {}))
CALLED = CALL["tool_calls"][0]
BOTH = assistant("", ("f", {}), ("g", {}))


@pytest.mark.parametrize(
    "keys, told",
    [
        ({"system": "S"}, "system: not read by 03; a row has messages and tools"),
        ({"functions": TOOLS}, "functions: not read by 03"),  # beside the tools: which of them?
        ({"loss_mask": [0, 1]}, "loss_mask: not read by 03"),
        ({"tools": TOOLS[:1] * 2}, "tools: two of them are named f"),
        ({"tools": [TOOLS[0]["function"]]}, 'tools[0]: must be {"type": "function", "function": {"name": ...}}'),
        ({"tools": [schema("\ud83d")]}, "tools: half a character in it"),
    ],
)
def test_what_else_a_row_says_is_read_or_refused(stage, tmp_path, keys, told):
    path = write_rows(tmp_path / "train.jsonl", [GOOD | {"meta": {"a": 1}, "source": "s"}, GOOD | keys])
    rows, refused = stage("03_sft").read_rows(path)
    assert len(rows) == 1 and len(refused) == 1
    assert refused[0].startswith(f"{path}:2: {told}")


@pytest.mark.parametrize(
    "messages, told",
    [
        ([user("U"), assistant("", ("f", {"a": None}))], "messages[1].tool_calls[0].function.arguments"),
        ([user("U"), assistant("", ("f", '{"a": 1}'))], "messages[1].tool_calls[0].function.arguments"),
        ([user("U"), assistant("", ("f", {"a": float("inf")})), tool("T"), assistant("D")], "messages[1]: NaN or Infinity"),
        ([{"role": "human", "content": "U"}, assistant("D")], "messages[0].role: 'human', not one of"),
        ([{"role": "user", "content": None}, assistant("D")], "messages[0].content"),
        ([user("U"), assistant("", ("f", {}))], "messages[1]: the row ends with a tool call without its result"),
        ([user("U")], "no assistant message"),
        ("hello", "messages: must be a list"),
        ([], "no assistant message"),
        ([user("U"), tool("T"), assistant("D")], "messages[1]: a result without its call before it"),
        ([user("U"), assistant("", ("f", {})), tool("T"), tool("T"), assistant("D")], "messages[3]: a result without"),
        ([user("U"), BOTH, tool("T", 1), tool("T", 0), assistant("D")], "messages[2].tool_call_id: 'call_1' in the place of"),
        ([user("U"), BOTH, tool("T", 0), tool("T", 0), assistant("D")], "messages[3].tool_call_id: 'call_0' in the place of"),
        ([user("U"), BOTH, tool("T", 1), assistant("D")], "messages[2].tool_call_id: 'call_1' in the place of the result of"),
        ([user("U"), BOTH, tool("T", 7), assistant("D")], "puts results in the order of their calls"),
        ([user("U"), BOTH, user("V"), tool("T", 0), assistant("D")], "messages[3]: a result without its call before it"),
        ([assistant("Hello."), user("U"), assistant("D")], "messages[0]: an answer to nothing; begin with a user message"),
        ([user("U"), assistant("D") | {"tool_calls": 5}], "messages[1].tool_calls: must be a list of objects"),
        ([user("U"), assistant("D") | {"tool_calls": {"name": "f"}}], "messages[1].tool_calls: must be a list of objects"),
        ([user("U") | {"reasoning_content": "R"}, assistant("D")], "messages[0].reasoning_content: not read by 03"),
        ([user("U") | {"name": "Ann"}, assistant("D")], "messages[0].name: not read by 03; take it out"),
        ([user("U"), assistant("", ("f", {})), tool("T", [1]) | {"tool_call_id": 1}, assistant("D")], "[2].tool_call_id: must"),
        ([user("U"), CALL | {"tool_calls": [CALLED | {"id": 5}]}, tool("T"), assistant("D")], "the call's id"),
        ([user("U"), CALL | {"tool_calls": [CALLED | {"weight": 1}]}, tool("T"), assistant("D")], "[0].weight: not read"),
    ],
)
def test_bad_rows_are_named(stage, tmp_path, messages, told):
    sft = stage("03_sft")
    path = write_rows(tmp_path / "train.jsonl", [GOOD, {"messages": messages, "tools": TOOLS}])
    rows, refused = sft.read_rows(path)
    assert len(rows) == 1 and len(refused) == 1
    assert refused[0].startswith(f"{path}:2: ") and told in refused[0]


def test_bad_settings_are_named(stage, glm_base, train_file, tmp_path):
    sft = stage("03_sft")

    def error_of(*flags):
        common = ["--model_name_or_path", glm_base, "--train_file", train_file, "--output_dir", tmp_path / "out"]
        with pytest.raises(sft.InputError) as error:
            sft.main(*sft.read_settings(sft.make_parser(), [str(flag) for flag in [*common, *flags]]))
        return str(error.value)

    assert "do not fill one batch of 64" in error_of("--num_train_epochs", 1)
    assert "every sample was left out" in error_of("--max_length", 5)
    assert "no multiple of 3" in error_of("--per_device_train_batch_size", 3)
    assert "no rows" in error_of("--train_file", write_rows(tmp_path / "empty.jsonl", []))
    assert "02_format_trajectories.py" in error_of("--train_file", tmp_path / "absent.jsonl")
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare/config.json").write_text((glm_base / "config.json").read_text())
    assert "tokenizer" in error_of("--model_name_or_path", tmp_path / "bare")
    assert not (tmp_path / "out").exists()


def test_a_cut_line_is_told(stage, tmp_path):
    sft, path = stage("03_sft"), write_rows(tmp_path / "train.jsonl", [GOOD])
    path.write_text(path.read_text() + '{"messages": [{"role": "us')
    with pytest.raises(sft.InputError, match=f"{path}:2: not valid JSON"):
        sft.read_rows(path)


def test_a_mistake_is_told_once_by_two_processes(two_processes, work):
    told = two_processes.stderr
    assert told.count(f"03_sft.py: {work}/mistake.jsonl:2: ") == 1 and "exitcode  : 2" in told
    assert '/03_sft.py", line' not in told  # no traceback of ours
    assert not (work / "none").exists()


def test_a_misspelt_flag_is_refused(stage, monkeypatch):
    sft = stage("03_sft")
    monkeypatch.setattr(sys, "argv", ["03_sft.py", "--learnin_rate", "1e-5"])
    with pytest.raises(sft.InputError, match="no such setting: --learnin_rate; nearest: --learning_rate"):
        sft.read_settings(sft.make_parser())


def test_full_disk_writes_no_half_file(stage, glm_base, train_file, tmp_path):
    sft = stage("03_sft")
    flags = ["--model_name_or_path", glm_base, "--train_file", train_file, "--output_dir", tmp_path / "o", "--dry_run"]
    flags += ["--global_batch_size", 4]
    with pytest.raises(OSError, match="File too large"), full_disk_after(2_000):
        sft.main(*sft.read_settings(sft.make_parser(), [str(flag) for flag in flags]))
    assert not list((tmp_path / "o").glob("*"))


# --------------------------------------------------------------------------------------------------------------------
# Settings that follow from the model, the data and the layout


@pytest.mark.parametrize("precision, flags", [("fp16", []), ("bf16", ["--bf16", "false"])])
def test_a_precision_of_the_launcher_that_03_does_not_train_in_is_refused(stage, monkeypatch, precision, flags):
    sft = stage("03_sft")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", precision)
    with pytest.raises(sft.InputError, match=f"accelerate's mixed_precision {precision}: no or bf16, as --bf16 says"):
        sft.check_flags(*sft.read_settings(sft.make_parser(), flags))


def test_layout_comes_from_the_launcher_and_must_fit(stage, monkeypatch):
    sft = stage("03_sft")
    _, args = sft.make_parser().parse_args_and_config(args=[])

    def read(layout):
        return layout.fsdp, layout.cp

    assert read(sft.read_layout(args)) == (False, 1)
    monkeypatch.setenv("ACCELERATE_USE_PARALLELISM_CONFIG", "true")
    monkeypatch.setenv("PARALLELISM_CONFIG_CP_SIZE", "8")
    with pytest.raises(sft.InputError, match="dp_replicate 1 x dp_shard 1 x cp 8 is not the number of processes, 1"):
        read(sft.read_layout(args))
    monkeypatch.setattr(type(args), "world_size", 8)
    with pytest.raises(sft.InputError, match="distributed_type: FSDP"):
        read(sft.read_layout(args))
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert read(sft.read_layout(args)) == (True, 8)


def test_qwen3_is_stretched_to_the_data_and_exported_so(stage, qwen_base, tmp_path, capsys):
    import torch
    from transformers import AutoModelForCausalLM

    sft = stage("03_sft")
    config = sft.load_config(qwen_base, 40_960)
    assert config.rope_parameters["rope_type"] == "default" and not capsys.readouterr().out
    config = sft.load_config(qwen_base, 125_000)
    told = "YaRN factor 4 for a sample of 125,000 tokens: window 40,960 -> 131,072\n"
    assert capsys.readouterr().out == told
    model = AutoModelForCausalLM.from_pretrained(qwen_base, config=config, dtype=torch.float32)
    sft.export(model, sft.load_tokenizer(str(qwen_base)), tmp_path, sft.base_names(qwen_base))
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["max_position_embeddings"] == 131_072
    rope = saved["rope_parameters"]
    assert (rope["rope_type"], rope["factor"], rope["original_max_position_embeddings"]) == ("yarn", 4.0, 32_768)
    plain = AutoModelForCausalLM.from_pretrained(qwen_base, dtype=torch.float32).model.rotary_emb.inv_freq
    stretched = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).model.rotary_emb.inv_freq
    assert stretched[-1] == pytest.approx(plain[-1] / 4) and stretched[0] == pytest.approx(plain[0])


def test_a_sample_beyond_the_window_is_refused_elsewhere(stage, glm_base):
    sft = stage("03_sft")
    with pytest.raises(sft.InputError, match="16,385 tokens, but the model's window is 16,384; lower --max_length"):
        sft.load_config(glm_base, 16_385)


def test_an_export_without_the_names_of_the_base_is_refused(stage, glm_base, glm_run, tmp_path):
    from transformers import AutoModelForCausalLM

    sft = stage("03_sft")
    model, tok = AutoModelForCausalLM.from_pretrained(glm_base), sft.load_tokenizer(str(glm_base))
    names = sft.base_names(glm_base)
    assert len(names) == 39
    sft.export(model, tok, tmp_path / "mtp", names | {"model.layers.46.eh_proj.weight"})  # never loaded: the MTP layer
    for others in (names | {"model.layers.2.mlp.gate.weight"}, names - {"lm_head.weight"}):
        with pytest.raises(sft.InputError, match="1 differ, such as (model.layers.2.mlp.gate|lm_head).weight"):
            sft.export(model, tok, tmp_path / "out", others)
        assert not (tmp_path / "out/config.json").exists()


def test_lora_on_experts_is_exported_as_it_is_trained(stage, glm_base, tmp_path, capsys):
    """Weights and adapters whose sums bf16 holds exactly, so that the export's logits must be the adapted model's."""
    import torch
    from peft import get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    sft = stage("03_sft")
    settings = sft.Settings(lora=True, lora_r=1, lora_experts=True)
    config = sft.lora_config(settings, AutoConfig.from_pretrained(glm_base))
    told = ["2 x q_proj", "2 x k_proj", "2 x v_proj", "2 x o_proj", "1 x mlp.experts.gate_up_proj"]
    assert capsys.readouterr().out.splitlines() == [f"LoRA on {x}" for x in [*told, "1 x mlp.experts.down_proj"]]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(glm_base, dtype=torch.float32)
    adapted = get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if ".lora_" in name:  # times the scale of 2: sums of whole 64ths
                unit = 1 if ".lora_A." in name else 1 / 128
                parameter.copy_(unit * torch.randint(-1, 2, parameter.shape))
            elif ".base_layer." in name and parameter.ndim > 1:
                parameter.copy_(torch.randint(-8, 9, parameter.shape) / 64)
    ids = torch.randint(0, 256, (1, 50))
    with torch.no_grad():
        before, expected = model(ids).logits, adapted(ids).logits
        with adapted.disable_adapter():
            assert (adapted(ids).logits - expected).abs().max() > 0.01
    sft.export(adapted.get_base_model(), sft.load_tokenizer(str(glm_base)), tmp_path, sft.base_names(glm_base))
    assert weights(tmp_path).keys() == weights(glm_base).keys()
    exported = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert torch.equal(before, expected)  # peft adapts the model in place
    assert (exported(ids).logits - expected).abs().max() < 1e-5


def test_lora_trains_experts_and_attention_alone(experts_run, glm_base):
    import torch

    before, after = weights(glm_base), weights(experts_run[1])
    assert after.keys() == before.keys()
    changed = {name.split(".")[-4 if ".experts." in name else -3] for name in after
               if not torch.equal(after[name], before[name])}  # fmt: skip
    assert changed == {"self_attn", "experts"}


def test_lora_says_what_it_adapts(stage, glm_base, qwen_base, train_file, tmp_path, capsys):
    import torch

    sft, flags = stage("03_sft"), ["--lora", "--max_steps", 2, "--lora_target_modules"]
    train(sft, qwen_base, train_file, tmp_path / "out", *flags, "o_proj", "up_proj")
    assert "LoRA on 2 x o_proj\nLoRA on 2 x up_proj\n" in capsys.readouterr().out
    before, after = weights(qwen_base), weights(tmp_path / "out")
    changed = {name.split(".")[-2] for name in after if not torch.equal(after[name], before[name])}
    assert changed == {"o_proj", "up_proj"}
    with pytest.raises(sft.InputError, match="of 0 query in the model peft adapts 0"):
        train(sft, qwen_base, train_file, tmp_path / "none", *flags, "q_proj", "query")
    with pytest.raises(sft.InputError, match="Target modules {'query'} not found"):
        train(sft, qwen_base, train_file, tmp_path / "none", *flags, "query")
    with pytest.raises(sft.InputError, match="of 0 mlp.experts.gate_up_proj in the model"):  # no mixture of experts
        train(sft, qwen_base, train_file, tmp_path / "none", *flags, "q_proj", "--lora_experts")
    with pytest.raises(sft.InputError, match="of 3 down_proj in the model peft adapts 1; .*--lora_experts"):
        train(sft, glm_base, train_file, tmp_path / "moe", *flags, "q_proj", "down_proj")


@pytest.mark.parametrize("name", sorted(path.parent.name for path in (ROOT / "recipes").glob("*/accelerate.yaml")))
def test_recipes_parse(stage, name):
    """Both YAML files; the processes match the layout and divide the global batch."""
    from accelerate.commands.config.config_args import load_config_from_file

    folder = ROOT / "recipes" / name
    config = load_config_from_file(str(folder / "accelerate.yaml"))
    sizes = config.parallelism_config or {}
    cp = sizes.get("parallelism_config_cp_size", 1)
    if sizes:
        assert sizes["parallelism_config_dp_shard_size"] * cp == config.num_processes
    settings, args = stage("03_sft").make_parser().parse_args_and_config(args=["--config", str(folder / "sft.yaml")])
    assert settings.global_batch_size % (config.num_processes // cp) == 0
    assert args.output_dir == f"outputs/{name}"
    assert config.fsdp_config["fsdp_version"] == 2 and not config.fsdp_config["fsdp_cpu_ram_efficient_loading"]


# --------------------------------------------------------------------------------------------------------------------
# The row is what is trained


def refusals(sft, base, path):
    rows, refused = sft.read_rows(path)
    samples, _, more = sft.tokenize(sft.load_tokenizer(str(base)), rows, 10_000)
    return samples, refused + more


CASES = ROOT.parent / "shared/cases/sft"
TOLD = {
    "foreign_loss_false": 'messages[2].loss: not read by 03; write "weight": 0',
    "foreign_no_tools": "tools: missing, but messages call tools",
    "foreign_reasoning_key": "messages[2].reasoning: not read by 03; call it reasoning_content",
    "foreign_template_kwargs": "chat_template_kwargs: not read by 03",
    "foreign_tools_string": "tools: must be a list of objects",
    "rows_surrogate": "messages[2]: half a character in it",
}


@pytest.mark.skipif(not CASES.exists(), reason="needs ../shared/cases")
@pytest.mark.parametrize("name", ["foreign_weight0", "rows_parallel", "rows_single", *TOLD])
def test_rows_made_for_other_trainers(stage, glm_base, name):
    sft, path = stage("03_sft"), CASES / f"{name}.jsonl"
    samples, refused = refusals(sft, glm_base, path)
    if name in TOLD:
        assert not samples and refused[0].startswith(f"{path}:1: {TOLD[name]}")
        return
    assert not refused
    text = trained_text(sft.load_tokenizer(str(glm_base)), samples)
    if name == "foreign_weight0":
        assert "WRONGTURN" not in text and text.endswith("\nDone.<|user|>")
    else:
        assert "I look." in text and text.count("<tool_call>f\n") == (2 if name == "rows_parallel" else 1)


def trained_text(tok, samples):
    return tok.decode([label for sample in samples for label in sample["labels"] if label != -100])


def test_a_message_of_weight_0_is_context_without_loss(stage, glm_base):
    sft = stage("03_sft")
    tok = sft.load_tokenizer(str(glm_base))
    talk = [user("U"), assistant("", ("f", {"p": "bad"})) | {"weight": 0}, tool("no"), assistant("D")]
    by_weight = (
        "[gMASK]<sop><|user|>\nU<|assistant|>\n<think></think>\n<tool_call>f\n<arg_key>p</arg_key>\n"
        "<arg_value>bad</arg_value>\n</tool_call><|observation|>\n<tool_response>\nno\n</tool_response>"
        "<|assistant|>[[\n<think></think>\nD<|user|>]]"
    )
    assert sft.encode(tok, talk, None) == by_hand(by_weight, GLM)


@pytest.mark.parametrize("weight, role", [(0.5, "assistant"), (-1, "assistant"), ("0", "assistant"), (0, "user")])
def test_other_weights_are_refused(stage, tmp_path, weight, role):
    talk = [user("U"), assistant("D"), user("V"), assistant("E")]
    talk = [message | {"weight": weight} if message["role"] == role else message for message in talk]
    _, refused = stage("03_sft").read_rows(write_rows(tmp_path / "t.jsonl", [{"messages": talk}]))
    assert f"[{1 if role == 'assistant' else 0}].weight: must be 0 or 1, on an assistant message" in refused[0]


def test_a_template_that_drops_the_thought_says_what_to_do(stage, qwen_base, train_file):
    sft = stage("03_sft")
    tok = sft.load_tokenizer(str(qwen_base))
    tok.chat_template = files("trl").joinpath("chat_templates/qwen2_5.jinja").read_text()
    rows, _ = sft.read_rows(train_file)
    samples, _, refused = sft.tokenize(tok, rows, 10_000)
    assert len(samples) == 2  # those without a thought
    told = "messages[2].reasoning_content: chat template or tokenizer leave it out; --no_reasoning trains without it"
    assert refused[0] == f"{train_file}:1: {told}" and len(refused) == 3
    samples, _, refused = sft.tokenize(tok, rows, 10_000, no_reasoning=True)
    assert len(samples) == 5 and not refused


def test_refused_rows_stop_the_run_before_a_model_is_loaded(stage, monkeypatch, glm_base, train_file, tmp_path, capsys):
    sft = stage("03_sft")
    lines = train_file.read_text() + json.dumps({"messages": [user("U")]}) + "\n"
    (tmp_path / "t.jsonl").write_text(lines)
    monkeypatch.setattr(sft, "load_model", None)
    with pytest.raises(sft.InputError, match=r"t.jsonl:6: messages: no assistant message .*1 of 6 rows refused, --max"):
        train(sft, glm_base, tmp_path / "t.jsonl", tmp_path / "out")
    flags = ["--model_name_or_path", glm_base, "--train_file", tmp_path / "t.jsonl", "--output_dir", tmp_path / "out"]
    flags += [*FLAGS, "--max_refused", 1, "--dry_run"]
    sft.main(*sft.read_settings(sft.make_parser(), [str(flag) for flag in flags]))
    told = capsys.readouterr().out
    assert f"refused {tmp_path}/t.jsonl:6: messages: no assistant message in it to train\n" in told
    assert "rows: 6, refused: {'messages: no assistant message in it to train': 1}, samples: 5" in told


def test_switches_of_the_template_are_trained_and_exported(stage, qwen_base, tmp_path):
    """With enable_thinking false Qwen3's prompt holds the empty thought; the exported tokenizer writes it by itself."""
    from transformers import AutoTokenizer

    sft = stage("03_sft")
    path = write_rows(tmp_path / "t.jsonl", [{"messages": BARE}] * 4)
    recipe = train(sft, qwen_base, path, tmp_path / "out", "--chat_template_kwargs", '{"enable_thinking": false}')
    assert recipe["chat_template_kwargs"] == {"enable_thinking": False} and recipe["data"]["reasoning"] is False
    first = json.loads((tmp_path / "out/tokenized.jsonl").read_text().splitlines()[0])
    head = "<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    assert (first["input_ids"], first["labels"]) == by_hand(head + "[[D<|im_end|>]]\n", QWEN)
    exported = AutoTokenizer.from_pretrained(tmp_path / "out")
    prompt = exported.apply_chat_template(BARE[:1], add_generation_prompt=True, tokenize=False)
    assert prompt == head
    thinking = dict(add_generation_prompt=True, tokenize=False, enable_thinking=True)
    assert exported.apply_chat_template(BARE[:1], **thinking) == head.removesuffix("<think>\n\n</think>\n\n")


def test_a_switch_of_any_value_is_exported_as_it_was_trained(stage, glm_base, tmp_path):
    from transformers import AutoTokenizer

    sft = stage("03_sft")
    tok = sft.load_tokenizer(str(glm_base))
    tok.chat_template = "{{ [a, b, c, d] }}"
    tok.template_kwargs = {"a": "not null: ü🙂 'x' \"y\" %}", "b": None, "c": [1e-7, True], "d": {"e": "\n"}}
    expected = sft.render(tok, [user("U")], None)
    sft.save_tokenizer(tok, tmp_path)
    exported = AutoTokenizer.from_pretrained(tmp_path)
    assert exported.apply_chat_template([user("U")], tokenize=False) == expected == str([*tok.template_kwargs.values()])


# --------------------------------------------------------------------------------------------------------------------
# A run is what it says


def sum_by_hand(base, samples, weights):
    """Weighted mean of the cross-entropy of the base's first batch."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    total = count = 0.0
    for sample, weight in zip(samples, weights):
        with torch.no_grad():
            logits = model(torch.tensor([sample["input_ids"]])).logits[0, :-1]
        labels = torch.tensor(sample["labels"][1:])
        losses = torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="none")
        total += (losses * torch.tensor(weight[1:])).sum().item()
        count += sum(w for w, label in zip(weight[1:], sample["labels"][1:]) if label != -100)
    return total / count


def per_sample_mean(sample):
    trained = len(sample["labels"]) - sample["labels"].count(-100)
    return [(label != -100) / trained for label in sample["labels"]]


def last_turn_only(sample):
    labels = sample["labels"]
    start = max(i for i in range(1, len(labels)) if labels[i] != -100 and labels[i - 1] == -100)
    return [float(i >= start and label != -100) for i, label in enumerate(labels)]


def heavy_stops(sample):
    return [0.0 if label == -100 else 5.0 if label in (263, 265) else 1.0 for label in sample["labels"]]


@pytest.mark.parametrize(
    "fork, batch", [(per_sample_mean, 1), (per_sample_mean, 2), (last_turn_only, 1), (heavy_stops, 1)]
)
def test_a_fork_of_the_loss_in_one_function(stage, monkeypatch, glm_base, train_file, tmp_path, fork, batch):
    sft = stage("03_sft")
    monkeypatch.setattr(sft, "token_weights", fork)
    flags = ["--max_steps", 1, "--warmup_steps", 0, "--save_steps", 0, "--per_device_train_batch_size", batch]
    recipe = train(sft, glm_base, train_file, tmp_path / "out", *flags)
    samples = [json.loads(line) for line in (tmp_path / "out/tokenized.jsonl").read_text().splitlines()]
    first = [samples[i] for i in sft.global_batches([len(s["labels"]) for s in samples], 4, 4, seed=42)]
    assert recipe["loss"] == [pytest.approx(sum_by_hand(glm_base, first, map(fork, first)), abs=2e-6)]


def test_dft_weighs_by_the_probability(stage):
    import torch

    log_probs = torch.tensor([[-0.5, -2.0, 0.0]])
    weights = torch.tensor([[1.0, 2.0, 0.0]])
    sft = stage("03_sft")
    assert sft.token_loss(log_probs, weights, 3).item() == pytest.approx((0.5 + 4.0) / 3)
    dft = (0.5 * 2.718281828**-0.5 + 4.0 * 2.718281828**-2) / 3
    assert sft.token_loss(log_probs, weights, 3, "dft").item() == pytest.approx(dft)


# What each setting of TRL and transformers does here; one that is in no set is new and must be looked at
WORKS = """output_dir per_device_train_batch_size num_train_epochs max_steps learning_rate lr_scheduler_type
lr_scheduler_kwargs warmup_steps optim optim_args optim_target_modules weight_decay adam_beta1 adam_beta2 adam_epsilon
max_grad_norm bf16 tf32 gradient_checkpointing gradient_checkpointing_kwargs torch_compile torch_compile_backend
torch_compile_mode neftune_noise_alpha torch_empty_cache_steps logging_steps logging_first_step log_on_each_node
logging_nan_inf_filter include_num_input_tokens_seen log_level log_level_replica disable_tqdm report_to run_name project
trackio_space_id trackio_bucket_id trackio_static_space_id eval_steps save_steps save_total_limit seed full_determinism
use_cpu dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor
dataloader_multiprocessing_context dataloader_in_order ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers
ddp_static_graph ddp_backend ddp_timeout debug skip_memory_metrics resume_from_checkpoint router_aux_loss_coef max_length
activation_offloading loss_type local_rank""".split()
OWN = """model_name_or_path train_file global_batch_size dry_run max_refused chat_template_kwargs lora lora_r lora_experts
lora_target_modules bf16_master eval_command zero_first_update no_stop_token no_reasoning null_arguments""".split()
OTHER = {"save_strategy": "epoch", "logging_strategy": "no", "eval_strategy": "steps", "fsdp": "full_shard",
         "train_sampling_strategy": "group_by_length", "hub_strategy": "end", "deepspeed": {"zero_optimization": {}},
         "truncation_mode": "keep_end", "packing_strategy": "wrapped"}  # fmt: skip


def test_every_setting_works_or_is_refused(stage):
    import copy
    import dataclasses

    sft = stage("03_sft")
    refused = " ".join(sft.REFUSED.values()).split()
    own = [item.name for item in dataclasses.fields(sft.Settings)]
    names = {action.dest for action in sft.make_parser()._actions} - {"help"}
    assert sorted(WORKS + OWN + refused) == sorted(names)
    assert sorted(OWN) == sorted(own)
    assert {*WORKS, *OWN} - {*sft.HARMLESS} == {*CHANGES}  # each of them is tried on a run that goes on
    settings, args = sft.read_settings(sft.make_parser(), [])
    sft.check_flags(settings, args)
    for name in refused:
        changed = copy.copy(args)
        value = getattr(args, name)
        other = OTHER.get(name, not value if isinstance(value, bool) else 7 if isinstance(value, int) else "other")
        setattr(changed, name, other)
        with pytest.raises(sft.InputError, match=f"^--{name} has no place here: "):
            sft.check_flags(settings, changed)


@pytest.mark.parametrize(
    "flags, told",
    [
        (["--gradient_accumulation_steps", "8"], "--gradient_accumulation_steps has no place here: 03_sft.py accum"),
        (["--packing", "true"], "--packing has no place here"),
        (["--lora_r", "8"], "--lora_r needs --lora"),
        (["--eval_steps", "2"], "--eval_steps needs --eval_command"),
        (["--bf16_master", "--optim", "sgd"], "leave out --optim"),
        (["--optim_args", "a=b"], "--optim_args does nothing for --optim adamw_torch_fused"),
        (["--optim_target_modules", "all-linear"], "--optim_target_modules does nothing for --optim adamw"),
        (["--adam_beta1", "2"], "--optim: Invalid beta parameter at index 0: 2.0"),
        (["--activation_offloading", "true"], "--activation_offloading needs a GPU"),
        (["--global_batch_size", "0"], "--global_batch_size 0: at least 1"),
        (["--num_train_epochs", "nan"], "--num_train_epochs nan: at least 0, at most 4294967295"),
        (["--num_train_epochs", "inf"], "--num_train_epochs inf: at least 0"),
        (["--weight_decay", "nan"], "--weight_decay nan: at least 0"),
        (["--max_grad_norm", "nan"], "--max_grad_norm nan: at least 0"),
        (["--neftune_noise_alpha", "nan"], "--neftune_noise_alpha nan: at least 0"),
        (["--seed", "4294967296"], "--seed 4294967296: at least 0, at most 4294967295"),
        (["--eval_command", "true", "--eval_steps", "0.5"], "--eval_steps 0.5: at least 1"),
        (["--logging_steps", "-1"], "--logging_steps -1.0: at least 0"),
        (["--learning_rate", "nan"], "--learning_rate nan: must be a number above 0"),
        (["--output_dir", ""], "--output_dir: has no value"),
        (["--train_file", "recipes"], "recipes: no such file; 02_format_trajectories.py writes it"),
        (["--lr_scheduler_kwargs", '{"min_lr": 1}', "--max_steps", "4"], "learning rates from 0.0005 to "),
        (["--dataloader_persistent_workers", "true"], "--dataloader_persistent_workers needs --dataloader_num_workers"),
        (["--gradient_checkpointing_kwargs", '{"a": 1}'], "--gradient_checkpointing_kwargs {'a': 1}: must be a JSON object"),
        (["--gradient_checkpointing_kwargs", "[]"], "--gradient_checkpointing_kwargs []: must be a JSON object with use_reentrant"),
        (["--zero_first_update", "--warmup_steps", "0"], "no warm-up with these settings: --warmup_steps 0, without"),
        (["--lr_scheduler_type", "constant"], "no warm-up with these settings"),
        (["--eval_command", "true", "--eval_steps", "4"], "--eval_steps 4: there are 3 updates"),
        (["--torch_compile_mode", "fastest"], "--torch_compile: Unrecognized mode=fastest, should be one of: default"),
        (["--torch_compile_backend", "x"], "--torch_compile: Invalid backend"),
        (["--router_aux_loss_coef", "0.1"], "--router_aux_loss_coef: a glm4_moe has no such loss; leave it out"),
        (["--chat_template_kwargs", '{"m": 1}'], "--chat_template_kwargs m: no switch of"),
        (["--report_to", "none", "wandb"], "no such setting: --wandb"),
        (["--max_refused", "-1"], "--max_refused -1: at least 0"),
        (["--dry_run", "--lora", "--lora_target_modules", "query"], "Target modules {'query'} not found"),
        (["--dry_run", "--resume_from_checkpoint", "x"], "--resume_from_checkpoint x: not a whole checkpoint"),
        (["--eval_file", "x"], "no such setting: --eval_file; nearest: --train_file"),
        (["--eval_strategy", "steps"], "--eval_strategy has no place here: --eval_command measures while training"),
        (["--max_steps", "0"], "--max_steps 0: at least 1"),
        (["--learning_rate", "0"], "--learning_rate 0.0: must be a number above 0"),
        (["--report_to", "trackio"], "--report_to trackio: pip install trackio"),
        (["--report_to", "wandb"], "WANDB_MODE=offline"),
        (["--optim", "adamw_torch_8bit"], "--optim: You need to have `torchao"),
        (["--lr_scheduler_type", "linear"], "--lr_scheduler_kwargs {'min_lr': 1e-06} of --lr_scheduler_type: "),
        (["--max_steps", "1"], "1 updates end inside the warm-up of 2; lower --global_batch_size or raise"),
        (["--chat_template_kwargs", "no"], "--chat_template_kwargs no: must be a JSON object"),
        (["--chat_template_kwargs", '{"enable_thinkin": false}'], "--chat_template_kwargs enable_thinkin: no switch of"),
        (["--chat_template_kwargs", '{"tools": []}'], "--chat_template_kwargs tools: no switch of"),
        (["--learning_rat", "1"], "no such setting: --learning_rat; nearest: --learning_rate"),
        (["--learning_rate", "fast"], "--learning-rate: invalid float value: 'fast'"),
        (["--resume_from_checkpoint", "nowhere"], "--resume_from_checkpoint nowhere: not a whole checkpoint"),
    ],
)
def test_a_mistake_is_told_before_a_model_is_loaded(stage, monkeypatch, glm_base, train_file, tmp_path, flags, told):
    sft = stage("03_sft")
    monkeypatch.setattr(sft, "load_model", None)
    with pytest.raises(sft.InputError) as error:
        train(sft, glm_base, train_file, tmp_path / "out", *flags)
    assert told in str(error.value)
    assert not (tmp_path / "out/run.json").exists()


def test_a_tokenizer_that_does_not_know_its_offsets_is_refused(stage, monkeypatch, glm_base):
    from transformers import ByT5Tokenizer

    sft = stage("03_sft")
    slow = ByT5Tokenizer(chat_template="{{ messages[0].content }}")
    monkeypatch.setattr(sft.AutoTokenizer, "from_pretrained", lambda _: slow)
    with pytest.raises(sft.InputError, match="the tokenizer is no fast one"):
        sft.load_tokenizer(str(glm_base))


def test_switches_of_several_templates_are_refused(stage, glm_base):
    """Which of them would have been meant, when a row has tools and when it has none?"""
    sft = stage("03_sft")
    tok = sft.load_tokenizer(str(glm_base))
    tok.chat_template = {"default": tok.chat_template, "tool_use": tok.chat_template}
    sft.check_template(tok, "base", {})
    with pytest.raises(sft.InputError, match="--chat_template_kwargs: base has several chat templates"):
        sft.check_template(tok, "base", {"enable_thinking": False})


def test_a_setting_without_a_value_is_named(stage, tmp_path):
    sft = stage("03_sft")
    for name in ("learning_rate", "train_file", "max_length", "global_batch_size"):
        (tmp_path / "x.yaml").write_text(f"{name}:\n")
        with pytest.raises(sft.InputError, match=f"^--{name}: has no value$"):
            sft.check_flags(*sft.read_settings(sft.make_parser(), ["--config", str(tmp_path / "x.yaml")]))


def test_unknown_keys_of_a_yaml_are_named_with_the_nearest(stage, tmp_path):
    sft = stage("03_sft")
    (tmp_path / "x.yaml").write_text("learning_rte: 1.0e-5\n")
    with pytest.raises(sft.InputError, match="no such setting: --learning_rte; nearest: --learning_rate"):
        sft.read_settings(sft.make_parser(), ["--config", str(tmp_path / "x.yaml")])


def test_help_begins_with_what_people_use_first(stage):
    told = stage("03_sft").make_parser().format_help()
    first = told.split("used first:")[1].split("options:")[0]
    names = [line.split()[0] for line in first.splitlines() if line.startswith("  --")]
    assert names == [f"--{name}" for name in stage("03_sft").FIRST]
    assert told.startswith("usage: 03_sft.py [--config x.yaml] [--setting value ...]\n\n")
    assert "--packing" not in told and "--weight_decay" in told  # what would be refused is not offered


@pytest.mark.parametrize("zero", [False, True])
def test_no_update_at_rate_zero(stage, zero):
    """Nine updates, warm-up of two, cosine from 1e-5 to 1e-6: by hand. LIMI's (Megatron's) first one is at 0."""
    import math

    sft = stage("03_sft")
    _, args = sft.read_settings(sft.make_parser(), [])

    def cosine(step, steps):
        return 1e-6 + 9e-6 * (1 + math.cos(math.pi * (step - 2) / (steps - 2))) / 2

    ours = [5e-6, 1e-5, *[cosine(step, 10) for step in range(3, 10)]]
    megatron = [0, 5e-6, 1e-5, *[cosine(step, 9) for step in range(3, 9)]]
    assert sft.learning_rates(args, 9, zero) == pytest.approx(megatron if zero else ours)


# One value that differs from the run's for each setting that changes what is trained
CHANGES = dict(
    learning_rate=2e-3, lr_scheduler_type="constant", lr_scheduler_kwargs='{"min_lr": 0.0}', warmup_steps=1,
    adam_beta1=0.8, adam_beta2=0.9, adam_epsilon=1e-6, weight_decay=0.0, max_grad_norm=2.0, optim="sgd",
    optim_args="a=b", loss_type="dft", neftune_noise_alpha=5, router_aux_loss_coef=0.1, num_train_epochs=9, max_steps=4,
    max_length=1000, seed=1, global_batch_size=2, bf16="true", tf32="false", full_determinism="true",
    torch_compile="true", zero_first_update="true", no_stop_token="true", no_reasoning="true", lora="true", null_arguments="true",
    bf16_master="true", chat_template_kwargs='{"enable_thinking": false}', optim_target_modules="all-linear",
    lora_experts="true", lora_r=8, lora_target_modules="q_proj", torch_compile_backend="eager", torch_compile_mode="default",
)  # fmt: skip
SAME = dict(
    save_steps=1, save_total_limit=1, logging_steps=2, disable_tqdm="true", per_device_train_batch_size=2,
    gradient_checkpointing="true", dataloader_num_workers=1, run_name="x", eval_command="true", max_refused=3,
)  # fmt: skip


@pytest.fixture(scope="session")
def begun(stage, glm_run):
    """(settings of glm_run's command, its folder): what is compared, without training again."""
    return glm_run


@pytest.mark.parametrize("name, value", [*CHANGES.items(), *SAME.items()])
def test_a_run_goes_on_only_with_its_own_settings(stage, monkeypatch, glm_base, train_file, begun, name, value):
    sft, (recipe, folder) = stage("03_sft"), begun
    flags = ["--model_name_or_path", glm_base, "--train_file", train_file, "--output_dir", folder, *FLAGS]
    flags += [f"--{name}", value]
    settings, args = sft.read_settings(sft.make_parser(), [str(flag) for flag in flags])
    settings.chat_template_kwargs = sft.read_switches(settings)
    run = sft.record_of_run(settings, args, {})["run"]
    if name in SAME:
        sft.refuse_another_run(folder, run)
    else:
        first = name.removesuffix("_backend").removesuffix("_mode")  # that of torch_compile set torch_compile too
        with pytest.raises(sft.InputError, match=f"is of another run .{first} was "):
            sft.refuse_another_run(folder, run)


def test_other_data_script_or_base_is_another_run(stage, monkeypatch, glm_base, train_file, glm_run, tmp_path):
    import shutil

    sft, (recipe, folder) = stage("03_sft"), glm_run
    shutil.copytree(glm_base, tmp_path / "base")
    shutil.copy(train_file, tmp_path / "t.jsonl")
    shutil.copy(sft.__file__, tmp_path / "03_sft.py")

    def run():
        flags = ["--model_name_or_path", tmp_path / "base", "--train_file", tmp_path / "t.jsonl", *FLAGS]
        record = sft.record_of_run(*sft.read_settings(sft.make_parser(), [str(flag) for flag in flags]), {})
        return record["run"] | {"chat_template_kwargs": {}}

    monkeypatch.setattr(sft, "__file__", str(tmp_path / "03_sft.py"))
    sft.refuse_another_run(folder, run())
    for file, name in (("t.jsonl", "train_file"), ("03_sft.py", "script"), ("base/tokenizer.json", "base")):
        before = (tmp_path / file).read_text()
        (tmp_path / file).write_text(before + "\n")
        with pytest.raises(sft.InputError, match=f"another run .{name}_sha256 was"):
            sft.refuse_another_run(folder, run())
        (tmp_path / file).write_text(before)


def test_a_base_of_the_hub_is_the_same_when_its_weights_have_come(stage, glm_base, tmp_path):
    """A run begins before they are downloaded, and goes on when they are there."""
    import shutil

    sft, folder = stage("03_sft"), tmp_path / "models--a--b/snapshots" / ("0123abcd" * 5)
    folder.mkdir(parents=True)
    shutil.copy(glm_base / "config.json", folder)
    before = sft.base_sha256(str(folder))
    shutil.copy(glm_base / "model.safetensors", folder)
    assert sft.base_sha256(str(folder)) == before == "0123abcd" * 5


def test_a_finished_run_is_left_alone(stage, glm_run, glm_base, train_file, capsys):
    before = {path: path.stat().st_mtime_ns for path in glm_run[1].rglob("*")}
    train(stage("03_sft"), glm_base, train_file, glm_run[1])
    assert "this run is finished" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in glm_run[1].rglob("*")} == before


@pytest.mark.parametrize("damage", ["optimizer.pt", "trainer_state.json", "model.safetensors", "complete.json"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(stage, glm_run, glm_base, train_file, tmp_path, capsys, damage):
    import shutil

    recipe, folder = glm_run
    shutil.copytree(folder, tmp_path / "out", ignore=lambda *_: ["recipe.json"])
    file = tmp_path / "out/checkpoint-3" / damage
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    sft = stage("03_sft")
    _, args = sft.read_settings(sft.make_parser(), ["--output_dir", str(tmp_path / "out")])
    assert sft.last_checkpoint(args) == tmp_path / "out/checkpoint-2"
    assert f"{tmp_path}/out/checkpoint-3 was cut short or damaged" in capsys.readouterr().out
    if damage == "optimizer.pt":
        again = train(sft, glm_base, train_file, tmp_path / "out")
        assert again["loss"] == recipe["loss"]


def test_evaluation_while_training(stage, glm_base, train_file, tmp_path):
    """The command sees a model that loads; its numbers are in the log. A command that fails is said, nothing more."""
    sft = stage("03_sft")
    command = f'ls $CHECKPOINT >> {tmp_path}/seen; echo chatter; echo "{{\\"score\\": 0.5}}"'
    recipe = train(sft, glm_base, train_file, tmp_path / "out", "--eval_command", command, "--eval_steps", 2)
    assert [(row["step"], row["eval_score"]) for row in recipe["log"] if "eval_score" in row] == [(2, 0.5)]
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set((tmp_path / "seen").read_text().split())
    assert not (tmp_path / "out/model_to_evaluate").exists()


def test_every_update_is_evaluated_once_and_its_checkpoint_knows(stage, glm_base, train_file, tmp_path):
    """Whatever the command prints before its numbers, and whatever it does with the model."""
    command = f'echo >> {tmp_path}/runs; rm -r $CHECKPOINT; printf "\\377\\n"; echo "{{\\"score\\": 0.5}}"'
    flags = ["--eval_command", command, "--save_steps", 2]
    recipe = train(stage("03_sft"), glm_base, train_file, tmp_path / "out", *flags)
    assert (tmp_path / "runs").read_text() == "\n" * 3
    evaluated = [(row["step"], row["epoch"]) for row in recipe["log"] if "eval_score" in row]
    assert evaluated == [(1, 4 / 5), (2, 8 / 5), (3, 12 / 5)]
    saved = json.loads((tmp_path / "out/checkpoint-2/trainer_state.json").read_text())["log_history"]
    assert saved == [row for row in recipe["log"] if row["step"] < 3]


def test_the_export_is_tried_before_the_first_update(stage, monkeypatch, glm_base, train_file, tmp_path, capsys):
    """A base that samples without do_sample is repaired; names that the export would not have end the run at once."""
    import shutil

    sft = stage("03_sft")
    shutil.copytree(glm_base, tmp_path / "base")
    config = json.loads((glm_base / "generation_config.json").read_text()) | {"temperature": 0.6, "top_p": 0.95}
    (tmp_path / "base/generation_config.json").write_text(json.dumps(config))
    train(sft, tmp_path / "base", train_file, tmp_path / "out", "--max_steps", 2)
    exported = json.loads((tmp_path / "out/generation_config.json").read_text())
    assert (exported["temperature"], exported["do_sample"]) == (0.6, True)
    monkeypatch.setattr(sft, "load_model", None)
    names = sft.base_names(glm_base)
    monkeypatch.setattr(sft, "base_names", lambda _: names | {"model.layers.0.extra.weight"})
    with pytest.raises(sft.InputError, match="the export's tensors are not the base's: 1 differ, such as model.layers.0"):
        train(sft, glm_base, train_file, tmp_path / "out2")
    monkeypatch.setattr(sft, "base_names", lambda _: names)
    monkeypatch.setattr(sft.shutil, "disk_usage", lambda _: type("Disk", (), {"free": 1000})())
    with pytest.raises(sft.InputError, match="the export takes 0.0 GB, 0.0 are free"):
        train(sft, glm_base, train_file, tmp_path / "out2")


def test_dry_run_says_updates_rates_and_split(stage, glm_base, train_file, tmp_path, capsys):
    sft = stage("03_sft")
    flags = ["--model_name_or_path", glm_base, "--train_file", train_file, "--output_dir", tmp_path, *FLAGS, "--dry_run"]
    sft.main(*sft.read_settings(sft.make_parser(), [str(flag) for flag in flags]))
    told = capsys.readouterr().out
    assert "3 updates of 4 samples = 1 data-parallel x 1 x 4 accumulated\n" in told
    assert "5 samples are seen, each 2 to 3 times\n" in told
    assert "learning rates: 0.0005, 0.001, 0.0005\n" in told
    measured = re.search(r"one sample of 107 tokens takes (\S+) s on cpu, measured on 1 and 2 of 2 layers\n", told)
    assert float(measured[1]) > 0


@pytest.mark.parametrize("flags", [[], ["--lora_experts"]])
def test_experts_compute_in_bf16_under_autocast(stage, glm_base, train_file, tmp_path, monkeypatch, flags):
    """Outside FSDP the weights are fp32 and torch's grouped_mm is no autocast op of its own."""
    import torch

    sft, seen = stage("03_sft"), set()
    product = torch.nn.functional.grouped_mm

    def watched(*tensors, **options):
        out = product(*tensors, **options)
        seen.add(out.dtype)
        return out

    monkeypatch.setattr(torch.nn.functional, "grouped_mm", watched)
    train(sft, glm_base, train_file, tmp_path / "out", "--bf16", "true", "--max_steps", 2, *flags)
    assert seen == {torch.bfloat16}


def test_the_kernel_is_the_one_that_autocast_takes(stage, monkeypatch):
    """fp32 weights under autocast: attention computes in bf16, and its kernel is chosen for bf16."""
    import torch

    sft = stage("03_sft")
    seen = []
    monkeypatch.setattr(torch, "_fused_sdp_choice", lambda *tensors, **_: seen.append({t.dtype for t in tensors}) or 1)
    query = torch.zeros(1, 1, 2, 8)
    for dtype, inside in ((torch.bfloat16, True), (torch.float32, False)):
        kernels = set()
        with torch.autocast("cpu", torch.bfloat16, enabled=inside), sft.watched_attention(kernels):
            torch.nn.functional.scaled_dot_product_attention(query, query, query)
        assert kernels == {"FLASH_ATTENTION"} and seen.pop() == {dtype}
