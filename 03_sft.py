"""Stage 3: fine-tune a model on the trajectories; loss on exactly the tokens that the model must generate.

    NAME=qwen3-8b; accelerate launch --config_file recipes/$NAME/accelerate.yaml \\
        03_sft.py --config recipes/$NAME/sft.yaml
    python 03_sft.py --config recipes/demo/sft.yaml --dry_run   # labels, updates, rates, seconds

Reads  data/train.jsonl (02_format_trajectories.py): {"query_id", "messages", "tools", "meta"} per line
Writes outputs/limi/  bf16 checkpoint that vLLM loads, tokenizer with its chat template, recipe.json (all
                      settings, versions, commit, data hash, every update; recipes/plot.py draws it),
                      tokenized.jsonl ({"query_id", "input_ids", "labels"} a sample; recipes/view.py shows it)

What carries loss: of every assistant message the tokens from the end of the generation prompt up to and
including the stop token, in the model's own inference template. GLM-4.5 ends a turn with the next role token
(<|user|>, <|observation|>), Qwen3 with <|im_end|>; leave it out and the model never learns to stop. Every
text, call, argument and reasoning of a trained message stands in its trained span and every result and schema
in its context, or the row is refused by line and field. "weight": 0 on an assistant message makes it context.

The loss is `token_loss` below: the mean over all trained tokens of the global batch, on any layout: one
process, several, FSDP2, context parallel. With --save_steps N the same command goes on from the last
checkpoint; SIGTERM saves one and stops.
"""

import argparse
import bisect
import contextlib
import copy
import difflib
import hashlib
import importlib.util
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import unicodedata
import warnings
from collections import Counter
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path

import psutil
import torch
import yaml
from datasets import Dataset
from jinja2 import TemplateError
from safetensors import SafetensorError, safe_open
from torch.distributed.checkpoint import CheckpointException
from torch.nn.attention import SDPBackend
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, TrainerCallback
from transformers import PrinterCallback, get_scheduler
from transformers.core_model_loading import revert_weight_conversion
from transformers.trainer_utils import SaveStrategy
from transformers.utils import cached_file, extract_commit_hash
from transformers.utils.chat_template_utils import _get_template_variables
from trl import SFTConfig, SFTTrainer, TrlParser
from trl.chat_template_utils import add_response_schema
from trl.trainer.utils import add_fused_lm_head

# The recipe. Values of the released run (LIMI scripts/train/*.sh, the same for all models); "ours" where not.
# Any of them can be given in a YAML (--config) or as a flag, e.g. --learning_rate 3e-5
RECIPE = dict(
    output_dir="outputs/limi",
    learning_rate=1e-5,  # --lr 1e-5
    lr_scheduler_type="cosine_with_min_lr",  # --lr-decay-style cosine
    lr_scheduler_kwargs={"min_lr": 1e-6},  # --min-lr 1e-6
    warmup_steps=2,  # --lr-warmup-iters 2; a second flag of theirs overrode it: 90 % of training
    adam_beta1=0.9,
    adam_beta2=0.98,  # --adam-beta2 0.98
    weight_decay=0.1,  # --weight-decay 0.1
    max_grad_norm=1.0,  # Megatron's default, not set by the scripts
    num_train_epochs=8,  # --num-epoch 4 over a file that holds every sample twice
    max_length=125_000,  # --max_tokens 125000 of their data preparation: longer samples are dropped, not cut
    per_device_train_batch_size=1,  # ours: no padding, so sdpa needs no mask; see --global_batch_size
    router_aux_loss_coef=0.0,  # GLM-4.5 balances experts by a bias that training leaves alone
    gradient_checkpointing=True,  # --recompute-granularity full
    logging_steps=1,
    logging_nan_inf_filter=False,  # ours: a loss that is not a number must be seen
    save_steps=0,  # no checkpoints: there are 9 updates; --save_steps 1 where a machine may be taken away
    save_total_limit=2,  # ours: where the newest is damaged, the run goes on from the one before
    report_to="none",
    seed=42,
)


def setting(default, text: str):
    return field(default=default, metadata={"help": text})


@dataclass
class Settings:
    model_name_or_path: str = setting("zai-org/GLM-4.5", "Base model: folder or Hub id.")
    train_file: str = setting("data/train.jsonl", "Rows of 02_format_trajectories.py.")
    global_batch_size: int = setting(64, "Samples per update over all processes (LIMI: 64).")
    dry_run: bool = setting(False, "Tokenise, plan, try training and export on a few random layers.")
    max_refused: int = setting(0, "So many rows may be refused and left out.")
    chat_template_kwargs: dict | str | None = setting(
        None,
        "The template's switches, in JSON, such as '{\"enable_thinking\": false}' where no row has "
        "reasoning; kept in recipe.json and as the exported tokenizer's default.",
    )
    lora: bool = setting(False, "Train low-rank adapters; use --learning_rate 1e-4 with it.")
    lora_r: int = setting(32, "Rank of the adapters; alpha is twice that.")
    lora_target_modules: list[str] = field(
        default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj"],
        metadata={"help": "Names of the linear layers that get an adapter."},
    )
    lora_experts: bool = setting(False, "Adapters for the routed experts of an MoE as well.")
    bf16_master: bool = setting(False, "Weights and moments in bf16, stochastic rounding.")
    eval_command: str | None = setting(
        None,
        "Shell command run after every --eval_steps updates (default 1) with the model so far in "
        "$CHECKPOINT; the last line of its output, a JSON object of numbers, goes into the log.",
    )
    zero_first_update: bool = setting(False, "Megatron's warm-up: the first update is at rate 0.")
    no_stop_token: bool = setting(False, "Ablation: no loss on stop tokens, as LIMI's code.")
    no_reasoning: bool = setting(False, "Ablation: train without the rows' reasoning.")
    null_arguments: bool = setting(False, "Ablation: calls may have arguments that are null, as in LIMI's.")


# The ten settings that people use first; --help shows them before the rest
FIRST = ["model_name_or_path", "train_file", "output_dir", "dry_run", "max_length", "learning_rate"]
FIRST += ["num_train_epochs", "global_batch_size", "save_steps", "lora"]

# Settings of TRL and transformers that would do nothing here or break what the run promises: {why: names}
REFUSED = {
    "03_sft.py accumulates what --global_batch_size needs": """
        gradient_accumulation_steps auto_find_batch_size""",
    "03_sft.py makes the order of the samples itself, from --seed": """
        train_sampling_strategy length_column_name shuffle_dataset data_seed dataloader_drop_last""",
    "03_sft.py tokenises the rows itself, and pads no batch of one": """
        packing packing_strategy padding_free eval_packing pad_to_multiple_of truncation_mode
        completion_only_loss assistant_only_loss dataset_text_field dataset_kwargs dataset_num_proc
        remove_unused_columns label_names""",
    "labels and export use the base's own; change them in a copy of its folder": """
        chat_template_path eos_token pad_token model_init_kwargs trust_remote_code use_cache""",
    "--save_steps N writes checkpoints that a run goes on from exactly": """
        save_strategy save_only_model save_on_each_node enable_jit_checkpoint ignore_data_skip
        restore_callback_states_from_checkpoint load_best_model_at_end metric_for_best_model
        greater_is_better""",
    "--eval_command measures while training": """
        eval_strategy do_train do_eval do_predict eval_delay eval_on_start eval_accumulation_steps
        per_device_eval_batch_size prediction_loss_only eval_do_concat_batches eval_use_gather_object
        include_for_metrics batch_eval_metrics bf16_full_eval fp16_full_eval""",
    "the output folder holds the training conversations; upload the finished export yourself": """
        push_to_hub hub_token hub_private_repo hub_model_id hub_strategy hub_always_push hub_revision""",
    "the loss is the function token_loss in 03_sft.py": """
        label_smoothing_factor average_tokens_across_devices""",
    "accelerate's YAML decides it": "fsdp fsdp_config deepspeed parallelism_config accelerator_config",
    "weights are trained in fp32 or bf16": "fp16",
    "TRL's fused output layer stands in its place": "use_liger_kernel liger_kernel_config",
    "--logging_steps N": "logging_strategy",
}

# Settings that may change when a run goes on: they change no number of the training, or only its last digits
# (processes, batch per device). Data and base are compared by their hashes, not by their paths
HARMLESS = """
    output_dir train_file model_name_or_path dry_run max_refused eval_command eval_steps report_to run_name
    project trackio_space_id trackio_bucket_id trackio_static_space_id logging_steps logging_first_step
    log_level log_level_replica log_on_each_node logging_nan_inf_filter include_num_input_tokens_seen
    disable_tqdm save_steps save_total_limit resume_from_checkpoint per_device_train_batch_size
    gradient_checkpointing gradient_checkpointing_kwargs activation_offloading torch_empty_cache_steps
    dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor
    dataloader_multiprocessing_context dataloader_in_order ddp_find_unused_parameters ddp_bucket_cap_mb
    ddp_broadcast_buffers ddp_static_graph ddp_backend ddp_timeout skip_memory_metrics debug use_cpu
    local_rank
""".split()

# Numbers below these would end in the middle of something, or do nothing
LEAST = dict(
    global_batch_size=1, per_device_train_batch_size=1, max_length=1, num_train_epochs=0, max_refused=0,
    save_steps=0, save_total_limit=0, logging_steps=0, eval_steps=1, weight_decay=0, max_grad_norm=0,
    neftune_noise_alpha=0, router_aux_loss_coef=0, dataloader_num_workers=0, seed=0,
)  # fmt: skip
MOST = 2**32 - 1  # numpy's largest seed
NEEDS = dict.fromkeys(("lora_r", "lora_target_modules"), "lora") | {
    "eval_steps": "eval_command",
    "dataloader_persistent_workers": "dataloader_num_workers",
}
CHECKPOINTING = ("use_reentrant", "offload", "selective")

ROLES = ("system", "user", "assistant", "tool")
ROW_KEYS = {"query_id", "messages", "tools", "meta", "id", "source"}
MESSAGE_KEYS = {role: {"role", "content"} for role in ROLES}
MESSAGE_KEYS["assistant"] |= {"reasoning_content", "tool_calls", "weight"}
MESSAGE_KEYS["tool"] |= {"tool_call_id", "name"}
CALL_KEYS = {"id", "type", "index", "function"}
EMPTY = (None, "", [])
REMEDIES = dict.fromkeys(("reasoning", "thinking"), "call it reasoning_content")
REMEDIES |= dict.fromkeys(("loss", "train", "training"), 'write "weight": 0 for a message without loss')


class InputError(ValueError):
    """A user's mistake, told in one line that names file, line, field and remedy; exit code 2."""


class Refused(ValueError):
    """Why a row cannot be trained, beginning with its field."""


def is_first_process() -> bool:
    return os.environ.get("RANK", "0") == "0"


def say(text: str) -> None:
    if is_first_process():
        print(text, flush=True)


def make_parser() -> TrlParser:
    """Our settings and TRL's: defaults < --config YAML < flags. An unknown one is an error that names the
    nearest."""
    on_gpu = torch.cuda.is_available()
    parser = TrlParser((Settings, SFTConfig), usage="03_sft.py [--config x.yaml] [--setting value ...]")
    parser.description = "Fine-tune on rows of 02: 03_sft.py --config recipes/qwen3-8b/sft.yaml --dry_run"
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "bf16" if on_gpu else "no")
    offload = {"offload": True} if on_gpu else None  # of gradient checkpoints to the host's memory
    parser.set_defaults(**RECIPE, use_cpu=not on_gpu, bf16=precision == "bf16")
    parser.set_defaults(gradient_checkpointing_kwargs=offload)
    parser.allow_abbrev = False
    parser.error = mistake
    everything = {action.dest: action for action in parser._optionals._group_actions}
    everything["max_length"].help = "Longer samples are left out, not cut. (default: %(default)s)"
    refused = " ".join(REFUSED.values()).split()
    for action in parser._actions:
        action.help = argparse.SUPPRESS if action.dest in refused else action.help
    first = parser.add_argument_group("used first")
    first._group_actions = [everything.pop(name) for name in FIRST]
    parser._optionals._group_actions = list(everything.values())
    parser._action_groups.insert(0, parser._action_groups.pop())
    return parser


def mistake(message: str):
    raise InputError(message)


def read_settings(parser: TrlParser, arguments=None) -> tuple[Settings, SFTConfig]:
    try:
        return parser.parse_args_and_config(arguments)
    except (ValueError, TypeError, IndexError, yaml.YAMLError) as error:
        message = " ".join(str(error).split())
    names = re.findall(r"\['(?:--)?([\w-]+)", message) if "arguments" in message else []
    if names:
        known = [action.dest for action in parser._actions]
        nearest = difflib.get_close_matches(names[0], known, 1)
        hint = f"; nearest: --{nearest[0]}" if nearest else "; see --help"
        place = f"{sys.argv[sys.argv.index('--config') + 1]}: " if "--config" in sys.argv else ""
        message = f"{place * ('config file' in message)}no such setting: --{names[0]}{hint}"
    raise InputError(message)


def check_flags(settings: Settings, args: SFTConfig) -> None:
    """Refuse, before anything is loaded, what would do nothing or end in the middle of something."""
    defaults = vars(Settings()) | vars(SFTConfig("x", use_cpu=args.use_cpu, bf16=args.bf16))
    given = vars(settings) | vars(args)
    for name, default in defaults.items():
        if default not in EMPTY and given[name] in (None, ""):
            raise InputError(f"--{name}: has no value")
    refuse_by_table(given, defaults)
    if args.max_steps < 1 and args.max_steps != -1:
        raise InputError(f"--max_steps {args.max_steps}: at least 1, or -1 for --num_train_epochs")
    if not 0 < args.learning_rate < math.inf:
        raise InputError(f"--learning_rate {args.learning_rate}: must be a number above 0")
    if settings.bf16_master and args.optim != defaults["optim"]:
        raise InputError("--bf16_master has its own AdamW: leave out --optim")
    if args.loss_type not in ("nll", "dft"):
        raise InputError(f"--loss_type {args.loss_type}: nll or dft; or change token_loss")
    check_machine(args)
    check_optimizer(args)
    check_torch(args)


def refuse_by_table(given: dict, defaults: dict) -> None:
    """given, defaults: {setting: value}"""
    for why, names in REFUSED.items():
        for name in names.split():
            if given[name] != defaults[name]:
                raise InputError(f"--{name} has no place here: {why}")
    for name, needed in NEEDS.items():
        if given[name] != defaults[name] and not given[needed]:
            raise InputError(f"--{name} needs --{needed}")
    for name, least in LEAST.items():
        if given[name] is not None and not least <= given[name] <= MOST:
            raise InputError(f"--{name} {given[name]}: at least {least}, at most {MOST}")


def check_machine(args: SFTConfig) -> None:
    """Refuse packages and devices that are not there."""
    if args.n_gpu > 1:
        raise InputError("several GPUs are visible: use accelerate launch, or set CUDA_VISIBLE_DEVICES=0")
    for name in args.report_to:
        if not importlib.util.find_spec(name):
            offline = "; without a network: WANDB_MODE=offline" if name == "wandb" else ""
            raise InputError(f"--report_to {name}: pip install {name}, or leave it out{offline}")
    if args.activation_offloading and args.use_cpu:
        raise InputError("--activation_offloading needs a GPU")
    if args.mixed_precision != ("bf16" if args.bf16 else "no"):  # accelerate's would win
        raise InputError(f"accelerate's mixed_precision {args.mixed_precision}: no or bf16, as --bf16 says")


def check_torch(args: SFTConfig) -> None:
    """Refuse what torch would refuse in the first update."""
    options = args.gradient_checkpointing_kwargs or {}
    if not isinstance(options, dict) or options.keys() - set(CHECKPOINTING):
        known = ", ".join(CHECKPOINTING)
        raise InputError(f"--gradient_checkpointing_kwargs {options}: must be a JSON object with {known}")
    if not args.torch_compile:
        return
    backend = args.torch_compile_backend or "inductor"
    try:
        torch.compile(torch.nn.Identity(), backend=backend, mode=args.torch_compile_mode)
    except RuntimeError as error:
        raise InputError(f"--torch_compile: {str(error).splitlines()[0]}") from None


def check_optimizer(args: SFTConfig) -> None:
    try:
        kind, options = SFTTrainer.get_optimizer_cls_and_kwargs(args)
        kind([torch.nn.Parameter(torch.zeros(1))], **options)
    except (ValueError, TypeError, ImportError, RuntimeError) as error:
        raise InputError(f"--optim: {error}") from None
    plain = copy.copy(args)
    plain.optim_args = None
    if args.optim_args and SFTTrainer.get_optimizer_cls_and_kwargs(plain)[1] == options:
        raise InputError(f"--optim_args does nothing for --optim {args.optim.value}")
    if args.optim_target_modules and not re.match("galore|apollo", args.optim.value):
        raise InputError(f"--optim_target_modules does nothing for --optim {args.optim.value}")


def read_jsonl(path, append_only=False):
    """Yield ("path:line", row) for every object of a JSONL file.

    append_only: a kill may have cut the last line of such a file; a last line without a newline is left out.
    """
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip() or append_only and not line.endswith(b"\n"):
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                told = f"{path}:{number}: not valid JSON ({error}); one JSON object a line"
                raise InputError(told) from None
            if not isinstance(row, dict):
                raise InputError(f"{path}:{number}: expected a JSON object, found {type(row).__name__}")
            yield f"{path}:{number}", row


def write_whole(path: Path, text: str) -> None:
    """Write under a temporary name, then rename: a reader sees the old file or the whole new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_text(text)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


# ------------------------------------------------------------------------------------------------------------
# Rows -> input_ids and labels


def read_rows(path: str, null_arguments=False) -> tuple[list[dict], list[str]]:
    """(rows of train.jsonl, refusals "path:line: field: why"). Not through an Arrow schema, which would fill
    tool arguments with nulls. Keys without a value are left out, as templates take them for given."""
    if not Path(path).is_file():
        raise InputError(f"{path}: no such file; 02_format_trajectories.py writes it, --train_file names one")
    rows = []
    refused = []
    for where, row in read_jsonl(path):
        checked = json.loads(json.dumps(row), object_hook=without_empty_keys) if null_arguments else row
        try:
            check_row(checked)
        except Refused as error:
            refused.append(f"{where}: {error}")
            continue
        messages = [without_empty_keys(message) for message in row["messages"]]
        query_id = str(row.get("query_id", where))
        rows.append(row | {"messages": messages, "where": where, "query_id": query_id})
    if not rows and not refused:
        raise InputError(f"{path}: no rows in it")
    return rows, refused


def without_empty_keys(message: dict) -> dict:
    return {key: value for key, value in message.items() if key == "content" or value not in EMPTY}


def check_row(row: dict) -> None:
    """Raise Refused naming the field of what no template renders, or wrongly, or what 03 would not read."""
    messages = row.get("messages")
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise Refused("messages: must be a list of objects")
    for name in sorted(row.keys() - ROW_KEYS):
        if row[name] not in EMPTY:
            raise Refused(f"{name}: not read by 03; a row has messages and tools, a template's switches go "
                          "to --chat_template_kwargs, all else under meta")
    for i, message in enumerate(messages):
        check_message(message, f"messages[{i}]")
    check_tools(row)
    check_results(messages)
    if not any(is_trained(message) for message in messages):
        raise Refused("messages: no assistant message in it to train")
    if is_trained(messages[0]):
        raise Refused('messages[0]: an answer to nothing; begin with a user message, or write "weight": 0')
    if is_trained(messages[-1]) and messages[-1].get("tool_calls"):  # its stop token is not that of an answer
        raise Refused(f"messages[{len(messages) - 1}]: the row ends with a tool call without its result")


def check_results(messages: list[dict]) -> None:
    """Raise Refused for a result that is not in the place of its call's: most templates write no ids."""
    waiting = []  # ids of the calls before it
    for i, message in enumerate(messages):
        if message["role"] != "tool":
            waiting = [call.get("id") for call in message.get("tool_calls") or []]
            continue
        if not waiting:
            raise Refused(f"messages[{i}]: a result without its call before it")
        expected = waiting.pop(0)
        given = message.get("tool_call_id")
        if given != expected and given not in EMPTY and expected not in EMPTY:
            raise Refused(f"messages[{i}].tool_call_id: {given!r} in the place of the result of "
                          f"{expected!r}; 02_format_trajectories.py puts results in the order of their calls")


def check_tools(row: dict) -> None:
    tools = row.get("tools") or []
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise Refused("tools: must be a list of objects (a string of JSON: parse it first)")
    if not tools and any(message.get("tool_calls") for message in row["messages"]):
        raise Refused("tools: missing, but messages call tools; 02_format_trajectories.py --tools adds them")
    names = []
    for j, tool in enumerate(tools):
        function = tool.get("function")
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise Refused(f'tools[{j}]: must be {{"type": "function", "function": {{"name": ...}}}}')
        names.append(function["name"])
    refuse_no_text(tools, "tools")
    if len(set(names)) < len(names):
        raise Refused(f"tools: two of them are named {Counter(names).most_common(1)[0][0]}")


def is_trained(message: dict) -> bool:
    return message["role"] == "assistant" and message.get("weight", 1) != 0


def check_message(message: dict, name: str) -> None:
    if message.get("role") not in ROLES:
        raise Refused(f"{name}.role: {message.get('role')!r}, not one of {ROLES}")
    for key in ("content", "reasoning_content", "tool_call_id", "name"):
        if not isinstance(message.get(key), str if key == "content" else str | None):
            raise Refused(f"{name}.{key}: must be a string")
    if "weight" in message and (message["role"] != "assistant" or message["weight"] not in (0, 1)):
        raise Refused(f"{name}.weight: must be 0 or 1, on an assistant message")
    refuse_other_keys(message, MESSAGE_KEYS[message["role"]], name)
    if not isinstance(message.get("tool_calls"), list | None):
        raise Refused(f"{name}.tool_calls: must be a list of objects")
    for j, call in enumerate(message.get("tool_calls") or []):
        check_call(call, f"{name}.tool_calls[{j}]")
    refuse_no_text(message, name)


def refuse_no_text(value, name: str) -> None:
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    except ValueError:
        raise Refused(f"{name}: NaN or Infinity in it, which are no numbers of JSON") from None
    if re.search("[\ud800-\udfff]", text):
        raise Refused(f"{name}: half a character in it (a lone surrogate); repair the text")


def refuse_other_keys(part: dict, known: set[str], name: str) -> None:
    for key in sorted(part.keys() - known):
        if part[key] not in EMPTY:
            raise Refused(f"{name}.{key}: not read by 03; {REMEDIES.get(key, 'take it out')}")


def check_call(call: dict, name: str) -> None:
    function = call.get("function") if isinstance(call, dict) else None
    function = function if isinstance(function, dict) else {}
    if not isinstance(function.get("name"), str) or not isinstance(call.get("id"), str | None):
        raise Refused(f"{name}.function.name: must be a string, as must the call's id")
    arguments = function.get("arguments")
    if not isinstance(arguments, dict) or None in arguments.values():
        raise Refused(f"{name}.function.arguments: must be an object; leave out an argument that is null")
    refuse_other_keys(call, CALL_KEYS, name)
    refuse_other_keys(function, {"name", "arguments"}, f"{name}.function")


def load_tokenizer(model: str, template_kwargs: dict | None = None):
    """The tokenizer with three more attributes: stop_ids, the token ids at which the engine stops (vLLM reads
    the same generation_config.json), end_id, the one that ends a conversation's last turn if the template
    writes none, and template_kwargs, the template's switches."""
    if Path(model).is_dir() and not Path(model, "tokenizer_config.json").exists():
        raise InputError(f"{model}: no tokenizer_config.json in the folder; it must hold the tokenizer too")
    try:
        config = AutoConfig.from_pretrained(model)
        tok = AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError) as error:
        first_line = str(error).splitlines()[0]
        raise InputError(f"{model}: no folder of a model, nor a reachable Hub id ({first_line})") from None
    check_template(tok, model, template_kwargs or {})
    try:
        stops = GenerationConfig.from_pretrained(model).eos_token_id
    except OSError:  # not every checkpoint has the file
        stops = getattr(config.get_text_config(), "eos_token_id", None)
    stops = tok.eos_token_id if stops is None else stops
    if stops is None:
        raise InputError(f"{model}: no eos_token_id in generation_config.json, config.json or the tokenizer")
    tok.stop_ids = {stops} if isinstance(stops, int) else set(stops)
    tok.template_kwargs = template_kwargs or {}
    tok.end_id = token_after_an_answer(tok)
    return tok


def check_template(tok, model: str, switches: dict) -> None:
    if not tok.chat_template:
        raise InputError(f"{model}: the tokenizer has no chat template")
    if switches and not isinstance(tok.chat_template, str):
        raise InputError(f"--chat_template_kwargs: {model} has several chat templates; keep one in a copy")
    if not tok.is_fast:
        raise InputError(f"{model}: the tokenizer is no fast one, which knows where its tokens begin")
    known = _get_template_variables(tok.get_chat_template()) if switches else set()
    for name in switches:
        if name not in known - {"messages", "tools", "add_generation_prompt", *tok.special_tokens_map}:
            raise InputError(f"--chat_template_kwargs {name}: no switch of {model}'s chat template")


def token_after_an_answer(tok) -> int | None:
    """GLM-4.5 writes no stop token after a conversation's last answer: the next role token is it. None for
    the templates that write one."""
    talk = [{"role": role, "content": "a"} for role in ("user", "assistant", "user")]
    try:
        two = render(tok, talk[:2], None)
        three = render(tok, talk, None)
    except Refused:
        return None
    if not three.startswith(two):
        return None
    following = tok(three.removeprefix(two), add_special_tokens=False)["input_ids"][:1]
    return following[0] if tok.stop_ids.intersection(following) else None


def render(tok, messages: list[dict], tools: list[dict] | None, **kwargs) -> str:
    """The text of the model's own template. Raises Refused for a conversation that it does not take."""
    try:
        options = getattr(tok, "template_kwargs", {}) | kwargs
        return tok.apply_chat_template(messages, tools=tools or None, tokenize=False, **options)
    except (TemplateError, AttributeError, LookupError, TypeError, ValueError) as error:
        first_line = (str(error) or type(error).__name__).splitlines()[0]
        raise Refused(f"messages: the chat template does not take them: {first_line}") from None


def turn_starts(tok, messages, tools, first: int) -> tuple[str, dict[int, int]]:
    """(text of the conversation, {index of a trained message: where in the text the engine begins to generate
    it}).

    Raises Refused where inference would see another text: a template that rewrites what stands before a
    message, or an earlier turn when the next message of user or system comes.
    """
    text = render(tok, messages, tools)
    starts = {}
    answered = False  # is there a trained message since the last user message?
    for i, message in enumerate(messages):
        if message["role"] in ("user", "system") and answered:
            answered = False
            if not text.startswith(render(tok, messages[:i], tools)):
                raise Refused(f"messages[{i}]: the chat template rewrites the turn before it")
        if i >= first and is_trained(message):
            prompt = render(tok, messages[:i], tools, add_generation_prompt=True)
            if not text.startswith(prompt):
                raise Refused(f"messages[{i}]: the chat template rewrites what stands before it, or opens a "
                              "thought that the row has not; try --chat_template_kwargs")
            starts[i] = len(prompt)
            answered = True
    return text, starts


def label_tokens(tok, text: str, starts: dict[int, int]) -> tuple[list[int], list[int], dict[int, slice]]:
    """(input_ids, labels, {message: its trained tokens}); labels are -100 but for what the engine must
    generate, stop token included.

    Raises Refused where no mask would be right: a turn that begins inside a token, or has no stop token."""
    encoded = tok(text, add_special_tokens=False, return_offsets_mapping=True)
    ids = encoded["input_ids"]
    begins = [begin for begin, _ in encoded["offset_mapping"]]
    firsts = [count_prompt(tok, turn, text[:start], ids, begins) for turn, start in starts.items()]
    labels = [-100] * len(ids)
    spans = {}
    for turn, first, limit in zip(starts, firsts, [*firsts[1:], len(ids)]):
        stop = next((place for place in range(first, limit) if ids[place] in tok.stop_ids), None)
        if stop is None and (limit < len(ids) or tok.end_id is None):
            raise Refused(f"messages[{turn}]: has no stop token")
        if stop is None:
            stop = len(ids)
            ids.append(tok.end_id)
            labels.append(-100)
        spans[turn] = slice(first, stop + 1)
        labels[spans[turn]] = ids[spans[turn]]
    return ids, labels, spans


def count_prompt(tok, turn: int, prompt: str, ids: list[int], begins: list[int]) -> int:
    """Tokens of a turn's prompt. Raises Refused if the prompt alone, which is what the engine is given, has
    others than in the whole. Compared from its last added token on, where tokenizers cut first; not by where
    the answer's first token begins, as some count white space to no token."""
    added = tok.added_tokens_decoder
    last = max(bisect.bisect_left(begins, len(prompt)) - 1, 0)
    while last > 0 and ids[last] not in added:
        last -= 1
    alone = tok(prompt[begins[last] :], add_special_tokens=False)["input_ids"]
    if alone != ids[last : last + len(alone)]:
        raise Refused(f"messages[{turn}]: begins inside a token of its prompt")
    return last + len(alone)


def decode(tok, ids: list[int]) -> str:
    """The text, composed: Qwen's tokenizers compose letters and their accents."""
    return unicodedata.normalize("NFC", tok.decode(ids, clean_up_tokenization_spaces=False))


def encode(tok, messages, tools, first=0) -> tuple[list[int], list[int]]:
    """(input_ids, labels) of a conversation, e.g. with GLM-4.5's template and what carries loss in [[ ]]

    [gMASK]<sop><|user|>\\nU<|assistant|>[[\\n<think></think>\\nD<|user|>]]

    first: index of the first message that may carry loss. Raises Refused if the labels would not be exact, or
    template or tokenizer leave out a part of the row; the same is tried with a mark in every text, so that no
    part is found where another stands, and none stands elsewhere.
    """
    ids, labels, spans = label_tokens(tok, *turn_starts(tok, messages, tools, first))
    marked, marked_tools, marks = mark_row(messages, tools)
    check_kept(tok, messages, [pair for pair in marks.values() if pair[0][0] == "tools"], ids, spans)
    ids_of_marks, _, spans = label_tokens(tok, *turn_starts(tok, marked, marked_tools, first))
    tool_marks = [(path, mark) for mark, (path, _) in marks.items() if path[0] == "tools"]
    check_kept(tok, marked, tool_marks, ids_of_marks, spans)
    check_order(messages, marks, decode(tok, ids_of_marks))
    for i, span in spans.items():
        turn = decode(tok, ids_of_marks[span])
        check_turn(i, marks, turn)
        check_beside(i, marks, turn)
    return ids, labels


def mark_row(messages: list[dict], tools: list[dict] | None) -> tuple[list[dict], list[dict], dict]:
    """(messages and tools with a mark of its own in every text, {mark: (where in the row, the text)})."""
    marks = {}
    marked = []
    ids = {}
    for i, message in enumerate(messages):
        text = message["content"]
        silent = text == "" and "tool_calls" not in message  # a mark shows where it stands, too
        copied = mark_value(message | {"content": " "} if silent else message, (i,), marks)
        if message["role"] != "assistant":  # templates look at how these begin and end
            half = len(text) // 2
            copied["content"] = text[:half] + copied["content"] + text[half:]
        for j, call in enumerate(copied.get("tool_calls", [])):
            name = message["tool_calls"][j]["function"]["name"]
            if call.get("id"):  # Kimi-K2's holds the name: functions.NAME:0
                new_id = call["id"].replace(f".{name}:", f".{call['function']['name']}:")
                call["id"] = ids[call["id"]] = new_id
        if "tool_call_id" in copied:
            copied["tool_call_id"] = ids.get(copied["tool_call_id"], copied["tool_call_id"])
        marked.append(copied)
    return marked, mark_value(tools or [], ("tools",), marks), marks


def mark_value(value, path: tuple, marks: dict):
    """A copy with marks for contents and reasoning of messages, names and arguments of calls, and names,
    parameters and descriptions of tools."""
    argument = path[3:5] == ("function", "arguments")
    if isinstance(value, list):
        return [mark_value(part, (*path, i), marks) for i, part in enumerate(value)]
    if isinstance(value, dict):
        names = argument or path[-1] == "properties" != path[-2]
        pairs = [(new_mark(key, (*path, key, "key"), marks) if names else key, key) for key in value]
        return {mark: mark_value(value[key], (*path, key), marks) for mark, key in pairs}
    is_text = argument or path[-1] in ("content", "reasoning_content", "name", "description")
    return new_mark(value, path, marks) if is_text or path[-2] == "enum" else value


def new_mark(value, path: tuple, marks: dict):
    if value in EMPTY or isinstance(value, bool):
        return value
    digits = f"7318{len(marks):06}"
    marks[f"X{digits}x"] = (path, value)
    return f"X{digits}x" if isinstance(value, str) else type(value)(digits)


def marked_places(marks: dict, text: str) -> list[tuple]:
    found = [f"X{digits}x" for digits in re.findall(r"7318\d{6}", text)]
    return [marks[mark][0] for mark in found if mark in marks]


def check_order(messages: list[dict], marks: dict, text: str) -> None:
    """Raise Refused if a message stands behind a later one. Tools and system messages may stand anywhere, and
    results and ids repeat the names of calls."""
    places = [path for path in marked_places(marks, text) if path[0] != "tools" and path[-1] != "name"]
    owners = [i for i, *_ in places if messages[i]["role"] != "system"]
    for before, after in itertools.pairwise(owners):
        if after < before:
            raise Refused(f"messages[{after}]: the chat template moves it behind messages[{before}]")


def check_turn(i: int, marks: dict, text: str) -> None:
    """Raise Refused if the trained text of a message holds another's, or its own otherwise than once and in
    order."""
    places = marked_places(marks, text)
    others = [path[0] for path in places if path[0] != i]
    if others:
        raise Refused(f"messages[{i}]: the chat template does not end it before messages[{others[0]}]")
    calls = [path[2] for path in places if path[1] == "tool_calls"]
    once = [path for path in places if path[-1] not in ("name", "key")]  # those of a closing tag too
    if calls != sorted(calls) or len(once) > len(set(once)):
        raise Refused(f"messages[{i}]: the chat template writes calls in another order, or a text twice")


def check_beside(i: int, marks: dict, text: str) -> None:
    """Raise Refused if more than tags stands beside the text of a message: a parser takes no words away."""
    for mark, (path, _) in marks.items():
        if path == (i, "content"):
            before, after = (part.strip() for part in text.split(mark))
            if before[-1:] not in ("", ">", "]") or after[:1] not in ("", "<", "["):
                raise Refused(f"messages[{i}].content: the chat template writes words or quotes beside it, "
                              "which the engine would give back as its own")


def parts_of(message: dict, thoughts: bool) -> list[tuple[str, object]]:
    """[(field, value)] of all that a message says; thoughts: with its reasoning, which no template keeps for
    ever."""
    content = re.split("</?think>", message["content"])
    parts = [("content", piece.strip()) for piece in (content if thoughts else content[-1:])]
    if thoughts:
        parts.append(("reasoning_content", message.get("reasoning_content", "").strip()))
    for j, call in enumerate(message.get("tool_calls", [])):
        field_name = f"tool_calls[{j}].function"
        parts.append((f"{field_name}.name", call["function"]["name"]))
        if call["function"]["arguments"]:
            parts += leaves(call["function"]["arguments"], f"{field_name}.arguments")
    return parts


def leaves(value, name: str) -> list[tuple[str, object]]:
    """[(path, key or value)] of everything in a JSON value."""
    if not isinstance(value, (dict, list)) or not value:
        return [(name, value)]
    found = [(name, key) for key in value] if isinstance(value, dict) else []
    pairs = value.items() if isinstance(value, dict) else enumerate(value)
    for key, part in pairs:
        found += leaves(part, f"{name}.{key}")
    return found


def stands_in(value, text: str) -> bool:
    """Is it in the text, as it is, in JSON, or in Python's notation?"""
    value = unicodedata.normalize("NFC", value) if isinstance(value, str) else value
    if str(value) in text:
        return True
    return any(json.dumps(value, ensure_ascii=ascii_only).strip('"') in text for ascii_only in (False, True))


def check_kept(tok, messages, tool_texts, ids: list[int], spans: dict[int, slice]) -> None:
    """Raise Refused for a part of the row that is not in its place: of a trained message in its trained
    tokens, of everything else in all. tool_texts: [(where in the row, name or description)]."""
    whole = decode(tok, ids)
    for i, message in enumerate(messages):
        text = decode(tok, ids[spans[i]]) if i in spans else whole
        for name, value in parts_of(message, thoughts=i in spans):
            if not stands_in(value, text):
                thought = name == "reasoning_content"
                remedy = "--no_reasoning trains without it" if thought else "try another template"
                raise Refused(f"messages[{i}].{name}: chat template or tokenizer leave it out; {remedy}")
    for path, text in tool_texts:
        if not stands_in(text.strip() if isinstance(text, str) else text, whole):
            raise Refused(f"tools[{path[1]}]: the chat template leaves {str(text)[:60]!r} out")


def encode_conversation(tok, messages, tools) -> list[tuple[list[int], list[int]]]:
    """[(input_ids, labels)]: one sample if one rendering is exact for every turn, else one per user message,
    so that every turn is trained in the context it is served in (GLM-4.5 and Qwen3 drop a thought, and Qwen3
    the empty one, once the next user message is there)."""
    users = [i for i, message in enumerate(messages) if message["role"] == "user"]
    cuts = [i for i in users if any(map(is_trained, messages[:i]))]
    try:
        return [encode(tok, messages, tools)]
    except Refused:
        if not cuts:
            raise
    samples = []
    for first, end in itertools.pairwise([0, *cuts, len(messages)]):
        while messages[end - 1]["role"] == "system":  # a stop for no engine, as the next user message is
            end -= 1
        if any(is_trained(message) for message in messages[first:end]):
            samples.append(encode(tok, messages[:end], tools, first))
    return samples


def without_reasoning(message: dict) -> dict:
    """As the templates render a message that a later user message follows."""
    if message["role"] != "assistant":
        return message
    kept = {key: value for key, value in message.items() if key != "reasoning_content"}
    return kept | {"content": message["content"].split("</think>")[-1].lstrip("\n")}


def check_stops(tok, messages) -> None:
    """Raise Refused for a turn that would not end as the engine ends it: text like a stop token becomes the
    token; where the next role's token is the stop (GLM-4.5), a call without its result ends as an answer."""
    stops = tok.convert_ids_to_tokens(sorted(tok.stop_ids))
    for i, message in enumerate(messages):
        if not is_trained(message):
            continue
        text = json.dumps(message, ensure_ascii=False)
        if any(stop in text for stop in stops):
            raise Refused(f"messages[{i}]: spells out a stop token")
        following = messages[i + 1]["role"] if i + 1 < len(messages) else "tool"
        if message.get("tool_calls") and following != "tool" and tok.end_id is not None:
            raise Refused(f"messages[{i}]: a tool call without its result would end as an answer")


def tokenize(tok, rows, max_length: int, no_stop_token=False, no_reasoning=False):
    """(samples {"query_id", "input_ids", "labels"}, Counter of samples left out by reason, refusals)."""
    samples = []
    left_out = Counter()
    refused = []
    for row in rows:
        messages = [without_reasoning(m) if no_reasoning else m for m in row["messages"]]
        try:
            check_stops(tok, messages)
            pairs = encode_conversation(tok, messages, row.get("tools"))
        except Refused as error:
            refused.append(f"{row['where']}: {error}")
            continue
        for ids, labels in pairs:
            if no_stop_token:
                labels = [-100 if label in tok.stop_ids else label for label in labels]
            if len(ids) > max_length:
                left_out[f"longer than max_length {max_length:,} tokens"] += 1
            else:
                samples.append({"query_id": row["query_id"], "input_ids": ids, "labels": labels})
    return samples, left_out, refused


def load_samples(settings: Settings, args: SFTConfig, tok) -> tuple[list[dict], dict]:
    """(samples, facts about them). Stops where more rows than --max_refused are refused, or none is left."""
    started = time.monotonic()
    rows, refused = read_rows(settings.train_file, settings.null_arguments)
    total = len(rows) + len(refused)
    ablations = (settings.no_stop_token, settings.no_reasoning)
    samples, left_out, more = tokenize(tok, rows, args.max_length, *ablations)
    refused += more
    kinds = Counter(re.sub(r"\[\d+\]", "[]", line.split(": ", 1)[1]) for line in refused)
    if len(refused) > settings.max_refused:
        raise InputError(f"{refused[0]} ({len(refused)} of {total} rows refused, --max_refused "
                         f"{settings.max_refused}: {dict(kinds.most_common(5))})")
    for line in refused:
        say(f"refused {line}")
    if not samples:
        raise InputError(f"{settings.train_file}: every sample was left out: {dict(left_out)}")
    lengths = [len(sample["input_ids"]) for sample in samples]
    trained = sum(len(sample["labels"]) - sample["labels"].count(-100) for sample in samples)
    facts = dict(rows=total, refused=dict(kinds), samples=len(samples), left_out=dict(left_out),
                 tokens=sum(lengths), trained_tokens=trained, longest=max(lengths))
    messages = itertools.chain.from_iterable(row["messages"] for row in rows)
    thoughts = any(m.get("reasoning_content") or "</think>" in m["content"] for m in messages)
    facts["reasoning"] = thoughts and not settings.no_reasoning
    told = ", ".join(f"{name}: {value}" for name, value in facts.items())
    say(f"tokenised in {time.monotonic() - started:.1f} s: {told}")
    return samples, facts


def read_switches(settings: Settings) -> dict:
    """--chat_template_kwargs, which a YAML gives as a mapping and a flag as JSON."""
    given = settings.chat_template_kwargs or {}
    try:
        given = json.loads(given) if isinstance(given, str) else given
    except ValueError:
        given = None
    if not isinstance(given, dict):
        raise InputError(f"--chat_template_kwargs {settings.chat_template_kwargs}: must be a JSON object")
    return given


# ------------------------------------------------------------------------------------------------------------
# Which samples in which update


@dataclass
class Layout:
    fsdp: bool  # sharded over all processes by FSDP2
    cp: int  # processes that share one sample by context parallelism


def read_layout(args: SFTConfig) -> Layout:
    """From accelerate's YAML, which its launcher passes on as environment variables."""
    names = ("DP_REPLICATE", "DP_SHARD", "CP")
    sizes = [int(os.environ.get(f"PARALLELISM_CONFIG_{name}_SIZE", 1)) for name in names]
    fsdp = os.environ.get("ACCELERATE_USE_FSDP") == "true"
    parallel = os.environ.get("ACCELERATE_USE_PARALLELISM_CONFIG") == "true"
    if parallel and math.prod(sizes) != args.world_size:
        product = "dp_replicate {} x dp_shard {} x cp {}".format(*sizes)
        raise InputError(f"accelerate's parallelism_config: {product} is not the number of processes, "
                         f"{args.world_size}")
    if sizes[2] > 1 and not fsdp:
        raise InputError("context parallelism needs distributed_type: FSDP in accelerate's YAML")
    return Layout(fsdp, sizes[2])


def global_batches(lengths: list[int], num_samples: int, batch_size: int, seed: int) -> list[int]:
    """`num_samples` sample indices in training order: shuffled passes over the data, one after the other. The
    same on any number of processes; inside a batch sorted by length, so that processes wait little on each
    other."""
    rng = random.Random(seed)
    passes = []
    while len(passes) < num_samples:
        passes += rng.sample(range(len(lengths)), len(lengths))
    order = []
    for start in range(0, num_samples, batch_size):
        order += sorted(passes[start : start + batch_size], key=lambda i: -lengths[i])
    return order


@dataclass
class Plan:
    order: list[int]  # sample indices of all updates, one after the other
    steps: int
    accumulated: int  # micro-batches of a process in an update
    rates: list[float]  # learning rate of every update
    tokens: list[int]  # of every update


def plan_updates(samples, settings: Settings, args: SFTConfig, layout: Layout) -> Plan:
    size = settings.global_batch_size
    per_step = args.world_size // layout.cp * args.per_device_train_batch_size
    if size % per_step:
        raise InputError(f"--global_batch_size {size} is no multiple of {per_step}, processes x batch")
    steps = count_updates(len(samples), size, args)
    lengths = [len(sample["input_ids"]) for sample in samples]
    order = global_batches(lengths, steps * size, size, args.seed)
    tokens = []
    for start in range(0, len(order), size):
        tokens.append(sum(lengths[i] for i in order[start : start + size]))
    if settings.eval_command and (args.eval_steps or 1) > steps:
        raise InputError(f"--eval_steps {args.eval_steps:g}: there are {steps} updates")
    rates = learning_rates(args, steps, settings.zero_first_update)
    return Plan(order, steps, size // per_step, rates, tokens)


def count_updates(samples: int, size: int, args: SFTConfig) -> int:
    """Whole batches only. Raises InputError for less than one, or less than the warm-up takes."""
    steps = args.max_steps
    if steps == -1:
        steps = int(samples * args.num_train_epochs) // size
    remedy = "lower --global_batch_size or raise --num_train_epochs"
    if steps == 0:
        passes = f"{samples} samples x {args.num_train_epochs:g} passes"
        raise InputError(f"{passes} do not fill one batch of {size}; {remedy}")
    warmup = args.get_warmup_steps(steps)
    if steps < warmup:
        raise InputError(f"{steps} updates end inside the warm-up of {warmup}; {remedy}, or lower "
                         "--warmup_steps")
    return steps


def make_schedule(args: SFTConfig, optimizer, steps: int, zero_first_update: bool):
    """The scheduler whose first update is one step into the warm-up: at LR 0 it would learn nothing. One step
    more than there are updates, or `linear` would spend the last one at 0."""
    warmup = args.get_warmup_steps(steps)
    ahead = warmup > 0 and not zero_first_update
    options = args.lr_scheduler_kwargs or {}
    try:
        schedule = get_scheduler(args.lr_scheduler_type, optimizer, warmup, steps + ahead, options)
    except (TypeError, ValueError) as error:
        raise InputError(f"--lr_scheduler_kwargs {options} of --lr_scheduler_type: {error}") from None
    if ahead:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch expects an update before the first step
            schedule.step()
    return schedule


def learning_rates(args: SFTConfig, steps: int, zero_first_update: bool) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=args.learning_rate)
    schedule = make_schedule(args, optimizer, steps, zero_first_update)
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    if not all(0 <= rate < 1.001 * args.learning_rate for rate in rates):
        raise InputError(f"--lr_scheduler_kwargs {args.lr_scheduler_kwargs}: learning rates from "
                         f"{min(rates):g} to {max(rates):g}, where 0 to {args.learning_rate:g} are meant")
    if rates[0] >= args.learning_rate and (zero_first_update or args.get_warmup_steps(steps) > 1):
        raise InputError("no warm-up with these settings: --warmup_steps 0, without --zero_first_update")
    return rates


def show_plan(plan: Plan, settings: Settings, args: SFTConfig, layout: Layout) -> None:
    seen = Counter(plan.order).values()
    say(f"{plan.steps} updates of {settings.global_batch_size} samples = {args.world_size // layout.cp} "
        f"data-parallel x {args.per_device_train_batch_size} x {plan.accumulated} accumulated")
    say(f"{len(seen)} samples are seen, each {min(seen)} to {max(seen)} times")
    shown = [f"{rate:.3g}" for rate in plan.rates]
    say("learning rates: " + ", ".join(shown if plan.steps <= 12 else [*shown[:5], "...", *shown[-3:]]))


# ------------------------------------------------------------------------------------------------------------
# The model


def model_without_weights(config):
    """The model on torch's meta device: names, shapes, no memory."""
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    except ValueError as error:
        raise InputError(f"--model_name_or_path: {str(error).splitlines()[0]}") from None


def load_config(model: str, longest: int):
    """The model's config, with the rotary embedding stretched where the data is longer than the model's
    window.

    Qwen3 (window 40,960) is made for YaRN over its first 32,768 positions (model cards); the export tells
    vLLM."""
    config = AutoConfig.from_pretrained(model)
    window = config.get_text_config().max_position_embeddings
    if longest <= window:
        return config
    rope = config.rope_parameters
    if config.model_type not in ("qwen3", "qwen3_moe") or rope["rope_type"] != "default":
        raise InputError(f"a sample of {longest:,} tokens, but the model's window is {window:,}; "
                         "lower --max_length")
    factor = math.ceil(longest / 32_768)
    yarn = {"rope_type": "yarn", "factor": float(factor), "original_max_position_embeddings": 32_768}
    config.rope_parameters = rope | yarn
    config.max_position_embeddings = factor * 32_768
    say(f"YaRN factor {factor} for a sample of {longest:,} tokens: window {window:,} -> {factor * 32_768:,}")
    return config


def load_model(settings: Settings, args: SFTConfig, config, layout: Layout, resume: Path | None):
    """fp32 weights, because AdamW applies about a tenth of an update at 1e-5 to bf16, unless it rounds at
    random; frozen ones (--lora) in the precision of the computation.

    From the checkpoint of a run that goes on, since the trainer restores an MoE's experts only under FSDP.
    Under FSDP2 transformers gives each process its shard: accelerate would build the whole fp32 model in the
    memory of every process, and its way around that fails on GLM-4.5's router bias. Tied embeddings (Qwen3-4B
    and smaller) are left to accelerate: transformers' plan does not sum their gradient as output layer, and a
    falling loss hides it.
    """
    native = layout.fsdp and not config.tie_word_embeddings
    if layout.fsdp:
        os.environ["FSDP_AUTO_WRAP_POLICY"] = "NO_WRAP" if native else "TRANSFORMER_BASED_WRAP"
        if settings.bf16_master and not native:
            raise InputError("--bf16_master: accelerate would turn tied embeddings to fp32; leave it out")
    options = dict(dtype=storage_type(settings, args, layout), attn_implementation="sdpa")
    if native:
        from transformers.distributed import DistributedConfig

        mesh = DistributedConfig(fsdp_size=args.world_size, fsdp_mixed_precision=args.bf16)
        options["distributed_config"] = mesh
    from_base = resume is None or layout.fsdp or settings.lora
    source = settings.model_name_or_path if from_base else resume
    model = AutoModelForCausalLM.from_pretrained(source, config=config, **options)
    model.generation_config = valid_generation_config(settings.model_name_or_path) or model.generation_config
    if native:  # from here on accelerate's: context parallelism, clipping, saving and resuming
        model._is_distributed_loading_by_transformers = False
        model.config.distributed_config = None  # else save_pretrained gathers once more, on one process only
    return model


def storage_type(settings: Settings, args: SFTConfig, layout: Layout) -> torch.dtype:
    """Of the weights."""
    half = settings.bf16_master or settings.lora and args.bf16 and not layout.fsdp
    return torch.bfloat16 if half else torch.float32


def lora_config(settings: Settings, config):
    """peft's settings. Tries them on a model without weights; says what gets an adapter and refuses what peft
    would skip without a word, such as the linear layers that an MoE has fused."""
    from peft import LoraConfig, get_peft_model

    if "lm_head" in settings.lora_target_modules:
        raise InputError("--lora_target_modules lm_head: TRL's fused output layer would not train it")
    experts = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"] if settings.lora_experts else []
    targets = dict(target_modules=settings.lora_target_modules, target_parameters=experts)
    lora = LoraConfig(r=settings.lora_r, lora_alpha=2 * settings.lora_r, **targets)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
        there = [f".{name}" for name, _ in [*model.named_modules(), *model.named_parameters()]]
        try:
            model = get_peft_model(model, copy.deepcopy(lora))
        except ValueError as error:
            raise InputError(f"--lora_target_modules: {error}") from None
    adapted = [f".{name}".removesuffix(".weight") for name in adapters(model)]
    for target in settings.lora_target_modules + experts:
        present = sum(name.endswith(f".{target}") for name in there)
        found = sum(name.endswith(f".{target}") for name in adapted)
        if found != present or not present:
            raise InputError(f"--lora: of {present} {target} in the model peft adapts {found}; "
                             "--lora_target_modules names linear layers, --lora_experts adds experts")
        say(f"LoRA on {found} x {target}")
    return lora


def adapters(model) -> dict:
    """{name of the adapted weight: peft's layer over it}"""
    found = {}
    for name, part in model.named_modules():
        if hasattr(part, "get_delta_weight"):
            weight = getattr(part, "parameter_name", "weight")
            found[name.replace(".base_layer", "") + "." + weight] = part
    return found


def random_rounding(values, generator):
    """fp32 -> bf16, up or down at random, so that the mean is the fp32 value."""
    noise = torch.randint(2**16, values.shape, generator=generator, device=values.device, dtype=torch.int32)
    rounded = values.view(torch.int32) + noise & -0x10000  # bf16 is the upper half of fp32
    return rounded.view(torch.float32).bfloat16()


class RoundingAdamW(torch.optim.AdamW):
    """AdamW in fp32 that keeps weights and moments in bf16 by random rounding; to the nearest, a step below
    0.2 % of a weight is lost. Parameter and step seed the random numbers: replicas stay equal, a resumed run
    goes on exactly."""

    @torch.no_grad()
    def step(self, closure=None):
        number = 0
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self.update(weight, number, group)
                number += 1

    def update(self, weight, number: int, group: dict) -> None:
        state = self.state[weight]
        if not state:
            state["step"] = torch.zeros(())
            state["exp_avg"] = torch.zeros_like(weight)
            state["exp_avg_sq"] = torch.zeros_like(weight)
        state["step"] += 1
        step = int(state["step"])
        seed = random.Random(f"{number} {step}").getrandbits(32)
        generator = torch.Generator(weight.device).manual_seed(seed)
        tensors = [weight, weight.grad.contiguous(), state["exp_avg"], state["exp_avg_sq"]]
        tensors = [tensor.to_local() if hasattr(tensor, "to_local") else tensor for tensor in tensors]
        pieces = [tensor.view(-1).split(2**22) for tensor in tensors]  # in pieces: fp32 takes memory
        for kept in zip(*pieces):
            new = adamw(*(piece.float() for piece in kept), step, group)
            for old, value in zip((kept[0], *kept[2:]), new):
                old.copy_(random_rounding(value, generator))


def adamw(value, grad, mean, square, step: int, group: dict):
    """One update in fp32: (weight, mean, mean square)."""
    beta1, beta2 = group["betas"]
    mean = mean.lerp(grad, 1 - beta1)
    square = square.lerp(grad * grad, 1 - beta2)
    update = mean / (1 - beta1**step) / ((square / (1 - beta2**step)).sqrt() + group["eps"])
    value = value * (1 - group["lr"] * group["weight_decay"]) - group["lr"] * update
    return value, mean, square


# ------------------------------------------------------------------------------------------------------------
# Training


def token_weights(sample: dict) -> list[float]:
    """What each token counts in the loss: 1 if it is trained. Another loss by one line, on any layout: every
    sample the same, 1 / the number of its trained tokens; the last turn only, 0 before it."""
    return [float(label != -100) for label in sample["labels"]]


def token_loss(log_probs, weights, total, kind="nll"):
    """The loss of one micro-batch: its part of the weighted mean over all tokens of the global batch.

    log_probs, weights: (batch, tokens), of the next token; 0 where there is nothing to train.
    total: the sum of the weights of all tokens of the global batch, over all processes and micro-batches.
    """
    if kind == "dft":  # arXiv 2508.05629
        weights = weights * log_probs.exp().detach()
    return -(weights * log_probs).sum() / total


@dataclass
class Collator:
    """Samples -> tensors (batch, tokens), filled up to the longest, for context parallelism to a multiple:
    its ring cuts a sample into twice as many pieces as there are processes."""

    tok: object
    multiple: int = 1

    def __call__(self, samples: list[dict]) -> dict:
        pad_id = self.tok.eos_token_id if self.tok.pad_token_id is None else self.tok.pad_token_id
        fillers = {"input_ids": pad_id, "labels": -100, "weights": 0.0, "attention_mask": 0}
        longest = max(len(sample["input_ids"]) for sample in samples)
        longest = -(-longest // self.multiple) * self.multiple
        batch = {name: [] for name in fillers}
        for sample in samples:
            tokens = len(sample["input_ids"])
            columns = sample | {"attention_mask": [1] * tokens}
            for name, filler in fillers.items():
                batch[name].append(columns[name] + [filler] * (longest - tokens))
        return {name: torch.tensor(rows) for name, rows in batch.items()}


class Trainer(SFTTrainer):
    """TRL's trainer with the loss above, a schedule without an empty update, the speed in its log, and the
    user's evaluation. A loss that is no number ends the run, as does a checkpoint that does not fit on the
    disk: on all processes, however many wrote their part."""

    def start(self, settings: Settings, plan: Plan, num_samples: int, names: set[str] | None) -> None:
        """names: the base's tensors, which the export must have; None: any."""
        self.settings = settings
        self.plan = plan
        self.num_samples = num_samples
        self.names = names
        self.kernels = set()  # of attention
        self.watch = Watch(settings.eval_command)
        self.add_callback(self.watch)
        add_fused_lm_head(without_adapters(self.model))  # TRL's own computes the entropy as well

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        weights = inputs.pop("weights")
        if "shift_labels" not in inputs:  # else context parallelism has shifted and cut both
            weights = weights[:, 1:]
        if self.aux_loss_enabled:
            inputs["output_router_logits"] = True
        with watched_attention(self.kernels):
            outputs = model(**inputs, use_cache=False, fused_lm_head=True)
        loss = token_loss(outputs.log_probs, weights, num_items_in_batch, self.args.loss_type)
        loss = loss * self.accelerator.num_processes  # which average their gradients
        if self.aux_loss_enabled:
            steps = self.current_gradient_accumulation_steps
            loss = loss + self.router_aux_loss_coef * outputs.aux_loss / steps
        return loss

    def _get_num_items_in_batch(self, batch_samples, device):
        """The `total` of token_loss. The trainer calls it once an update; being given a number, it leaves the
        division by accumulation steps to the loss."""
        total = sum(batch["weights"][:, 1:].sum() for batch in batch_samples).to(device)
        if self.args.world_size > 1:
            total = self.accelerator.gather(total).sum() / self.get_cp_size()
        return total.clamp(min=1e-9)

    def _prepare_context_parallel_inputs(self, model, inputs):
        context, inputs = super()._prepare_context_parallel_inputs(model, inputs)
        if "shift_labels" in inputs:  # token weights are cut as the labels are
            inputs["weights"] = torch.nn.functional.pad(inputs["weights"], (0, 1))[:, 1:].contiguous()
            context.keywords["buffers"].append(inputs["weights"])
            context.keywords["buffer_seq_dims"].append(1)
            context.keywords["no_restore_buffers"].add(inputs["weights"])
        return context, inputs

    def create_scheduler(self, num_training_steps, optimizer=None):
        zero = self.settings.zero_first_update
        self.lr_scheduler = make_schedule(self.args, optimizer or self.optimizer, num_training_steps, zero)
        return self.lr_scheduler

    def _save_checkpoint(self, model, trial):
        folder = Path(self.args.output_dir, f"checkpoint-{self.state.global_step}")
        problem = None
        try:
            super()._save_checkpoint(model, trial)
        except (OSError, SafetensorError, CheckpointException, RuntimeError) as error:
            unwritten = re.search("inline_container|PytorchStreamWriter", str(error))  # torch's words
            if type(error) is RuntimeError and not unwritten:
                raise
            problem = error
        if on_any_process(problem is not None, self.args):
            shutil.rmtree(folder, ignore_errors=True)
            told = " ".join(str(problem or "").split())[:300]
            raise OSError(f"{folder}: no space for it; the same command goes on from the one before. {told}")
        if self.args.process_index == 0:  # what a later run takes for whole
            write_whole(folder / "complete.json", json.dumps(file_sizes(folder)))

    def log(self, logs, start_time=None):
        step = self.state.global_step  # the trainer's one pass is over an order of all the user's
        self.state.epoch = step * self.settings.global_batch_size / self.num_samples
        if "loss" in logs:
            loss = logs["loss"]
            norm = logs.get("grad_norm", 0.0)
            if not math.isfinite(loss) or not math.isfinite(norm):
                raise InputError(f"update {step}: loss {loss}, grad_norm {norm}; the last checkpoint and "
                                 "export are as they were; lower --learning_rate")
            seconds = time.monotonic() - self.watch.step_started
            logs["seconds"] = round(seconds, 4)
            logs["tokens_per_second"] = round(self.plan.tokens[step - 1] / seconds)
            if torch.cuda.is_available():
                logs["memory_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 1)
        super().log(logs, start_time)

    def _evaluate(self, *_, **__) -> dict:
        """{"eval_...": number} of --eval_command on the model so far; {} where it failed, which is said.
        Logged before the update's checkpoint is written: a run that goes on from there has it."""
        folder = Path(self.args.output_dir, "model_to_evaluate")
        export(self.accelerator.unwrap_model(self.model), self.processing_class, folder, self.names)
        metrics = {}
        if self.args.process_index == 0:
            metrics = run_eval_command(self.settings.eval_command, folder, self.state.global_step)
            shutil.rmtree(folder, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self.log(metrics)
        self.control.should_evaluate = False
        return metrics


def run_eval_command(command: str, folder: Path, step: int) -> dict:
    launcher = "RANK LOCAL_ GROUP_ WORLD_SIZE ROLE_ MASTER_ TORCHELASTIC ACCELERATE_ FSDP_ PARALLELISM_"
    ours = tuple(launcher.split())  # of these processes; the command may start its own
    environment = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    environment["CHECKPOINT"] = str(folder)
    result = subprocess.run(command, shell=True, env=environment, stdout=subprocess.PIPE)
    try:
        measured = json.loads(result.stdout.strip().splitlines()[-1])
        numbers = {f"eval_{name}": float(value) for name, value in measured.items()}
    except (IndexError, ValueError, AttributeError, TypeError):
        numbers = {}
    if result.returncode or not numbers:
        say(f"--eval_command after update {step}: exit code {result.returncode}, no JSON object of numbers "
            "in its last line; the training goes on")
    return {} if result.returncode else numbers


def without_adapters(model):
    return model.get_base_model() if hasattr(model, "get_base_model") else model


@contextlib.contextmanager
def watched_attention(kernels: set):
    """Adds to `kernels` which of torch's implementations the first call of attention takes."""
    attention = torch.nn.functional.scaled_dot_product_attention

    def watched(*tensors, **options):
        if not kernels:
            device = tensors[0].device.type
            inside = torch.is_autocast_enabled(device)  # the choice is made after its cast
            dtype = torch.get_autocast_dtype(device) if inside else tensors[0].dtype
            computed = [tensor.to(dtype) for tensor in tensors]
            kernel = SDPBackend(torch._fused_sdp_choice(*computed, **options)).name
            kernels.add(kernel)
            slow = torch.cuda.is_available() and kernel not in ("CUDNN_ATTENTION", "FLASH_ATTENTION")
            say(f"attention: {kernel}{', slow: is this the torch of requirements.txt?' if slow else ''}")
        return attention(*tensors, **options)

    if not kernels:
        torch.nn.functional.scaled_dot_product_attention = watched
    try:
        yield
    finally:
        torch.nn.functional.scaled_dot_product_attention = attention


def on_any_process(happened: bool, args: SFTConfig) -> bool:
    if args.world_size == 1:
        return happened
    flag = torch.tensor(float(happened), device=args.device)
    torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
    return bool(flag)


class Watch(TrainerCallback):
    """Times the updates and says how far a long one is; on SIGTERM (SLURM takes the machine away) saves after
    the running update and stops."""

    def __init__(self, eval_command: str | None):
        self.eval_command = eval_command
        self.stop = False
        signal.signal(signal.SIGTERM, lambda *_: setattr(self, "stop", True))
        if "TORCHELASTIC_RUN_ID" in os.environ and "TORCH_ELASTIC_SHUTDOWN_TIMEOUT" not in os.environ:
            say("on SIGTERM the launcher kills after 30 s; for longer updates export "
                "TORCH_ELASTIC_SHUTDOWN_TIMEOUT=900")

    def on_step_begin(self, args, state, control, **kwargs):
        self.step_started = self.said = time.monotonic()
        self.micro_batches = 0

    def on_substep_end(self, args, state, control, **kwargs):
        self.micro_batches += 1
        if time.monotonic() - self.said > 60:
            self.said = time.monotonic()
            say(f"update {state.global_step + 1}: {self.micro_batches} of {args.gradient_accumulation_steps} "
                f"micro-batches, {self.said - self.step_started:.0f} s")

    def on_step_end(self, args, state, control, **kwargs):
        self.stop = on_any_process(self.stop, args)  # the signal reaches them at different updates
        wanted = self.eval_command and not self.stop  # else saving comes first
        control.should_evaluate = bool(wanted) and state.global_step % (args.eval_steps or 1) == 0
        if self.stop:
            control.should_save = control.should_training_stop = True


# ------------------------------------------------------------------------------------------------------------
# Export


def base_names(model_name_or_path: str) -> set[str]:
    """Tensor names of a checkpoint, without its weights."""
    index_name = "model.safetensors.index.json"
    index = cached_file(model_name_or_path, index_name, _raise_exceptions_for_missing_entries=False)
    if index:
        return set(json.loads(Path(index).read_text())["weight_map"])
    with safe_open(cached_file(model_name_or_path, "model.safetensors"), "pt") as file:
        return set(file.keys())


def valid_generation_config(model: str) -> GenerationConfig | None:
    """The base's, or None without one. save_pretrained refuses a temperature without do_sample, which many
    have."""
    try:
        config = GenerationConfig.from_pretrained(model)
    except OSError:
        return None
    with contextlib.suppress(ValueError):
        config.validate(strict=True)
        return config
    config.do_sample = True
    say("generation_config.json has temperature, top_p or top_k without do_sample: the export says true")
    try:
        config.validate(strict=True)
    except ValueError as error:
        raise InputError(f"{model}/generation_config.json: {error}") from None
    return config


def try_export(model, tok, settings: Settings, args: SFTConfig) -> set[str]:
    """Before the first update, all that the export will need: a valid generation config, the tokenizer, the
    base's tensor names (returned), room on the disk. Raises InputError."""
    valid_generation_config(settings.model_name_or_path)
    names = base_names(settings.model_name_or_path)
    tied = model.all_tied_weights_keys
    state = {name: part for name, part in model.state_dict().items() if name not in tied}
    check_names(model, set(revert_weight_conversion(model, state)), names)
    with tempfile.TemporaryDirectory() as folder:
        save_tokenizer(tok, folder)
    there = next(folder for folder in Path(args.output_dir, "x").parents if folder.exists())
    needed = 2 * model.num_parameters()
    free = shutil.disk_usage(there).free
    if free < needed:
        raise InputError(f"--output_dir {args.output_dir}: the export takes {needed / 1e9:.1f} GB, "
                         f"{free / 1e9:.1f} are free")
    return names


def check_names(model, written: set[str], names: set[str] | None) -> None:
    """The export has the tensors of the base, but for tied ones and what transformers never loads (GLM-4.5's
    MTP layer)."""
    if names is None:
        return
    ignored = re.compile("|".join(model._keys_to_ignore_on_load_unexpected or ["$^"]))
    lost = {name for name in names - written if not ignored.search(name)}
    wrong = sorted(lost - model.all_tied_weights_keys.keys() | written - names)
    if wrong:
        raise InputError(f"the export's tensors are not the base's: {len(wrong)} differ, such as {wrong[0]}")


def save_tokenizer(tok, folder) -> None:
    """With --chat_template_kwargs as the template's defaults: whoever serves it renders what was trained.
    With TRL's description of the answers, where it has one for this template: vLLM's parsers "hf" read it."""
    switches = tok.template_kwargs
    tok = copy.copy(tok)
    with contextlib.suppress(ValueError):  # no description of this template
        described = add_response_schema(copy.copy(tok)).response_template
        names = {"reasoning_content": "thinking"}  # vLLM's word
        fields = {names.get(name, name): rule for name, rule in described["fields"].items()}
        tok.response_template = described | {"fields": fields}
    for name, value in switches.items():
        switch = f"{{%- if {name} is not defined %}}{{%- set {name} = {value!r} %}}{{%- endif %}}"
        tok.chat_template = switch + tok.chat_template
    tok.save_pretrained(folder)


def gathered(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def weights_to_export(model) -> dict:
    """bf16, adapters merged, in the host's memory. On every process: shards are gathered one by one."""
    state = {}
    layers = adapters(model)
    for name, tensor in model.state_dict().items():
        name = name.replace(".base_layer", "")
        if name in model.all_tied_weights_keys or ".lora_" in name:  # the base does not store tied ones twice
            continue
        router_bias = name.endswith("e_score_correction_bias")  # fp32 in the base
        as_it_is = router_bias or name in layers or not tensor.is_floating_point()
        dtype = tensor.dtype if as_it_is else torch.bfloat16
        tensor = gathered(tensor.detach().to(dtype))
        if name in layers:
            tensor = tensor.float() + gathered(layers[name].get_delta_weight("default"))
            tensor = tensor.to(torch.bfloat16)
        state[name] = tensor.cpu()
    return state


def export(model, tok, output_dir, names=None) -> None:
    """Write the model; an old one stays until this is complete. names: the base's tensors."""
    model = without_adapters(model)
    state = weights_to_export(model)
    if not is_first_process():
        return
    partial = Path(output_dir, "export.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        model.save_pretrained(partial, state_dict=state, max_shard_size="5GB")
        save_tokenizer(tok, partial)
        config = json.loads((partial / "config.json").read_text()) | {"dtype": "bfloat16", "use_cache": True}
        (partial / "config.json").write_text(json.dumps(config, indent=2))
        check_names(model, base_names(partial), names)
        for old in Path(output_dir).glob("*.safetensors*"):
            if not (partial / old.name).exists():
                old.unlink()
        for file in sorted(partial.iterdir(), key=lambda file: file.name == "config.json"):  # it comes last
            file.replace(Path(output_dir, file.name))
    finally:
        shutil.rmtree(partial, ignore_errors=True)


# ------------------------------------------------------------------------------------------------------------
# One run, and going on with it


def record_of_run(settings: Settings, args: SFTConfig, facts: dict) -> dict:
    """What recipe.json says; `run`: what must be the same when a run goes on."""
    everything = asdict(settings) | args.to_dict()
    script = Path(__file__)
    commit = ["git", "-C", str(script.parent), "describe", "--always", "--dirty", "--abbrev=40"]
    packages = ("torch", "transformers", "trl", "accelerate", "datasets")
    run = {name: value for name, value in everything.items() if name not in HARMLESS}
    run["sharded"] = os.environ.get("ACCELERATE_USE_FSDP") == "true"  # so are its checkpoints
    run["train_file_sha256"] = data = sha256(Path(settings.train_file))
    run["script_sha256"] = sha256(script)
    run["base_sha256"] = base_sha256(settings.model_name_or_path)
    return {
        "settings": everything,
        "run": json.loads(json.dumps(run)),
        "versions": {name: version(name) for name in packages},
        "python": sys.version.split()[0],
        "commit": subprocess.run(commit, capture_output=True, text=True).stdout.strip() or None,
        "train_file_sha256": data,
        "processes": args.world_size,
        "chat_template_kwargs": settings.chat_template_kwargs or {},
        "data": facts,
    }


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def base_sha256(model: str) -> str:
    """The Hub's commit, as its files come one by one; else of small files and weights' names and sizes."""
    config = cached_file(model, "config.json")
    if commit := extract_commit_hash(config, None):
        return commit
    files = Path(config).parent.iterdir()
    files = sorted(file for file in files if file.suffix in (".json", ".jinja", ".safetensors"))
    known = []
    for file in files:
        size = file.stat().st_size
        known.append((file.name, size, sha256(file) if size < 2**26 else ""))
    return hashlib.sha256(json.dumps(known).encode()).hexdigest()


def file_sizes(folder: Path) -> dict[str, int]:
    files = [file for file in folder.rglob("*") if file.is_file() and file.name != "complete.json"]
    return {str(file.relative_to(folder)): file.stat().st_size for file in files}


def is_whole(checkpoint: Path) -> bool:
    """A kill leaves a folder without complete.json, a lost disk one with files of other sizes."""
    try:
        expected = json.loads((checkpoint / "complete.json").read_text())
    except (OSError, ValueError):
        return False
    return file_sizes(checkpoint) == expected


def last_checkpoint(args: SFTConfig) -> Path | None:
    """The newest whole one of the output folder, or the one that the user names."""
    if args.resume_from_checkpoint:
        named = Path(args.resume_from_checkpoint)
        if not is_whole(named):
            raise InputError(f"--resume_from_checkpoint {named}: not a whole checkpoint of 03_sft.py")
        return named
    folders = Path(args.output_dir).glob("checkpoint-[0-9]*")
    for folder in sorted(folders, key=lambda folder: -int(folder.name.split("-")[1])):
        if is_whole(folder):
            return folder
        say(f"{folder} was cut short or damaged, so the run does not go on from it")
    return None


def refuse_another_run(output_dir: Path, run: dict) -> None:
    """What a run of other settings, data, script or base left in the folder is not overwritten, nor gone on
    with."""
    file = output_dir / "run.json"
    kept = ("checkpoint-*/complete.json", "recipe.json", "*.safetensors")
    if not any(any(output_dir.glob(pattern)) for pattern in kept):
        return
    before = json.loads(file.read_text()) if file.exists() else {}
    changed = [name for name in run.keys() | before.keys() if before.get(name) != run.get(name)]
    if changed:
        name = min(changed)
        change = f"{name} was {before.get(name)!r}, is {run.get(name)!r}" if before else "it has no run.json"
        raise InputError(f"{output_dir} is of another run ({change}); "
                         "delete it or choose another --output_dir")


def begin_run(output_dir: Path, record: dict, samples: list[dict], tok) -> None:
    """The files that say what is trained; checkpoints that no run goes on from are deleted."""
    if not is_first_process():
        return
    write_whole(output_dir / "run.json", json.dumps(record["run"], indent=2))
    write_samples(output_dir, samples, tok)
    for folder in output_dir.glob("checkpoint-[0-9]*"):
        if not is_whole(folder):
            shutil.rmtree(folder)


def write_samples(output_dir: Path, samples: list[dict], tok) -> None:
    if is_first_process():
        file = output_dir / "tokenized.jsonl"
        write_whole(file, "".join(json.dumps(sample) + "\n" for sample in samples))
        save_tokenizer(tok, output_dir)
        say(f"wrote {file}: what is trained; recipes/view.py shows it")


def rehearse(settings, args, config, layout, samples, tok, lora) -> None:
    """Train two updates of one sample on the base's first layers, with random weights, and on a layer more:
    what transformers, TRL or peft refuse is refused here, and the difference tells a sample's seconds."""
    text = config.get_text_config()
    layers = getattr(text, "first_k_dense_replace", 0) + 1  # GLM-4.5's first ones have no experts
    layers = max(1, min(layers, text.num_hidden_layers - 1))
    needed = 16 * model_without_weights(first_layers(config, layers + 1)).num_parameters()
    free = min(psutil.virtual_memory().available, 1e10) if args.use_cpu else torch.cuda.mem_get_info()[0]
    if args.world_size > 1 or needed > 0.7 * free:
        return say(f"training is not tried: it takes one process and {needed / 1e9:.1f} GB of a free GPU")
    sample = sorted(samples, key=lambda sample: len(sample["labels"]))[len(samples) // 2]
    tokens = min(len(sample["labels"]), 512) if args.use_cpu else len(sample["labels"])
    sample = {name: sample[name][-tokens:] for name in ("input_ids", "labels")}
    plan = Plan([0, 0], steps=2, accumulated=1, rates=[], tokens=[tokens, tokens])
    alone = replace(settings, eval_command=None)
    few = copy.deepcopy(args)
    vars(few).update(max_steps=2, logging_steps=1, per_device_train_batch_size=1, save_steps=0)
    vars(few).update(report_to=[], disable_tqdm=True)
    options = dict(dtype=storage_type(settings, args, layout), attn_implementation="sdpa")
    seconds = []
    try:
        for number in (layers, layers + 1):
            model = AutoModelForCausalLM.from_config(first_layers(config, number), **options)
            trainer = build_trainer(alone, copy.deepcopy(few), model, layout, plan, [sample], tok, lora)
            trainer.remove_callback(PrinterCallback)
            trainer.train()
            seconds.append(trainer.state.log_history[1]["seconds"])
    except (AttributeError, ImportError, RuntimeError, TypeError, ValueError) as error:
        raise InputError(f"no run with these settings: {type(error).__name__}: {error}") from None
    whole = seconds[0] + (text.num_hidden_layers - layers) * max(0, seconds[1] - seconds[0])
    say(f"one sample of {tokens:,} tokens takes {whole:.3g} s on {args.device}, measured on {layers} and "
        f"{layers + 1} of {text.num_hidden_layers} layers")


def first_layers(config, number: int):
    config = copy.deepcopy(config)
    text = config.get_text_config()
    text.num_hidden_layers = min(number, text.num_hidden_layers)
    for name in ("layer_types", "mlp_layer_types"):
        if getattr(text, name, None):
            setattr(text, name, getattr(text, name)[:number])
    return config


def build_trainer(settings, args, model, layout, plan, samples, tok, lora, names=None) -> Trainer:
    own_the_order(args, layout, plan)
    if args.bf16:  # autocast does not know the experts' product (pytorch #174763) and would leave it in fp32
        device = "cpu" if args.use_cpu else "cuda"
        torch.library.register_autocast("aten::_grouped_mm", device, torch.bfloat16)
    optimizer = None
    if settings.bf16_master and not settings.lora:  # adapters are fp32
        betas = (args.adam_beta1, args.adam_beta2)
        optimizer = RoundingAdamW, dict(lr=args.learning_rate, betas=betas, eps=args.adam_epsilon)
    columns = [sample | {"weights": token_weights(sample)} for sample in samples]
    trainer = Trainer(
        model,
        args,
        train_dataset=Dataset.from_list(columns).select(plan.order),
        processing_class=tok,
        data_collator=Collator(tok, 2 * layout.cp if layout.cp > 1 else 1),
        peft_config=copy.deepcopy(lora),
        optimizer_cls_and_kwargs=optimizer,
    )
    trainer.start(settings, plan, len(samples), names)
    if settings.lora and layout.fsdp and not model.config.tie_word_embeddings:
        # What is added to a sharded model is not sharded: make it equal everywhere, average its gradients
        trainer._sync_replicated_trainable_parameters(trainer.model)
    return trainer


def own_the_order(args: SFTConfig, layout: Layout, plan: Plan) -> None:
    """It is made: nothing may shuffle, cut or tokenise again."""
    args.num_train_epochs = 1
    args.train_sampling_strategy = "sequential"
    args.max_length = None
    args.dataset_kwargs = {"skip_prepare_dataset": True}
    args.remove_unused_columns = False
    args.gradient_accumulation_steps = plan.accumulated
    args.save_strategy = SaveStrategy.STEPS if args.save_steps else SaveStrategy.NO
    args.logging_steps = min(args.logging_steps, plan.steps)
    if layout.fsdp:  # else every device keeps whole gradients until the last micro-batch
        args.accelerator_config.gradient_accumulation_kwargs = {"sync_each_batch": True}


def finish(trainer: Trainer, record: dict, first_step: int, seconds: float) -> None:
    """Export, then what says that the run is over."""
    output_dir = Path(trainer.args.output_dir)
    model = trainer.accelerator.unwrap_model(trainer.model)
    export(model, trainer.processing_class, output_dir, trainer.names)
    if trainer.args.process_index > 0:
        return
    log = [row for row in trainer.state.log_history if "train_runtime" not in row]
    losses = [row["loss"] for row in log if "loss" in row]
    record |= {"steps": trainer.plan.steps, "seconds": round(seconds, 1), "loss": losses, "log": log}
    record["attention"] = sorted(trainer.kernels)
    write_whole(output_dir / "recipe.json", json.dumps(record, indent=2))
    tokens = sum(trainer.plan.tokens[first_step:])
    print(f"steps: {trainer.plan.steps}\nloss: {losses[0]:.4f} -> {losses[-1]:.4f}\nseconds: {seconds:.1f}\n"
          f"tokens_per_second: {tokens / seconds:.0f}\nmodel: {output_dir}")


def main(settings: Settings, args: SFTConfig) -> None:
    settings.lora |= settings.lora_experts
    settings.chat_template_kwargs = read_switches(settings)
    check_flags(settings, args)
    layout = read_layout(args)
    tok = load_tokenizer(settings.model_name_or_path, settings.chat_template_kwargs)
    samples, facts = load_samples(settings, args, tok)
    record = record_of_run(settings, args, facts)
    output_dir = Path(args.output_dir)
    refuse_another_run(output_dir, record["run"])
    resume = last_checkpoint(args)
    if resume:  # with the tokens of the day on which it began: templates write the date
        refuse_another_run(resume.parent, record["run"])
        samples = [sample for _, sample in read_jsonl(resume.parent / "tokenized.jsonl")]
    config = load_config(settings.model_name_or_path, facts["longest"])
    plan = plan_updates(samples, settings, args, layout)
    show_plan(plan, settings, args, layout)
    if args.router_aux_loss_coef and not hasattr(config.get_text_config(), "router_aux_loss_coef"):
        raise InputError(f"--router_aux_loss_coef: a {config.model_type} has no such loss; leave it out")
    names = try_export(model_without_weights(config), tok, settings, args)
    lora = lora_config(settings, config) if settings.lora else None
    if settings.dry_run:
        rehearse(settings, args, config, layout, samples, tok, lora)
        return write_samples(output_dir, samples, tok)
    if (output_dir / "recipe.json").exists():
        return say(f"{output_dir / 'recipe.json'}: this run is finished; delete the folder to repeat it")
    begin_run(output_dir, record, samples, tok)
    model = load_model(settings, args, config, layout, resume)
    trainer = build_trainer(settings, args, model, layout, plan, samples, tok, lora, names)
    say(f"going on from {resume}" if resume else "training")
    started = time.monotonic()
    trainer.train(resume_from_checkpoint=resume and str(resume))
    if trainer.watch.stop:
        say(f"stopped by SIGTERM after update {trainer.state.global_step}; the same command goes on there")
        sys.exit(143)
    first_step = int(resume.name.split("-")[1]) if resume else 0
    finish(trainer, record, first_step, time.monotonic() - started)


if __name__ == "__main__":
    try:
        main(*read_settings(make_parser()))
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    except (InputError, OSError, SafetensorError) as error:  # the last: a full disk
        if os.environ.get("LOCAL_RANK", "0") != "0":  # the first tells it; the launcher then ends the others
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(2))
            time.sleep(30)
        print(f"{Path(__file__).name}: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
