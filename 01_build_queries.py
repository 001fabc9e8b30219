"""Stage 1: tasks. Real-world queries are read; others are written from pull requests, issues or papers.

    python 01_build_queries.py --real queries/ --repos clones/*               # 60 real + 18 mined
    python 01_build_queries.py --rule paper --repos clones/*                  # the paper's own funnel
    python 01_build_queries.py --papers papers/ --repos clones/click --dry_run # shows a prompt, calls nobody

Reads   --real      tasks, a line each as in data/queries.jsonl, or a folder of such files and of *.md: YAML
                    front matter (domain, workspace, check, rubric ...; turns: if several), then the query
        --repos     git clones with history (git clone --mirror brings refs/pull: which numbers are PRs)
        --papers    a folder of *.md and *.txt, one paper each
        --issues    issues of these clones: gh issue list --json number,title,body,url
Writes  data/queries.jsonl            a task a line: {"query_id", "domain", "subdomain", "source", "turns":
                                      [{"query", "check"?, "rubric"?, "solution"?}], "workspace"?, "private"?,
                                      "venv"?, "needs"?, "meta"}; its first n lines are a fair subset
        data/rejected_queries.jsonl   every other one, with "reasons"
        data/queries.settings.json    settings, versions, inputs
        data/workspaces/, private/    the tree each task starts from; what only its check may see
        data/work/                    N_step.jsonl, written anew by each step: 4_check.jsonl is to be
                                      reviewed, reviews.jsonl has what reviewers said; environments/, one a
                                      repository; verifications.jsonl and answers.jsonl are only appended to

A pull request becomes a task only if 04_eval.py, beside this file, says so: its solution passes its check
three times of three and an agent that does nothing fails it three times of three, in 04's own sandbox.
"""
import ast
import asyncio
import base64
import difflib
import fcntl
import hashlib
import importlib.metadata
import json
import keyword
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import warnings
import zlib
from argparse import RawDescriptionHelpFormatter
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random
from typing import Literal

import pydantic
import yaml
from tqdm import tqdm
from trl import TrlParser

HERE = Path(__file__).resolve().parent
EVALUATE = HERE / "04_eval.py"
# The paper's ten categories (appendix B) are the sub-domains of its two domains.
CODING = ("algorithm", "application", "llm", "backend", "ui", "frontend", "build", "debugging")
DOMAINS = dict.fromkeys(CODING, "vibe_coding") | dict.fromkeys(("research", "data_analysis"), "research")
# The kind of a changed file is the first pattern that its path matches; anything else is "other".
KINDS = {
    "generated": r"(^|/)(_?vendor(ed)?|third_party|node_modules|dist)/|_pb2\.py$|\.min\.js$|\.lock$",
    "test": r"(?i)(^|/)(((unit|functional|integration)[_-]?)?tests?|testing|testdata|specs?|__tests__)/"
            r"|(^|/)(test_[^/]*|conftest\.py|tests?\.\w+)$|[._](tests?|spec)\.\w+$",
    "code": r"\.(py|[cm]?jsx?|[cm]?tsx?|go|rs|java|kt|c|h|cc|cpp|rb|php|jl)$",
}
LANGUAGES = {"python": r"\.py$", "node": r"\.[cm]?[jt]sx?$", "go": r"\.go$", "rust": r"\.rs$"}
NOT_RUN = r"(^|/)(conftest|__init__)\.py$|\.d\.ts$"
NOT_RUN += r"|(^|/)(fixtures?|support|helpers?|(test)?data|snapshots?|common)/"
RUNNERS = {"python": "pytest", "node": "node", "go": "go", "rust": "cargo"}  # unless the set-up names another
IN_FILE_TEST = r"(?m)^[+@ -].*(#\[(\w+::)?test\]|#\[cfg\(test\)\]|\bmod tests?\b)"  # Rust's
TOOLCHAINS = {"python": "python3", "node": "npm", "go": "go", "rust": "cargo"}
BOT = r"(?i)\[bot\]|dependabot|renovate|pre-commit-ci|greenkeeper|pyup-bot"
LICENCES = {
    None: "Business Source License|Functional Source License|Commons Clause",  # they name others as well
    "MIT": "Permission is hereby granted, free of charge", "Apache-2.0": "Apache License",
    "BSD": "Redistribution and use in source and binary forms", "ISC": "Permission to use, copy, modify, and",
    "Unlicense": "free and unencumbered software", "Zlib": "This software is provided 'as-is'",
    "MPL-2.0": "Mozilla Public License", "PSF": "PYTHON SOFTWARE FOUNDATION LICENSE"}
SECRET = (
    r"\bsk-(?=[\w-]*\d)[\w-]{20,}|\bgh[pousr]_\w{30,}|\bgithub_pat_\w{22,}|\bglpat-[\w-]{20,}"
    r"|\bAKIA[0-9A-Z]{16}|\bhf_\w{30,}|\bAIza[\w-]{35}|\bxox[abprs]-[\w-]{10,}|BEGIN [A-Z ]*PRIVATE KEY"
    r"|\b(?!git@)[\w.+-]+@(?!example\.)[\w-]+\.[a-z]{2,}"
)
BENCHMARKS = "astropy django flask matplotlib pylint pytest requests scikit-learn seaborn sphinx sympy xarray"
TEXT_RULES = {  # after SWE-bench Lite: a statement must stand alone
    "a link": r"https?://|www\.", "an issue's number": r"(?<![\w&])#[1-9]\d{0,5}\b(?!\w)",
    "a commit": r"(?<![\w#-])(?=[a-f]*\d)(?=\d*[a-f])[0-9a-f]{7,40}(?![\w-])",
    "an image": r"\.(png|jpe?g|gif|svg)\b",
    "the tests": r"(?i)\b(pytest|unittest|unit tests?|test suite|hidden tests?)\b"}
NOT_DRAWN = "not among the 100 drawn of its repository"
UNGRADED = "neither a check nor a rubric"
BEYOND = "beyond --max_candidates"
UNDECIDED = "could not be decided"
OVER_QUOTA = "like those selected, or over a quota"
ENGLISH = set("the a an to of and is are in it that when should be not with for as this on if or by".split())
# What to do about the commonest reason, said in the last line of a run that leaves nothing.
REMEDIES = {
    "environment": "install what is missing with --setup_command",
    "no test file changed": "mine repositories whose pull requests bring tests, or use --rule paper",
    "its tests stand in the code file": "mine repositories whose tests have files of their own (tests/)",
    "no permissive licence": "mine repositories with a permissive licence",
    "its tests pass without the change": "mine more pull requests",
    "the answer": "use a stronger --model, or --retry_bad",
    "leaks": "use a stronger --model, or --retry_bad with another one",
    "the endpoint refused it": "give another --model or --base_url, with --retry_bad"}


def setting(default, text):
    return field(default=default, metadata={"help": text})


def several(default, text):
    """A list or, in YAML only, a mapping."""
    return field(default_factory=lambda: type(default)(default), metadata={"help": text})


@dataclass
class Settings:
    real: str | None = setting(None, "Real-world queries: JSONL, or a folder of *.jsonl and *.md.")
    repos: list[str] = several([], "Git clones to mine.")
    papers: str | None = setting(None, "A folder of papers (*.md, *.txt) that become research queries.")
    issues: str | None = setting(None, "JSON of issues: gh issue list --json number,title,body,url.")
    output_file: str = setting("data/queries.jsonl", "Tasks; the rest goes beside it.")
    step: Literal["all", "mine", "verify", "write", "check", "select"] = setting(
        "all", "One step alone, or all.")
    # mine
    rule: Literal["tests", "paper"] = setting("tests", "One code file and its tests; or the paper's funnel.")
    deny: list[str] = several(BENCHMARKS.split(), "Repositories of benchmarks, refused (SWE-bench's).")
    max_tokens: int = setting(2000, "Longest code and test diff; a token is 4 characters.")
    max_candidates: int = setting(200, "PRs to verify and write, newest of each clone first.")
    chain: int = setting(1, "Join up to so many dependent PRs into the turns of one task.")
    seed: int = setting(100, "Draws the paper rule's 100 pull requests a repository.")
    # verify
    languages: str = setting(str(HERE / "recipes/languages"), "Set-ups of environments, and check.py.")
    setup_command: str | None = setting(None, "Makes $ENVIRONMENT, run in a repository's tree.")
    setup_seconds: int = setting(900, "Seconds that making an environment may take.")
    test_command: str | None = setting(None, "Runs {files}, writes JUnit XML to {report}.")
    timeout: int = setting(120, "Seconds that a test run may take.")
    verify_runs: int = setting(3, "Runs of each task's solution and of doing nothing; 0: none.")
    # write
    model: str = setting("gpt-5", "Writes the queries (paper: GPT-5).")
    judge_model: str | None = setting(None, "Also asked whether a query leaks its solution.")
    base_url: str | None = setting(None, "OpenAI-compatible endpoint; key: OPENAI_API_KEY.")
    request: dict = several({}, "In YAML: goes into every request, e.g. {max_tokens: 4000}.")
    retry_bad: bool = setting(False, "Ask again where the answer was refused or is no draft.")
    concurrency: int = setting(8, "Calls under way at a time.")
    call_seconds: int = setting(300, "Longest wait for an answer; tried seven times.")
    price_in: float = setting(0, "Dollars per million tokens in.")
    price_out: float = setting(0, "Dollars per million tokens out.")
    max_usd: float | None = setting(None, "Most dollars; a call under way counts with 4,000 tokens.")
    dry_run: bool = setting(False, "Print a prompt and the number of calls, and stop there.")
    # check
    benchmark: list[str] = several([], "Files or folders: who shares 13 words in a row is rejected.")
    # select
    reject: Literal["any", "majority"] = setting("any", "Reviewers' rejections that count.")
    n_real: int = setting(60, "Real-world and research queries to select (paper: 60).")
    n_pr: int = setting(18, "Pull-request queries to select (paper: 18).")
    max_per_repo: int = setting(2, "Most pull-request queries from one repository.")


# Settings of --rule tests alone: the paper's rule runs nothing, and draws 100 pull requests a repository
OF_TESTS = ("max_tokens", "max_candidates", "chain", "setup_command", "setup_seconds", "test_command")


class InputError(ValueError):
    """A user's mistake, told in one line that names file, line, field and remedy; exit code 2."""


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


def write_jsonl(path, rows):
    """Write rows under a temporary name, then rename: a reader sees the old file or the whole new one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    try:
        with open(partial, "w") as file:
            for row in rows:
                file.write(json.dumps(row) + "\n")  # ASCII: a lone surrogate in a log cannot break the file
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def append_jsonl(path, row):
    """Add a line under a lock; what a killed writer left of its last line is cut off first."""
    with open(path, "ab+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(max(0, file.seek(0, os.SEEK_END) - 1))
        if file.read(1) not in (b"", b"\n"):
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)
        file.write(json.dumps(row).encode() + b"\n")


def digest(*parts):
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def by_key(path):
    """Rows of an append-only file by their key, the last one counts; {} where there is no file yet."""
    return {row.get("key"): row for row in rows_if_there(Path(path))}


def step_rows(work, name):
    """The rows that a step left, from its file N_step.jsonl."""
    path = work / f"{name}.jsonl"
    if not path.exists():
        raise InputError(f"{path} is missing: run --step {name[2:]} first")
    return [row for _, row in read_jsonl(path)]


def open_rows(rows):
    """Those that have no reason against them."""
    return [row for row in rows if not row["reasons"]]


def is_mined(row):
    return "pr" in row


# ---- mine: real-world queries, papers, issues, and pull requests by one `git log` a clone ----
# A source yields rows. What the writer turns into a query is a row's "material": "text" may be told, "secret"
# is the solution to be hidden, "tests" is what will decide, "asked" are the texts that the tests ask for.


class Turn(pydantic.BaseModel, extra="forbid"):
    query: str = pydantic.Field(pattern=r"\w")
    check: str | None = pydantic.Field(None, pattern=r"\S")
    rubric: list[pydantic.constr(pattern=r"\w")] | None = pydantic.Field(None, min_length=1)
    solution: str | None = None

    @pydantic.model_validator(mode="after")
    def graded(self):
        if not self.check and not self.rubric:
            raise ValueError("a turn needs a check (a shell command), a rubric (a list), or both")
        return self


class Task(pydantic.BaseModel, extra="forbid"):
    query_id: str = pydantic.Field(pattern=r"^\w[\w.@#-]{0,149}$")  # also a file name
    domain: Literal["vibe_coding", "research"]
    subdomain: str = ""
    source: str = "real"
    turns: list[Turn] = pydantic.Field(min_length=1)
    workspace: str | None = pydantic.Field(None, min_length=1)
    private: str | None = None
    venv: str | None = None
    system: str | None = None
    tools: list[dict] | None = None
    image: str | None = None
    needs: list[str] | None = None
    meta: dict = {}


def real_queries(source):
    """Real-world queries of a file or of all files of a folder."""
    source = Path(source)
    paths = sorted(path for path in source.iterdir() if path.is_file()) if source.is_dir() else [source]
    tasks = []
    faults = []
    for path in paths:
        if path.suffix in (".md", ".jsonl") or path == source:
            tasks += tasks_in(path, faults)
        else:
            print(f"left out: {path}: neither *.md nor *.jsonl")
    if faults:
        raise InputError("\n".join(faults))  # a line a fault: all are named in one run
    if not tasks:
        raise InputError(f"{source}: no query in it: expected JSONL or *.md files")
    return tasks


def tasks_in(path, faults):
    """Yield the tasks of a file, each checked field by field; what is wrong is added to faults."""
    try:
        for where, row in [(path, read_markdown(path))] if path.suffix == ".md" else read_jsonl(path):
            try:
                yield checked_task(where, row, path.parent) | {"reasons": []}
            except InputError as error:
                faults.append(str(error))
    except InputError as error:  # what comes after it cannot be read
        faults.append(str(error))


def checked(form, where, row):
    """The row as a pydantic form has it, without nulls; raises InputError that names the field."""
    try:
        return form(**row).model_dump(mode="json", exclude_none=True)
    except pydantic.ValidationError as error:
        first = min(error.errors(), key=lambda one: one["type"] != "extra_forbidden")
        raise InputError(f"{where}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    except (TypeError, ValueError) as error:  # a number as the name of a field, an alias of itself
        raise InputError(f"{where}: cannot be written as JSON: {error}") from None


def checked_task(where, row, folder):
    """The task as a dict with absolute paths; raises InputError that names the field."""
    task = checked(Task, where, row)
    for name in ("workspace", "private", "venv"):
        if name in task:
            path = Path(os.path.abspath(folder / task[name]))
            if not path.is_dir() and not (name == "workspace" and path.suffix == ".tar" and path.is_file()):
                what = "is neither a folder nor a .tar" if path.exists() else "does not exist"
                raise InputError(f"{where}: {name}: {path} {what}")
            task[name] = str(path)
    return task


def read_markdown(path):
    """A task from a markdown file; check, rubric, solution and licence may stand in the front matter."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        parts = re.fullmatch(r"---[ \t]*\n(.*?)^---[ \t]*(?:\n(.*))?", text, re.S | re.M)
        task = yaml.safe_load(parts[1]) if parts else None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: {' '.join(str(error).split())}") from None
    if not isinstance(task, dict):
        raise InputError(f"{path}: must begin with YAML front matter between two lines of ---")
    if "turns" not in task:
        graded = {key: task.pop(key) for key in ("check", "rubric", "solution") if key in task}
        task["turns"] = [{"query": (parts[2] or "").strip()} | graded]
    if "licence" in task and isinstance(task.setdefault("meta", {}), dict):
        task["meta"]["licence"] = task.pop("licence")
    return {"query_id": folder_name(path.stem)} | task


def folder_name(text):
    """Of a text what a query_id may have."""
    return re.sub(r"[^\w.@#-]", "-", text).lstrip(".@#-")[:150]


def source_row(query_id, domain, subdomain, source, text, **meta):
    """A query is to be written from a text; its solution is nobody's secret, a rubric judges the answer."""
    text = text[:40_000].encode(errors="replace").decode()  # half a character
    material = {"text": text, "secret": "", "tests": "", "asked": []}
    row = {"query_id": folder_name(query_id) or source, "domain": domain, "subdomain": subdomain}
    return row | {"source": source, "turns": [], "meta": meta, "reasons": [], "material": material}


def papers(folder):
    """A research query from every *.md and *.txt of a folder."""
    paths = sorted(path for path in Path(folder).glob("*") if path.suffix in (".md", ".txt"))
    if not paths:
        raise InputError(f"--papers {folder}: no *.md or *.txt in it; convert PDFs to text first (pdftotext)")
    for path in paths:
        text = path.read_text(encoding="utf-8", errors="replace")
        yield source_row(path.stem, "research", "research", "paper", text, paper=path.name)


def issues(path, clones):
    """A query on the newest tree from every issue of `gh issue list --json number,title,body,url`.

    clones: {owner/name: clone}; an issue of another repository has no tree to work on.
    """
    address = re.compile(r".*/([^/]+)/([^/]+?)(?:/-)?/(\w+)/(\d+)/?")
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
        found = [(*address.fullmatch(one["url"]).groups(), one["title"], one["body"] or "") for one in found]
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise InputError(f"--issues {path}: no list of number, title, body, url: {error!r}") from None
    for owner, name, kind, number, title, body in found:
        if kind != "issues":  # GitHub's REST interface lists pull requests too
            continue
        repo = f"{owner}/{name}"
        text = f"{title}\n\n{body}"
        row = source_row(f"{owner}__{name}-issue-{number}", None, "", "issue", text, repo=repo)
        if repo in clones:
            row["tree"] = [clones[repo], head_of(clones[repo])]
        else:
            row["reasons"].append("its repository is not among --repos")
        yield row


def git_command(clone, *args):
    """(argv, environment) of `git -C clone args`; no setting of the user's own git changes what it does."""
    env = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    env |= {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1", "GIT_LITERAL_PATHSPECS": "1",
            "GIT_NO_REPLACE_OBJECTS": "1", "LC_ALL": "C",
            "GIT_CEILING_DIRECTORIES": os.path.dirname(os.path.abspath(clone))}
    return ["git", "-c", "safe.directory=*", "-c", "core.quotePath=no", "-C", clone, *args], env


def git(clone, *args, stdin=b"", **variables):
    """What `git -C clone args` prints, as bytes; raises InputError with its first line of complaint."""
    argv, env = git_command(clone, *args)
    done = subprocess.run(argv, env=env | variables, capture_output=True, input=stdin)
    if done.returncode:
        problem = done.stderr.decode(errors="replace").strip().split("\n")[0]
        raise InputError(f"{clone}: git {args[0]}: {problem}")
    return done.stdout


def show(clone, commit, path):
    return git(clone, "show", f"{commit}:{path}").decode(errors="replace")


def paths_of(clone, commit, flag="-r"):
    """The paths of a commit's files, without submodules; a name that is no UTF-8 keeps its bytes."""
    entries = git(clone, "ls-tree", flag, "-z", commit).split(b"\0")[:-1]
    return [os.fsdecode(entry.split(b"\t", 1)[1]) for entry in entries if b" blob " in entry.split(b"\t")[0]]


def checkout(clone, commit, folder, paths=None):
    """Write the tree of commit, or some of its paths, into folder; no attribute leaves a file out."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    names = "\0".join(paths_of(clone, commit) if paths is None else paths)
    with tempfile.TemporaryDirectory() as index:
        places = {"GIT_INDEX_FILE": f"{index}/index", "GIT_WORK_TREE": os.path.abspath(folder)}
        git(clone, "read-tree", commit, **places)
        git(clone, "checkout-index", "-f", "-q", "-z", "--stdin", stdin=os.fsencode(names), **places)


def repository_name(clone, deny):
    """owner/name of the clone's origin, else the folder's name; neither it nor its package may be denied."""
    if git(clone, "rev-parse", "--is-shallow-repository") == b"true\n":
        raise InputError(f"{clone}: a shallow clone has no history to mine: git -C {clone} fetch --unshallow")
    if not head_of(clone):
        raise InputError(f"{clone}: its HEAD names no commit: git symbolic-ref HEAD refs/heads/BRANCH")
    url = r"(?m)^remote\.origin\.url=\S+(?:://|@)\S*?([^/:]+/[^/]+?)(?:\.git)?/?$"
    origin = re.search(url, git(clone, "config", "--list").decode(errors="replace"))
    names = [origin[1] if origin else os.path.basename(os.path.abspath(clone)).removesuffix(".git")]
    for file in ("pyproject.toml", "setup.cfg", "setup.py"):
        if blob_of(clone, "HEAD", file):
            names += re.findall(r"""(?m)^\s*name\s*=\s*["']?([\w.-]+)""", show(clone, "HEAD", file))[:1]
    if set(map(str.lower, deny)) & {name.split("/")[-1].lower() for name in names}:
        raise InputError(f"{clone}: {names[0]} is part of a benchmark: leave it out, or give another --deny")
    return names[0]


def head_of(clone):
    """The commit of HEAD; None where the folder is no clone, or an empty one."""
    try:
        return git(clone, "rev-parse", "--verify", "--quiet", "HEAD^{commit}").decode().strip()
    except InputError:
        return None


def log_lines(clone, *args):
    """The lines of `git log`, as a stream: it can be of gigabytes."""
    argv, env = git_command(clone, "log", *args)
    with tempfile.TemporaryFile() as complaints:
        process = subprocess.Popen(argv, env=env, stdout=subprocess.PIPE, stderr=complaints)
        for line in process.stdout:
            yield line.decode(errors="replace")
        if process.wait():
            complaints.seek(0)
            problem = complaints.read().decode(errors="replace").strip().split("\n")[0]
            raise InputError(f"{clone}: git log: {problem}")


def log_records(clone):
    """Yield (lines of the header, {path: diff}) of every commit that may merge a pull request, newest first.

    A file's diff is cut after 20,000 lines: no task is so large.
    """
    mark = os.urandom(16).hex()  # stands in no message and no file
    lines = log_lines(
        clone, "HEAD", "--diff-merges=first-parent", "-p", "-M", "--no-color", "--no-ext-diff", "-U3",
        "--no-textconv", "--full-index", "--diff-algorithm=myers", "--src-prefix=a/", "--dst-prefix=b/",
        "--min-parents=1", "--extended-regexp",
        "--grep=^((Auto|Rollup) m|M)erge (pull request )?(of )?#[0-9]+", "--grep=^Merged PR [0-9]+:",
        r"--grep=\((pull request |PR )?(#|GH-)[0-9]+\)", "--grep=^See merge request .*!",
        f"--format={mark}%n%H%n%P%n%an <%ae>%n%cs%n%B%n{mark}")
    line = next(lines, None)
    while line:  # the mark above a header
        header = [text.rstrip("\n") for text in iter(lambda: next(lines), mark + "\n")]
        files = defaultdict(list)
        diff = []
        while (line := next(lines, None)) and line != mark + "\n":
            if start := re.match(r'diff --git (?:a/(?P<same>.+) b/(?P=same)|.* "?b/(.+?)"?)\n', line):
                diff = files[start[1] or start[2]]
            if len(diff) < 20_000:
                diff.append(line[:50_000])
        yield header, {path: "".join(diff) for path, diff in files.items()}


# How the message of a commit says that it merges a pull request; the number of the last may be an issue's.
MERGES = [
    r"Merge pull request #(?P<number>\d+)(?: from (?P<branch>\S+)|\b)",
    r"(?:(?:Auto|Rollup) merge of|Merge) #(?P<number>\d+)\b",  # bors
    r"Merge pull request '(?P<title>.*)' \(#(?P<number>\d+)\) from (?P<branch>\S+)",  # Gitea
    r"Merged in (?P<branch>\S+) \(pull request #(?P<number>\d+)\)",  # Bitbucket
    r"Merged PR (?P<number>\d+): (?P<title>.*)",  # Azure DevOps
    r"(?s:Merge branch '(?P<branch>\S+)' into .*\nSee merge request \S*!(?P<number>\d+)\s*$)",  # GitLab
    r"(?P<title>.*?)\s*\((?:PR )?(?:#|GH-)(?P<number>\d+)\)"
    r"(?:\s|\.|\[[^\]\n]*\]|\((?:close|fixe?|resolve)[sd]? #\d+\))*\n",  # squashed: Title (#7) [skip ci]
]


def pull_requests(clone):
    """Every merged pull request in the history of HEAD, newest first, with its diff from the first parent."""
    for (commit, parents, author, date, subject, *body), files in log_records(clone):
        parents = parents.split()
        body = "\n".join(body).strip()
        found = [re.match(pattern, f"{subject}\n{body}", re.I) for pattern in MERGES]
        named = next(filter(None, found), None)
        if not named:
            continue
        shape = "squash" if len(parents) == 1 else "two parents" if named is found[-1] else "merge commit"
        merge = {"title": None, "branch": None} | named.groupdict()
        title = body.split("\n")[0] if merge["title"] is None else merge["title"]
        if not merge["branch"]:
            title = re.sub(r"^#?\d+: *", "", title)  # bors puts the number before it
        author = merge["branch"] or author  # the branch names a bot whose pull request a person merged
        if len(parents) > 1 and re.search(BOT, author):  # a merge queue is no author
            author = git(clone, "log", "-1", "--format=%an <%ae>", parents[1]).decode(errors="replace")
        yield {"number": int(merge["number"]), "shape": shape, "title": title, "body": body, "author": author,
               "date": date, "commit": commit, "base": parents[0], "files": files}


def syntax_tree(source):
    """Of Python source, without a word about old escapes in its strings; SyntaxError where there is none."""
    try:
        with warnings.catch_warnings(action="ignore"):
            return ast.parse(source.removeprefix("\ufeff"))
    except (ValueError, RecursionError, MemoryError) as error:  # a zero byte, thousands of brackets
        raise SyntaxError(str(error)) from None


def meaning(source):
    """The syntax tree of Python source without docstrings: equal where only comments or layout differ."""
    tree = syntax_tree(source)
    for node in ast.walk(tree):
        documented = isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
        if documented and ast.get_docstring(node, clean=False) is not None:
            del node.body[0]
    return ast.dump(tree)


def licence(clone, commit):
    """Name of the permissive licence in the root folder at commit, else None."""
    for path in paths_of(clone, commit, "--full-tree"):
        if re.search(r"(?i)licen[cs]e|copying", path):
            text = " ".join(show(clone, commit, path).split())
            for known, words in LICENCES.items():
                if re.search(words, text):
                    return known
    return None


def numbers_reverted(pull):
    """Numbers (as text), titles and commits that a pull request takes back; None if it is no revert."""
    if not re.match(r"(?i)revert\b", pull["title"]) and "This reverts commit" not in pull["body"]:
        return None
    commits = re.findall(r"This reverts commit ([0-9a-f]{40,64})", pull["body"])
    numbers = re.findall(r"#(\d+)", pull["title"])
    if '"revert' in pull["title"].lower():  # Revert "Revert "One (#1)" (#2)" takes back #2 alone
        numbers = numbers[-1:]
    for told in re.findall(r"(?i)\breverts?\b(.*)", pull["body"]):
        numbers += re.findall(r"#(\d+)", told)
    return {*numbers, *re.findall('"(.*)"', pull["title"]), *commits}


def is_reverted(pull, reverted):
    return bool({str(pull["number"]), pull["title"], pull["commit"]} & reverted)


def changes(pull):
    """The changed lines of a pull request: equal for a back-port of it."""
    return digest([re.findall(r"(?m)^[+-].*", diff) for _, diff in sorted(pull["files"].items())])


def kinds_of(files):
    """{kind: paths} of changed files; "run" are the tests in the language of the code, "gone" was deleted."""
    kinds = {kind: [] for kind in (*KINDS, "other", "run")}
    for path, diff in files.items():
        kind = next((kind for kind, pattern in KINDS.items() if re.search(pattern, path)), "other")
        kinds[kind].append(path)
    for path in kinds["test"]:
        is_gone = "\ndeleted file mode" in files[path]
        can_run = language_of(path) and not is_gone and not re.search(NOT_RUN, path)
        if can_run and (not kinds["code"] or language_of(path) == language_of(kinds["code"][0])):
            kinds["run"].append(path)
    return kinds


def language_of(path):
    return next((name for name, pattern in LANGUAGES.items() if re.search(pattern, path)), None)


def why_not(pull, seen, refs):
    """The reason why a pull request makes no task under any rule, or None.

    seen: digests of the changes, and (number, title), so far; refs: the numbers in refs/pull.
    """
    if pull["title"] and (pull["number"], pull["title"]) in seen:
        return "the same number and title again (a back-port)"
    if pull["shape"] != "merge commit" and refs and pull["number"] not in refs:
        return "the number of an issue: no such refs/pull"
    if not pull["files"]:
        return "changes no file"
    if any(re.search(r'[\ufffd"\\]', path) for path in pull["files"]):  # git writes it in quotes
        return "changes a file whose name is no plain UTF-8"
    return "the same change as another pull request" if changes(pull) in seen else None


def why_not_tests(clone, pull, kinds, reverted, max_tokens):
    """The reason why the default rule refuses a pull request, or None: one code file and its tests."""
    if re.search(BOT, pull["author"]):
        return "made by a bot"
    if numbers_reverted(pull) is not None:
        return "a revert"
    if is_reverted(pull, reverted):
        return "reverted later"
    if not kinds["code"]:
        return "no code file changed"
    if not language_of(kinds["code"][0]):
        return f"no runner for *{Path(kinds['code'][0]).suffix}"
    if not kinds["run"]:
        return why_no_test(pull, kinds)
    if len(kinds["code"]) > 1:
        return "more than one code file changed"
    if sum(len(pull["files"][path]) for path in kinds["code"] + kinds["test"]) // 4 > max_tokens:
        return f"diff longer than {max_tokens} tokens"
    if not licence(clone, pull["base"]):
        return "no permissive licence file at the base commit"
    return why_not_code(clone, pull, kinds["code"][0])


def why_no_test(pull, kinds):
    inside = any(re.search(IN_FILE_TEST, pull["files"][path]) for path in kinds["code"])
    return "its tests stand in the code file itself" if inside else "no test file changed"


def why_not_code(clone, pull, path):
    """The reason that lies in the one code file: its behaviour must change, in place."""
    if re.search(r"(?m)^(new file mode|deleted file mode|rename from)", pull["files"][path]):
        return "code file added, deleted or renamed"
    if not path.endswith(".py"):
        return None
    try:
        before, after = [meaning(show(clone, pull[side], path)) for side in ("base", "commit")]
    except (SyntaxError, RecursionError):
        return "code file is not Python 3"
    return "only comments, docstrings or layout changed" if before == after else None


def why_not_paper(pull):
    """The paper's two filters; its > 10,000 stars cannot be known from a clone."""
    if sum(map(len, pull["files"].values())) // 4 >= 1200:
        return "not under 1,200 tokens"
    return "only markdown" if all(path.endswith(".md") for path in pull["files"]) else None


def blob_of(clone, commit, path):
    """Name of a file's content at a commit; "" where it is not there."""
    found = git(clone, "ls-tree", commit, "--", path).decode().split()
    return found[2] if found else ""


def attach_material(row, clone, pull, kinds):
    """Give a row that passed the rule its "pr" (what verify needs) and its "material" (what write needs)."""
    base, commit, code = pull["base"], pull["commit"], kinds["code"]
    messages = pull["body"]
    if pull["shape"] != "squash":
        messages = git(clone, "log", "--no-merges", "--reverse", "--format=%B", f"{base}..{commit}")
        messages = messages.decode(errors="replace")
    row["meta"]["licence"] = licence(clone, base)
    row["tree"] = [os.path.abspath(clone), base]
    row["pr"] = {"code": code, "run": kinds["run"]}
    row["pr"]["blobs"] = [blob_of(clone, at, code[0]) if code else "" for at in (base, commit)]
    tests = "".join(pull["files"][path] for path in kinds["test"] if code)
    row["material"] = {"text": f"Title: {pull['title']}\nMessages of its commits:\n{messages.strip()}"[:8000],
                       "secret": "".join(pull["files"][path] for path in code or pull["files"]),
                       "tests": tests, "asked": []}
    for path in kinds["run"]:
        row["material"]["asked"] += asked_texts(show(clone, commit, path), tests)


def mine_clone(settings, clone):
    """(name, rows) of a repository: a row for every pull request; those that pass have "material"."""
    name = repository_name(clone, settings.deny)
    refs = git(clone, "for-each-ref", "--format=%(refname)", "refs/pull").decode(errors="replace")
    refs = set(map(int, re.findall(r"^refs/pull/(\d+)/", refs, re.M)))
    seen = set()
    reverted = set()
    numbers = Counter()
    rows = []
    passed = []
    for pull in pull_requests(clone):
        numbers[pull["number"]] += 1
        row = row_of(name, pull, numbers[pull["number"]])
        kinds = kinds_of(pull["files"])
        by_rule = why_not_paper(pull)
        if settings.rule == "tests":
            by_rule = why_not_tests(clone, pull, kinds, reverted, settings.max_tokens)
        if reason := why_not(pull, seen, refs) or by_rule:
            row["reasons"].append(reason)
        else:
            passed.append((row, pull, kinds))
        seen.add((pull["number"], pull["title"]))
        taken_back = numbers_reverted(pull)
        if taken_back is None:
            seen.add(changes(pull))
        elif not is_reverted(pull, reverted):
            reverted |= taken_back
        rows.append(row)
    if settings.rule == "paper":  # which draws a hundred of a repository
        drawn = Random(settings.seed).sample([row for row, *_ in passed], min(100, len(passed)))
        leave_out([row for row, *_ in passed], drawn, NOT_DRAWN)
    for row, pull, kinds in passed:
        if not row["reasons"]:
            attach_material(row, clone, pull, kinds)
    return name, rows


def row_of(name, pull, times):
    """times: how often the number has been met: it starts anew where a repository moves."""
    meta = {"repo": name} | {key: pull[key] for key in ("number", "title", "date", "base", "commit", "shape")}
    query_id = f"{name.replace('/', '__')}-{pull['number']}" + (f".{times}" if times > 1 else "")
    row = {"query_id": folder_name(query_id), "domain": None, "subdomain": "", "source": "pull_request"}
    return row | {"turns": [], "meta": meta, "reasons": []}


def mine(settings, work, rows):
    """Rows of all sources."""
    rows = real_queries(settings.real) if settings.real else []
    rows += papers(settings.papers) if settings.papers else []
    clones = {}
    live = []
    faults = []
    for name, clone, mined in mine_clones(settings, faults):
        if name in clones:
            raise InputError(f"{clone} and {clones[name]} are both called {name}: give each repository once")
        clones[name] = os.path.abspath(clone)
        live += enumerate(open_rows(mined))
        rows += mined
    rows += issues(settings.issues, clones) if settings.issues else []
    if faults and not rows:
        raise InputError(faults[0])
    taken = set()
    for row in open_rows(rows):
        if row["query_id"] in taken:
            row["reasons"].append("its query_id is taken")
        taken.add(row["query_id"])
    live = [row for _, row in sorted(live, key=lambda ranked: ranked[0])]  # the newest of every clone first
    if settings.rule == "tests":
        leave_out(live, live[: settings.max_candidates], BEYOND)
    return rows


def mine_clones(settings, faults):
    """Yield (name, clone, rows) of each; one that cannot be mined is added to faults, the others go on."""
    for clone in settings.repos:
        start = time.monotonic()
        try:
            name, mined = mine_clone(settings, clone)
        except (InputError, OSError) as error:
            faults.append(str(error))
            print(f"left out: {error}")
            continue
        passed = len(open_rows(mined))
        print(f"{name}: {len(mined)} pull requests, {passed} pass, {time.monotonic() - start:.1f} s")
        print_counts(Counter(row["reasons"][0] for row in mined if row["reasons"]).most_common())
        yield name, clone, mined


def leave_out(rows, chosen, reason):
    """Give the others the reason."""
    ids = {row["query_id"] for row in chosen}
    for row in rows:
        if row["query_id"] not in ids:
            row["reasons"].append(reason)


def print_counts(pairs):
    for name, count in pairs:
        print(f"  {count:7,d}  {name}")


# ---- verify: an environment a repository, then 04 says what a solution and what doing nothing is worth ----

def setup_variables(clone, base):
    """What is installed is other people's code: it sees no key. A tree without history knows no version."""
    tags = git(clone, "tag", "--merged", base, "--sort=-creatordate").decode(errors="replace")
    tag = re.search(r"\d+(\.\d+)+", tags)
    variables = {"SETUPTOOLS_SCM_PRETEND_VERSION": tag[0] if tag else "0.0.0"}
    for key, value in os.environ.items():
        if not re.search("KEY|TOKEN|SECRET|PASSW", key):
            variables[key] = value
    return variables


def build_environment(settings, language, clone, base, folder):
    """Make folder/venv and folder/made by languages/environment.py; returns {"runner", "problem"}."""
    shutil.rmtree(folder, ignore_errors=True)
    checkout(clone, base, folder / "tree")
    env = setup_variables(clone, base)
    argv = ["timeout", "--kill-after=9", settings.setup_seconds, sys.executable]
    argv += [Path(settings.languages) / "environment.py", folder / "tree", folder, language]
    argv.append(settings.setup_command or "")
    with open(folder / "setup.log", "w+", errors="replace") as log:
        status = subprocess.run(list(map(str, argv)), env=env, stdout=log, stderr=log).returncode
        log.seek(0)
        said = log.read().strip().splitlines() or [""]
    shutil.rmtree(folder / "tree")
    if status in (124, 137):  # of timeout, or its second signal
        return {"runner": None, "problem": f"took longer than --setup_seconds {settings.setup_seconds}"}
    if status:
        problem = f"cannot be built: {told_by(said)} (all of it: {folder}/setup.log)"
        return {"runner": None, "problem": problem}
    runner = RUNNERS[language]
    if said[-1].startswith("runner: "):
        runner = said[-1].removeprefix("runner: ")
    return {"runner": "custom" if settings.test_command else runner, "problem": None}


def told_by(lines):
    """Of what a failed set-up said the first error, and the last line on what is missing."""
    missing = [line for line in lines if re.search(r"(?i)not found|no matching|could not", line)]
    errors = [line for line in lines if re.search(r"(?i)\berror\b", line)] or missing or lines[-1:]
    return " ... ".join(dict.fromkeys((errors[0], (missing or errors)[-1].strip())))[:200]


def environment_of(settings, language, rows, work):
    """The environment of a repository, made once: "folder", "id", "runner", "problem" (None: it is ready)."""
    name = rows[0]["meta"]["repo"]
    folder = work / "environments" / f"{name.replace('/', '__')}-{language}"
    if not shutil.which(TOOLCHAINS[language]):
        return {"folder": folder, "problem": f"{TOOLCHAINS[language]} is not installed"}
    files = sorted(path for path in Path(settings.languages).iterdir() if path.is_file())
    setup = [(path.name, path.read_text()) for path in files]
    known_of = {"folder": folder, "program": (Path(settings.languages) / "check.py").read_text()}
    made_by = digest(settings.setup_command, settings.test_command, sys.version, setup)
    done = folder / "environment.json"
    if done.exists() and (known := json.loads(done.read_text()))["made_by"] == made_by:
        return known | known_of
    print(f"environment of {name} ({language}) ...", flush=True)
    # What the newest declares may be gone from the registry: one in the middle and the oldest are tried too.
    for row in (rows[0], rows[len(rows) // 2], rows[-1]):
        made = build_environment(settings, language, *row["tree"], folder)
        if not made["problem"]:
            break
    made |= {"made_by": made_by, "id": os.urandom(8).hex()}
    if not made["problem"]:
        done.write_text(json.dumps(made))
    return made | known_of


def package_of(path, paths):
    """The name under which Python imports a file: its topmost folder with an __init__.py, or itself."""
    parts = path.split("/")
    top = len(parts) - 1
    while top and "/".join([*parts[:top], "__init__.py"]) in paths:
        top -= 1
    return parts[top].removesuffix(".py")


def place_task(settings, row, environment, work, tests):
    """Write workspace.tar and private/ of a candidate; returns it as a task of 04.

    tests: {"fail_to_pass": [name], "pass_to_pass": [name]}, or {} to find out.
    """
    clone, base = row["tree"]
    commit = row["meta"]["commit"]
    folder = work / "tasks" / row["query_id"]
    private = folder / "private"
    shutil.rmtree(private, ignore_errors=True)
    test_files = [path for path in paths_of(clone, commit) if re.search(KINDS["test"], path)]
    checkout(clone, commit, private / "tests", test_files)
    checkout(clone, commit, private / "solution", row["pr"]["code"])
    (private / "check.py").write_text(environment["program"])
    packages = [package_of(path, paths_of(clone, base)) for path in row["pr"]["code"] if path.endswith(".py")]
    plan = {"runner": environment["runner"], "files": row["pr"]["run"], "command": settings.test_command,
            "seconds": settings.timeout, "packages": [name for name in packages if name.isidentifier()],
            "fail_to_pass": None, "pass_to_pass": None} | tests
    (private / "plan.json").write_text(json.dumps(plan, indent=1))
    workspace = folder / f"workspace-{environment['id']}-{base[:16]}.tar"
    if not workspace.exists():
        with tempfile.TemporaryDirectory() as tree:
            checkout(clone, base, tree)
            shutil.copytree(environment["folder"] / "made", tree, symlinks=True, dirs_exist_ok=True)
            write_tar(tree, workspace)
    turn = {"query": row["meta"]["title"] or row["query_id"], "check": "python3 -I /private/check.py",
            "solution": "cp -R /private/solution/. ."}
    task = {"query_id": row["query_id"], "domain": "vibe_coding", "source": row["source"], "turns": [turn],
            "workspace": str(workspace), "private": str(private),
            "venv": str(environment["folder"] / "venv")}
    needs = {"go": ["go"], "node": ["node"]}.get(language_of(row["pr"]["code"][0]))
    return task | ({"needs": needs} if needs else {})


def write_tar(folder, path):
    """The files of folder, with the same bytes whenever and by whomever: 04 knows a workspace by its hash."""
    partial = path.with_suffix(".partial")
    nobody = {"uid": 0, "gid": 0, "uname": "", "gname": "", "mtime": 0}
    with tarfile.open(partial, "w") as tar:
        tar.add(folder, ".", filter=lambda member: member.replace(**nobody, deep=False))
    partial.replace(path)


def run_agents(folder, tasks, runs):
    """04's two agents on these tasks: {agent: {query_id: [episode]}}, {query_id: why it was not run}."""
    done = {"nothing": defaultdict(list), "solution": defaultdict(list)}
    lost = {}
    for agent, episodes in done.items():
        output = folder / agent
        own = [task for task in tasks if agent == "nothing" or has_all(task, "solution")]
        if own:
            run_agent(output, agent, own, runs)
        for row in rows_if_there(output / "episodes.jsonl"):
            episodes[row["query_id"]].append(row)
        for row in rows_if_there(output / "not_run.jsonl"):
            lost[row["query_id"]] = f"{row['reason']}: {row.get('detail') or ''}".strip(": ")
    return done, lost


def run_agent(output, agent, tasks, runs):
    log, path = output.with_suffix(".log"), output.with_suffix(".jsonl")
    write_jsonl(path, tasks)
    argv = f"--agent {agent} --n_runs {runs} --rounds 1 --concurrency {os.cpu_count()}".split()
    argv = [sys.executable, str(EVALUATE), *argv, "--tasks", str(path), "--output_dir", str(output)]
    with open(log, "w") as file:
        status = subprocess.run(argv, stdout=file, stderr=file).returncode
    if status not in (0, 1) or not (output / "summary.json").exists():
        said = log.read_text(errors="replace").strip().splitlines() or ["nothing"]
        raise InputError(f"{EVALUATE.name} --agent {agent} says: {said[-1]} (all of it: {log})")


def rows_if_there(path):
    return [row for _, row in read_jsonl(path, append_only=True)] if path.exists() else []


ENVIRONMENT_FAULTS = {
    r"No module named '?([\w.]+)": "its tests need the module {}",
    r"Cannot find (?:module|package) '([^'./][^']*)'": "its tests need the package {}",
    r"no required module provides package (\S+?);": "its tests need the package {}",
    r"no matching package named `([^`]+)`": "its tests need the crate {}",
    r"unrecognized arguments: (\S+)": "a plug-in of its test runner is missing ({})",
    r"fixture '(\w+)' not found": "the plug-in with the fixture {} is missing",
    r"(gaierror|Network is unreachable|name resolution|ENOTFOUND|EAI_AGAIN|no such host)":
        "its tests need the network",
    r"(uid not found|getpwuid)": "its tests need a user of the system",
    r"(unsupported locale|[Nn]o time zone found)": "its tests need a locale or time zone of the system",
    r"(no display name|Connection refused|ECONNREFUSED)": "its tests need a server that does not run ({})",
    r"(MemoryError|ENOMEM|Cannot allocate memory)": "its tests need more memory",
    r"([\w.-]+): (?:command )?not found": "its tests need the program {}",
    r"No such file or directory: '([\w-]+)'": "its tests need the program {}",
}


def environment_fault(messages):
    for pattern, told in ENVIRONMENT_FAULTS.items():
        if found := re.search(pattern, messages):
            return "environment: " + told.format(found[1])
    return None


def survey_of(episode):
    """{"passed": [test], "failed": {test: message}, "end"} of a run that finds out, packed by check.py."""
    lines = [check["requirement"] for check in episode["rounds"][-1]["checks"]]
    if not lines[0].startswith("survey "):
        return {"passed": [], "failed": {lines[0]: lines[0]}, "end": ""}
    packed = "".join(line.removeprefix("survey ") for line in lines)
    return json.loads(zlib.decompress(base64.b64decode(packed)))


def judge_survey(nothing, solution, timeout):
    """The verdict on the runs of a candidate: "reason", or "fail_to_pass" and "pass_to_pass": [name]."""
    surveys = list(map(survey_of, solution))
    after = [set(survey["passed"]) for survey in surveys]
    before = [set(survey["passed"]) for survey in map(survey_of, nothing)]
    always = set.intersection(*after)
    fail_to_pass = always - set.union(*before)
    before_always = set.intersection(*before)
    if fail_to_pass:
        return {"reason": None, "fail_to_pass": sorted(fail_to_pass),
                "pass_to_pass": sorted(always & before_always)}
    messages = ""
    for survey in surveys:
        messages += "\n".join([*survey["failed"].values(), survey["end"], ""])
    if "the tests end within" in messages:
        reason = f"its tests run longer than {timeout} s"
    elif always and not any(survey["failed"] for survey in surveys):
        reason = "its tests pass without the change too"
    elif set.union(*after) != always or set.union(*before) != before_always:
        reason = "its tests are flaky"
    else:
        reason = environment_fault(messages) or "its tests fail with the change too"
    return {"reason": reason, "output": messages[-1500:]}


def lines_at_hand(environment):
    """The lines of the source files that a set-up brought, as hashes; the venv of Rust is its toolchain."""
    found = set()
    for name in ("made",) if environment["runner"] == "cargo" else ("made", "venv"):
        for path in (environment["folder"] / name).rglob("*"):
            if re.search(KINDS["code"], path.name) and path.is_file() and path.stat().st_size < 2_000_000:
                found.update(hash(line.strip()) for line in path.read_text(errors="replace").splitlines())
    return found


def stands_in(known_lines, diff):
    """Are most of the longer lines that a diff adds among these?"""
    added = [line for line in added_lines(diff) if len(line) > 20]
    return sum(hash(line) in known_lines for line in added) > len(added) / 2


def verify_repository(settings, work, rows, environment, keys):
    """{query_id: verdict} on the candidates of a repository, after two rounds of 04's two agents."""
    folder = work / "verify" / digest(sorted(keys), EVALUATE.read_text())[:16]  # a killed run goes on there
    tasks = []
    lost = {}
    for row in rows:
        try:
            tasks.append(place_task(settings, row, environment, work, {}))
        except (InputError, OSError) as error:  # blobs that the clone lacks, a folder where a file is made
            lost[row["query_id"]] = str(error)
    done, not_run = run_agents(folder / "find", tasks, settings.verify_runs)
    lost |= not_run
    known_lines = lines_at_hand(environment)
    verdicts = {}
    proven = []
    for row in rows:
        name = row["query_id"]
        if name in lost or not done["nothing"][name] or not done["solution"][name]:
            verdicts[name] = {"reason": f"{UNDECIDED}: {lost.get(name, 'no episode was left')}"}
            continue
        verdict = judge_survey(done["nothing"][name], done["solution"][name], settings.timeout)
        if not verdict["reason"] and stands_in(known_lines, row["material"]["secret"]):
            verdict = {"reason": "its solution stands in its environment"}
        verdicts[name] = verdict
        if not verdict["reason"]:
            tests = without(verdict, "reason")
            proven.append(place_task(settings, row, environment, work, tests))
    # What was found out once may have been luck: the check as it will be used is run again on both.
    verdicts |= refuted(settings, folder / "prove", proven)
    shutil.rmtree(folder, ignore_errors=True)
    return verdicts


def refuted(settings, folder, tasks):
    """{query_id: {"reason"}} of tasks whose solution does not always pass, or that nothing passes once."""
    found = {}
    done, lost = run_agents(folder, tasks, settings.verify_runs) if tasks else ({}, {})
    for task in tasks:
        name = task["query_id"]
        right = times_solved(done["solution"][name])
        idle = times_solved(done["nothing"][name])
        if right != settings.verify_runs or idle:
            told = f"its solution passes {right}, doing nothing {idle} of {settings.verify_runs}"
            found[name] = {"reason": f"its tests are flaky: {lost.get(name) or told}"}
    return found


def without(row, *keys):
    return {key: value for key, value in row.items() if key not in keys}


def verify(settings, work, rows):
    """Prove the mined tasks, and the checks of real-world ones; what was decided is not run again."""
    if settings.dry_run or not settings.verify_runs:
        print("verify: left out (--dry_run, or --verify_runs 0): nothing is proven")
        return rows
    if own := own_checks(rows):
        verify_real(work / "verify" / "real", own)
    for (name, language), group in candidates(settings, rows).items():
        try:
            environment = environment_of(settings, language, group, work)
        except (InputError, OSError) as error:  # of a clone that is broken or gone; the others go on
            environment = {"problem": str(error)}
        if not environment["problem"]:
            verify_group(settings, work, name, group, environment)
            continue
        print(f"{name}: no environment for its {len(group)} candidates: {environment['problem']}")
        for row in group:
            row["reasons"] = [f"environment: {environment['problem'].split(' (')[0]}"]
    return add_chains(settings, work, rows) if settings.chain > 1 else rows


def own_checks(rows):
    """Tasks of the user whose every turn has a check."""
    return [row for row in open_rows(rows) if not is_mined(row) and row["turns"] and has_all(row, "check")]


def candidates(settings, rows):
    """{(repository, language): rows to be proven}; the paper's rule demands no tests."""
    groups = defaultdict(list)
    for row in open_rows(rows):
        if is_mined(row) and settings.rule == "tests":
            groups[row["meta"]["repo"], language_of(row["pr"]["code"][0])].append(row)
    return groups


def verify_group(settings, work, name, group, environment):
    """Give the candidates of a repository their verdicts: a reason, or the proven task's own fields."""
    path = work / "verifications.jsonl"
    known = by_key(path)
    facts = settings.timeout, settings.verify_runs, environment["id"], environment["program"]
    keys = {row["query_id"]: digest(row["query_id"], row["meta"]["base"], row["meta"]["commit"], facts)
            for row in group}
    missing = [row for row in group if keys[row["query_id"]] not in known]
    if missing:
        print(f"verify: {len(missing)} candidates of {name} ...", flush=True)
        names = [keys[row["query_id"]] for row in missing]
        for query_id, verdict in verify_repository(settings, work, missing, environment, names).items():
            known[keys[query_id]] = verdict
            if not str(verdict["reason"]).startswith(UNDECIDED):  # it is tried again
                append_jsonl(path, {"key": keys[query_id], "query_id": query_id} | verdict)
    for row in group:
        verdict = known[keys[row["query_id"]]]
        if verdict["reason"]:
            row["reasons"] = [verdict["reason"]]
            continue
        found = {key: verdict[key] for key in ("fail_to_pass", "pass_to_pass")}
        row["meta"] |= found
        try:
            row["task"] = place_task(settings, row, environment, work, found)
        except (InputError, OSError) as error:
            row["reasons"] = [f"{UNDECIDED}: {error}"]


def verify_real(folder, rows):
    """A check that passes before anybody did anything, or fails after its own solution, is rejected.

    So is a task that 04 refuses: it is found by halves, as it stops the others.
    """
    shutil.rmtree(folder, ignore_errors=True)
    try:
        done, lost = run_agents(folder, [without(row, "reasons", "material") for row in rows], 1)
    except InputError as error:
        if len(rows) == 1:
            rows[0]["reasons"].append(f"04 refuses it: {error}")
        for half in (rows[: len(rows) // 2], rows[len(rows) // 2 :]) if len(rows) > 1 else ():
            verify_real(folder / half[0]["query_id"], half)
        return
    for row in rows:
        name = row["query_id"]
        if name in lost:
            print(f"verify: {name} could not be decided: {lost[name]}")
        elif times_solved(done["nothing"][name]):
            row["reasons"].append("its check passes on the untouched workspace")
        elif has_all(row, "solution") and not times_solved(done["solution"][name]):
            row["reasons"].append("its check fails after its own solution")


def times_solved(episodes):
    return sum(episode["meta"]["solved"] for episode in episodes)


def has_all(row, key):
    return all(key in turn for turn in row["turns"])


def chains(rows, longest):
    """Yield lists of two or more proven rows, oldest first: each goes on where the last one ended."""
    ends = {}
    for row in sorted(rows, key=lambda row: (row["meta"]["date"], row["meta"]["number"])):
        before, after = row["pr"]["blobs"]
        chain = ends.pop(before, [])
        if len(chain) == longest:
            yield chain
            chain = []
        ends[after] = [*chain, row]
    yield from (chain for chain in ends.values() if len(chain) > 1)


def join(chain, work):
    """One task of several: the tree of the first, a private folder with a part for each turn."""
    first = chain[0]
    name = f"{first['query_id']}-to-{chain[-1]['meta']['number']}"
    private = work / "tasks" / name / "private"
    shutil.rmtree(private, ignore_errors=True)
    turns = []
    for number, row in enumerate(chain, 1):
        shutil.copytree(row["task"]["private"], private / str(number), symlinks=True)
        turn = row["task"]["turns"][0]
        turns.append({key: text.replace("/private/", f"/private/{number}/") for key, text in turn.items()})
    meta = first["meta"] | {"numbers": [row["meta"]["number"] for row in chain]}
    task = first["task"] | {"query_id": name, "turns": turns, "private": str(private)}
    parts = [row["query_id"] for row in chain]
    row = without(first, "tree", "material") | {"query_id": name, "meta": meta, "task": task, "parts": parts}
    return row | {"source": "pull_requests", "turns": [], "reasons": []}


def add_chains(settings, work, rows):
    """Dependent pull requests as the turns of one task, if the whole proves itself too."""
    proven = [row for row in open_rows(rows) if "task" in row]
    joined_rows = [join(chain, work) for chain in chains(proven, settings.chain)]
    folder = work / "verify" / "chains"
    shutil.rmtree(folder, ignore_errors=True)
    refutations = refuted(settings, folder, [row["task"] for row in joined_rows])
    for row in joined_rows:
        if row["query_id"] in refutations:
            row["reasons"].append(refutations[row["query_id"]]["reason"])
    return rows + joined_rows


# ---- write: the query, with the solution hidden ----

SYSTEM = """You turn a merged pull request into the task that a developer gives to a coding agent. The agent \
sees your text and the repository as it was before the change. {judged_by}

Write the query in the voice of the developer who needs the change, 60 to 200 words of plain English:
- the problem as someone meets it, the behaviour expected, the constraints that matter, a short example;
- everything {asked_by} that nobody could guess: exact messages, names, defaults, edge cases;
- never the solution: no diff, no code of it, not which lines, functions or helpers to change or add;
- no file of tests, no test framework, no pull request, issue, link, commit or person;
- a name from the code only if it exists before the change or the tests call it.

reason: one sentence on what the change does. answerable: false when {asked_by} what no text can give fairly.
interfaces: signatures or names that are new in the change and that the tests call; usually empty.
rubric: two to five requirements, each one sentence on observable behaviour that a grader can check.
"""
JUDGED_BY = {"tests": ("Hidden tests, which you see here, decide about success.", "the hidden tests require"),
             "paper": ("A grader with your rubric decides about success.", "the rubric requires")}
SYSTEM_PAPER = """You turn a research paper into the query that a researcher gives to an agent which can \
search, read, write and run code. The agent does not see the paper.

Write the query in the voice of a researcher who has the paper's question but not yet its answer, 60 to 200 \
words of plain English: the question and why it matters, the data, setting or comparison that bounds it, \
what to hand in (a report, an analysis, an experiment). Do not name the paper, its authors or its findings.

reason: one sentence on what the paper shows. answerable: false when it takes the paper's own data.
interfaces: empty. rubric: three to six requirements, each one sentence that a grader can check in the answer.
"""
SYSTEM_ISSUE = """You turn an issue of a repository into the task that a developer gives to a coding agent. \
The agent sees your text and the repository, not the issue.

Write the query in the voice of the developer who needs it done, 60 to 200 words of plain English: the \
problem as someone meets it, the behaviour expected, the constraints that matter, a short example. No \
issue, link, image or person; no guess where in the code to look.

reason: one sentence on what is wanted. answerable: false when the issue is a question, needs a decision, or \
says too little. interfaces: empty. rubric: two to five requirements, each one sentence on observable \
behaviour that a grader can check.
"""
SYSTEMS = {"paper": SYSTEM_PAPER, "issue": SYSTEM_ISSUE}
FORM = """Answer with one JSON object: {"reason": str, "answerable": true or false, "query": str, \
"interfaces": [str], "rubric": [str], "subdomain": one of SUBDOMAINS, \
"difficulty": "easy", "medium" or "hard"}."""
JUDGE = """Below are a task for a coding agent and the change that solves it. Does the task give the \
solution away: code of it, the place to change, the technique or helper to use, beyond what the tests \
demand? Answer with one JSON object: {"leaks": true or false, "why": one sentence}."""
Text = pydantic.constr(pattern=r"^[^\x00-\x08\x0e-\x1f]*$")  # no control character, no half of a character


class Verdict(pydantic.BaseModel, extra="ignore"):  # the judge's answer
    leaks: bool
    why: str


class Draft(pydantic.BaseModel, extra="ignore"):  # strict servers want every field required
    reason: str
    answerable: bool
    query: Text
    interfaces: list[Text]
    rubric: list[Text]
    subdomain: Literal[tuple(DOMAINS)]
    difficulty: Literal["easy", "medium", "hard"]


def prompt_of(row, rule):
    """The messages that ask for a row's query."""
    material = row["material"]
    system, user = SYSTEMS.get(row["source"]), material["text"]
    if not system:
        judged_by, asked_by = JUDGED_BY[rule]
        system = SYSTEM.format(judged_by=judged_by, asked_by=asked_by)
        user = f"Repository: {row['meta']['repo']}\n{user}\n\n"
        user += f"The change (reference only, to be hidden):\n{material['secret']}\n"
        user += f"The hidden tests:\n{material['tests']}" if rule == "tests" else ""
    system += FORM.replace("SUBDOMAINS", ", ".join(DOMAINS))
    return [{"role": "system", "content": system}, {"role": "user", "content": user}]


def write(settings, work, rows):
    """Ask for every query that has no answer yet. An answer is stored the moment it comes: paid once."""
    if settings.max_usd is not None and not settings.price_in + settings.price_out:
        raise InputError("--max_usd needs the prices of the model: --price_in and --price_out")
    live = [row for row in open_rows(rows) if "material" in row]
    prompts = [prompt_of(row, settings.rule) for row in live]
    for row, answer in zip(live, answers_to(settings, work, live, prompts, settings.model, Draft)):
        row["answer"] = answer
    return rows


def answers_to(settings, work, rows, prompts, model, form):
    """A model's answer to the prompt (messages) of each row: replayed, or asked for in a form of pydantic."""
    requests = {}
    for row, messages in zip(rows, prompts):
        request = {"query_id": row["query_id"], "model": model, "messages": messages, "form": form}
        requests[digest(model, messages, row["query_id"])] = request
    path = work / "answers.jsonl"
    known = by_key(path)
    if settings.retry_bad:
        known = {key: answer for key, answer in known.items() if draft_of(answer, form)[0]}
    missing = {key: request for key, request in requests.items() if key not in known}
    if settings.dry_run:
        dry_run(missing)
    if missing:
        asyncio.run(ask_all(settings, missing, path))
        known |= by_key(path)
    asked = [known[key] for key in missing]
    print(f"{model}: {len(asked)} answers asked for, {len(requests) - len(asked)} replayed, "
          f"${dollars_for(settings, asked):.2f}")
    return [known[key] for key in requests]


def dry_run(missing):
    prompts = []
    for request in missing.values():
        prompts += [message["content"] for message in request["messages"]]
    print(*prompts[:2], f"calls: {len(missing)}\ntokens in, about: {sum(map(len, prompts)) // 4}", sep="\n\n")
    sys.exit()


def usage_of(answer):
    """Tokens of an answer; a server may send none, null or texts."""
    usage = answer.get("usage")
    counts = {}
    for key in ("prompt_tokens", "completion_tokens"):
        number = str(usage.get(key)) if isinstance(usage, dict) else ""
        counts[key] = int(number) if number.isdecimal() else 0
    return counts


def dollars_for(settings, answers):
    total = 0
    for usage in map(usage_of, answers):
        total += usage["prompt_tokens"] * settings.price_in + usage["completion_tokens"] * settings.price_out
    return total / 1e6


class Endpoint:
    """An OpenAI-compatible server, what it costs, and which form of answer it can be asked for."""

    def __init__(self, settings, path):
        import openai

        self.openai = openai  # slow to import
        self.settings = settings
        self.path = path
        self.forms = ["json_schema", "json_object", None]
        self.dollars = dollars_for(settings, rows_if_there(path))
        self.under_way = 0.0
        self.failures = []
        self.gate = asyncio.Semaphore(settings.concurrency)
        self.client = openai.AsyncOpenAI(
            base_url=settings.base_url, max_retries=6, timeout=settings.call_seconds,
            api_key=os.environ.get("OPENAI_API_KEY") or "EMPTY")  # a local server wants none

    async def store(self, key, request):
        """Append an answer to path: 1, or 0. After a failure no call starts; those under way are awaited."""
        usage = {"prompt_tokens": len(str(request["messages"])) // 4, "completion_tokens": 4000}
        expected = dollars_for(self.settings, [{"usage": usage}])
        async with self.gate:
            limit = self.settings.max_usd
            if limit is not None and self.dollars + self.under_way + expected > limit:
                self.failures.append(f"${self.dollars:.2f} spent, another call may pass --max_usd {limit}")
            if self.failures:
                return 0
            self.under_way += expected
            try:
                answer = await self.ask(request)
            except (self.openai.OpenAIError, InputError) as error:
                text = " ".join(str(error).split())[:300]
                self.failures.append(f"{request['query_id']}: {type(error).__name__}: {text}")
                return 0
            finally:
                self.under_way -= expected
            append_jsonl(self.path, {"key": key} | without(request, "messages", "form") | answer)
            self.dollars += dollars_for(self.settings, [answer])
            return 1

    async def ask(self, request):
        """A completion as {"content", "finish_reason", "usage"}; {"refused"} where repeating cannot help."""
        while True:
            form = self.forms[0]
            extra = {"extra_body": self.settings.request}
            if form:
                extra["response_format"] = {"type": form}
            if form == "json_schema":
                schema = request["form"].model_json_schema() | {"additionalProperties": False}
                extra["response_format"]["json_schema"] = {"name": "Answer", "strict": True, "schema": schema}
            create = self.client.chat.completions.with_raw_response.create
            try:
                reply = await create(model=request["model"], messages=request["messages"], **extra)
                return read_completion(reply.text)
            except self.openai.APIStatusError as error:
                text = " ".join(str(error).split())[:300]
                of_form = form and re.search(r"response_format|json|schema|grammar", text, re.I)
                if error.status_code not in ((400, 413, 422, 500, 501) if of_form else (400, 413, 422)):
                    raise
            if not of_form:
                return {"refused": text, "usage": usage_of({})}
            if self.forms[0] == form:  # another call may have found out meanwhile
                self.forms.pop(0)


def read_completion(text):
    """The answer of a chat completion's body; InputError if the server sent something else."""
    try:
        body = json.loads(text)
        if not body["choices"]:  # a filter of contents took it away
            return {"refused": f"no choice in its answer: {text[:200]}", "usage": usage_of(body)}
        choice = body["choices"][0]
        message = choice["message"] or {}
        content = message.get("content") or message.get("refusal") or ""
        if isinstance(content, list):  # parts: thoughts and texts
            texts = [part.get("text") for part in content if part.get("type") in ("text", "output_text")]
            content = "".join(map(str, filter(None, texts)))
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise InputError(f"not a chat completion but {text[:80]!r}; does --base_url end in /v1?") from None
    content = str(content).encode(errors="replace").decode()  # half a character
    return {"content": content, "finish_reason": choice.get("finish_reason"), "usage": usage_of(body)}


async def ask_all(settings, missing, path):
    if not (settings.base_url or os.environ.get("OPENAI_API_KEY")):
        told = "answers are missing and no endpoint is known: set OPENAI_API_KEY, or --base_url of a server"
        raise InputError(f"{len(missing)} {told}")
    endpoint = Endpoint(settings, path)
    progress = tqdm(desc="write", total=len(missing), unit=" answers")
    for call in asyncio.as_completed([endpoint.store(*item) for item in missing.items()]):
        progress.update(await call)
        progress.set_postfix_str(f"${endpoint.dollars:.2f}")
    progress.close()
    if endpoint.failures:
        told = f"{progress.n} of {len(missing)} answers are stored, run again to ask only for the others"
        raise InputError(f"{endpoint.client.base_url}: {endpoint.failures[0]}; {told}")


# ---- what a query must say because the tests ask for it, and what it gives away of the solution ----


def added_lines(diff):
    return [line[1:].strip() for line in diff.split("\n") if re.match(r"\+(?!\+\+ )", line)]


def words_of(text):
    """Words in lower case; a Chinese or Japanese character is a word."""
    return re.findall(r"[\u3040-\u9fff]|[^\W\u3040-\u9fff]+", text.lower())


def runs_of(items, length):
    """Every run of so many items, as a tuple."""
    return {tuple(items[i : i + length]) for i in range(len(items) - length + 1)}


def says(text, fragment):
    """Does a text say a fragment, whatever the case and the signs between its words?"""
    return f" {' '.join(words_of(fragment))} " in f" {' '.join(words_of(text))} "


def uses(text, name):
    """Does a text have a name as a whole?"""
    return re.search(rf"(?<![\w-]){re.escape(name)}(?!\w)", text) is not None


# What a comparison in another language than Python has in quotes, on one line.
ASSERTION = re.compile(
    r"(?:==|!=|\b(?:toBe|toEqual|toStrictEqual|toThrow\w*|toMatch\w*|toContain|equal|strictEqual|deepEqual"
    r"|throws|match|Contains|Equal\w*|EqualError|assert_eq!|contains|expect)\()"
    r"""[^"'`\n]*(["'`])((?:\\.|(?!\1).)*)\1"""
)


def parts_of(node, is_regex):
    """The constant texts of an expression: of a literal, an f-string, a sum, re.escape(...)."""
    if isinstance(node, ast.Call) and node.args and ast.unparse(node.func) in ("re.escape", "re.compile"):
        return parts_of(node.args[0], ast.unparse(node.func) == "re.compile")
    if isinstance(node, (ast.BinOp, ast.JoinedStr)):
        return sum((parts_of(child, is_regex) for child in ast.iter_child_nodes(node)), [])
    if not isinstance(node, ast.Constant) or not isinstance(node.value, str):
        return []
    text = node.value
    if is_regex:  # what stands between its signs
        text = re.sub(r"\\[dDwWsSbBAZ]|(?<!\\)(\[[^\]]*\]|[.^$*+?{}()|])", "\n", text)
        text = re.sub(r"\\(.)", r"\1", text)
    return text.split("\n")


def compared(node):
    """[(expression, is it a regex)] that a node of a Python test compares with."""
    if isinstance(node, ast.Compare):
        return [(side, False) for side in (node.left, *node.comparators)]
    if not isinstance(node, ast.Call):
        return []
    name = getattr(node.func, "attr", getattr(node.func, "id", ""))
    asserts = re.match(r"assert|raises|warns", name, re.I)
    found = [(side, "egex" in name or "aises" in name) for side in node.args if asserts]
    return found + [(word.value, True) for word in node.keywords if word.arg in ("match", "expected_regex")]


def asked_in(source):
    """Yield (first line, last line, text) of what a test file compares with."""
    try:
        tree = syntax_tree(source)
    except SyntaxError:  # another language: what a comparison on one line has in quotes
        for number, line in enumerate(source.split("\n"), 1):
            yield from ((number, number, match[2]) for match in ASSERTION.finditer(line))
        return
    for node in ast.walk(tree):
        for side, is_regex in compared(node):
            for part in parts_of(side, is_regex):
                yield getattr(side, "lineno", 0), getattr(side, "end_lineno", 0), part


def asked_texts(source, test_diff):
    """Texts of three words or more that the lines added by the diff demand. source: the whole test file."""
    added = set(added_lines(test_diff))
    lines = source.split("\n")  # as Python counts them
    asked = {}
    for first, last, text in asked_in(source):
        is_new = any(line.strip() in added for line in lines[first - 1 : last])
        if is_new and len(words_of(text)) >= 3:
            asked[text.strip()] = None
    return list(asked)


def demanded_names(secret, tests):
    """Names and options that the added code defines and the added tests use."""
    added, used = ["\n".join(added_lines(diff)) for diff in (secret, tests)]
    defined = set(re.findall(r"\b(?:def|class|func|function|fn)\s+(?:\([^)]*\)\s*)?([A-Za-z_]\w+)", added))
    for line in re.findall(r"(?m)^(?:async )?def .*|^\s+\w+: .*[,=].*", added):
        defined.update(re.findall(r"(\w{3,})\s*(?::[^,=]+)?=", line))
    defined.update(re.findall(r"(?<![\w-])--[a-z][\w-]+", added))
    return sorted(name for name in defined if uses(used, name))


def names_in(text):
    """Words that can only be names in code: with _, a digit, an inner capital, in backticks, called."""
    found = {word for word in re.findall(r"[A-Za-z_]\w+", text) if re.search(r"_|\d|[a-z][A-Z]", word)}
    found.update(re.findall(r"`\.?([A-Za-z_]\w+)[^`\w]*`", text))
    return found.union(re.findall(r"\b([A-Za-z_]\w+)\(", text))


def bare(name):
    """A name without case and underscores: atomicTypes, _ATOMIC_TYPES and atomic_types are one."""
    return name.replace("_", "").lower()


def tokens_of(text):
    return re.findall(r"\w+|[^\w\s]", text)


def shape_of(text):
    """Tokens with every name replaced: equal for code whose variables were renamed."""
    tokens = tokens_of(text)
    return ["v" if token.isidentifier() and not keyword.iskeyword(token) else token for token in tokens]


def code_like(run):
    """Signs that prose does not have so close together."""
    return sum(token in set("()[]{}=<>+*/%|&:._!") for token in run) >= 3 and len(set(run) - {"v"}) >= 3


ADVICE = (
    r"\b(?:use|using|call|calling|replace|wrap|switch|swap|return|pass|add|import|check|compare|convert|"
    r"store|insert|make|via|with|inherit|change|turn|function|method|helper|module)\b[^.\n]{0,80}?\b(%s)\b"
)
PLACE = (
    r"\b(?:change|modify|edit|fix|rewrite|patch|update|adjust|extend|touch|look at|body of|code of|lines? of)"
    r"\b[^.\n]{0,30}?\b%s\b"
)
FUNCTION = r"\b(?:def|func|function|fn)\s+(?:\([^)]*\)\s*)?(\w+)"


class Solution:
    """The change of a pull request as a query must not tell it. material: its row's; old: the files before.

    Mere ideas in other words are left to --judge_model.
    """

    def __init__(self, material, old, title=""):
        diff = material["secret"]
        self.tests = material["tests"]
        self.asked = material["asked"]
        self.title = title
        old_lines = {line.strip() for line in old.splitlines()}
        self.added = [line for line in added_lines(diff) if line and line not in old_lines]
        self.public = public = old + self.tests + " ".join(self.asked)
        self.public_runs = runs_of(tokens_of(public.lower()), 3)
        self.public_shapes = runs_of(shape_of(public), 8)
        self.read_names(diff, set(map(bare, tokens_of(public))))

    def read_names(self, diff, public):
        """paths, functions: what changes; names: new ones; called: those that are called or imported."""
        code = re.sub(r"""(["'`])(?:\\.|(?!\1).)*\1""", '""', "\n".join(self.added))
        self.names = {bare(name) for name in re.findall(r"[A-Za-z_]\w{2,}", code)} - public
        called = re.findall(r"([A-Za-z_]\w{3,})\s*\(", code) + re.findall(r"\.([a-z_]\w{3,})\b", code)
        called += re.findall(r"\bimport (\w+)", code)
        self.called = sorted(name for name in set(called) if bare(name) in self.names)
        self.paths = re.findall(r"(?m)^\+\+\+ b/(.+?)\t?$", diff)
        self.functions = sorted(set(re.findall(rf"(?m)^(?:@@ .*@@|[ +-]).*?{FUNCTION}", diff)))

    def leaks(self, text):
        """Yield what a text gives away; the texts that the tests ask for may be given."""
        text = self.without_asked(text)
        for name in sorted(names_in(text)):
            if bare(name) in self.names:
                yield f"leaks a new name of the solution: {name}"
        for line in self.added:
            if self.repeats(line, text):
                yield f"repeats a line of the solution: {line}"
        yield from self.leaked_place(text)
        yield from self.leaked_means(text)
        if len(words_of(self.title)) >= 5 and says(text, self.title):
            yield "repeats the title of the pull request"

    def without_asked(self, text):
        """The text without what the tests ask for, as they have it and in other signs and cases."""
        for asked in sorted(self.asked, key=len, reverse=True):  # one may be a part of another
            text = text.replace(asked, "")
        for asked in self.asked:
            text = re.sub(r"(?i)\b" + r"\W*".join(map(re.escape, words_of(asked))) + r"\b", "", text)
        return text

    def repeats(self, line, text):
        """Does a text have half a line of the solution, word for word or with its variables renamed?"""
        own = tokens_of(line.lower())
        if len(own) > 4 and keyword.iskeyword(own[0]) and line.rstrip(":{") in text:
            return True
        if any(map(code_like, runs_of(tokens_of(text.lower()), 6) & runs_of(own, 6))):
            return True
        for quoted in map(tokens_of, re.findall(r"`([^`\n]+)`", text.lower())):
            is_public = runs_of(quoted, 3) <= self.public_runs
            if len(quoted) >= 3 and not is_public and tuple(quoted) in runs_of(own, len(quoted)):
                return True
        shapes = runs_of(shape_of(text), 8) & runs_of(shape_of(line), 8)
        return any(map(code_like, shapes - self.public_shapes))

    def leaked_place(self, text):
        """The file to change, a function that is nobody else's business, or an order which one to change."""
        for path in self.paths:
            if re.search(rf"(?i)(?<![\w/]){re.escape(path)}|(?<!\w){re.escape(Path(path).name)}\b", text):
                yield f"names the file to change: {path}"
        for name in self.functions:
            is_inner = re.match(r"_[^_]", name) and not uses(self.tests, name)  # else it must be given
            if is_inner and uses(text, name) or re.search(PLACE % name, text, re.I):
                yield f"says which function to change: {name}"

    def leaked_means(self, text):
        """What the solution calls, where it is advised; module.function of it, wherever."""
        if self.called and (advice := re.search(ADVICE % "|".join(self.called), text, re.I)):
            yield f"leaks a means of the solution: {advice[1]}"
        for name in re.findall(r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w+)+", text):
            if name not in self.public and any(name in line for line in self.added):
                yield f"leaks a means of the solution: {name}"


# ---- check: rules that need no model ----

def find_object(text):
    """The JSON object in a text that is most like a draft or a verdict, whatever stands around it."""
    text = re.sub(r"(?s)^.*</think>", "", text or "")
    decoder = json.JSONDecoder(strict=False)  # a text may have line breaks
    best = {}
    for start in re.finditer(r"\{", text):
        try:
            found, _ = decoder.raw_decode(text, start.start())
        except (ValueError, RecursionError):
            continue
        found = {key.lower(): value for key, value in found.items() if value is not None}
        if {"query", "leaks"} & found.keys() and len(found) > len(best):  # thoughts may hold an example
            best = found
    return best or None


def draft_of(answer, form=Draft):
    """(the Draft or Verdict in an answer, None) or (None, the reason why there is none)."""
    if "refused" in answer:
        return None, f"the endpoint refused it: {answer['refused']}"
    found = find_object(answer["content"])
    if found is None:
        told = f"holds no {form.__name__.lower()}: {answer['content'][:60]!r}"
        return None, f"the answer ({answer['finish_reason']}) {told}"
    for key in ("subdomain", "difficulty"):
        found[key] = re.sub(r"\W+", "_", str(found.get(key)).lower()).strip("_")
    optional = {"interfaces": [], "rubric": [], "reason": "", "answerable": True, "why": ""}
    try:
        return form(**optional | found), None
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        return None, f"the answer's {'.'.join(map(str, first['loc']))} is not usable: {first['msg']}"


def read_draft(row):
    """Fill the task from the model's answer; returns the reasons against it."""
    row["meta"] |= {"model": row["answer"]["model"], "usage": usage_of(row["answer"])}
    draft, reason = draft_of(row["answer"])
    if reason:
        return [reason]
    turn = {"query": query_of(draft)}
    if "task" in row:
        turn |= {key: row["task"]["turns"][0][key] for key in ("check", "solution")}
    rubric = [text.strip() for text in draft.rubric if text.strip()]
    turn |= {"rubric": rubric} if rubric else {}
    row["meta"]["difficulty"] = draft.difficulty
    row |= {"domain": DOMAINS[draft.subdomain], "subdomain": draft.subdomain, "turns": [turn]}
    return [] if draft.answerable else ["not answerable, says the model"]


def query_of(draft):
    """The text of a draft, with the names that it left out."""
    query = draft.query.strip()
    names = filter(None, map(str.strip, draft.interfaces))
    names = [f"`{name}`" for name in names if not uses(query, name)]
    return f"{query}\n\nNames to keep to: {', '.join(names)}" if names and query else query


def bounds(turn):
    """Reasons against the size and form of what a model or a reviewer wrote."""
    words = turn["query"].lower().split()
    if not re.search(r"\w", turn["query"]):
        yield "the query is empty"
    elif len(words) < 40:
        yield "shorter than 40 words"
    elif len(words) > 600 or len(turn["query"]) > 5000:
        yield "longer than 600 words"
    elif sum(word.strip(".,;:") in ENGLISH for word in words) < len(words) / 8:
        yield "not in English"
    rubric = turn.get("rubric", [])
    if not turn.get("check") and not rubric:
        yield UNGRADED
    if not all(map(str.strip, rubric)):
        yield "an empty requirement in its rubric"
    if len("".join(rubric)) > 500 * len(rubric) or len(rubric) > 10:
        yield "a rubric of more than ten requirements, or of more than 500 characters each"


def stands_in_tree(clone, commit, text, rule="-i"):
    """Does the longest run of plain characters of a text stand in the tree? rule: -w for a whole name."""
    longest = max(re.findall(r"[^\"'`\\\n{}%]+", text) or [text], key=len).strip()
    try:
        return bool(git(clone, "grep", rule, "-q", "-F", "-e", longest, commit) or True)
    except InputError:  # its exit status for no match
        return False


def unstated(text, row):
    """Yield what the tests demand and nobody could know: texts, and names that the change brings."""
    material = row["material"]
    for asked in material["asked"]:
        if not says(text, asked) and not stands_in_tree(*row["tree"], asked):
            yield f"the tests ask for a text it does not give: {asked}"
    for name in demanded_names(material["secret"], material["tests"]):
        if not uses(text, name) and not stands_in_tree(*row["tree"], name, "-w"):
            yield f"the tests ask for a name it does not give: {name}"


def text_reasons(row):
    """The reasons of all rules against a written task; a reviewer's edit goes through them again."""
    reasons = []
    is_own = not is_mined(row) and "material" not in row
    for turn in row["turns"]:
        reasons += [reason for reason in bounds(turn) if reason == UNGRADED or not is_own]
    if is_mined(row) and "material" in row:
        reasons += secret_reasons(row)
    if is_mined(row) or "tree" in row:
        reasons += [f"mentions {name}" for name, rule in TEXT_RULES.items() if re.search(rule, text_of(row))]
    return list(dict.fromkeys(reasons))


def secret_reasons(row):
    """What a task gives away of its pull request, and what it keeps back although the tests ask for it."""
    paths = re.findall(r"(?m)^--- a/(.+?)\t?$", row["material"]["secret"])
    paths = sorted(set(paths) & set(paths_of(*row["tree"])))  # a submodule is no file
    old = "\n".join(show(*row["tree"], path) for path in paths)
    solution = Solution(row["material"], old, row["meta"]["title"])
    yield from solution.leaks(text_of(row))
    for requirement in row["turns"][0].get("rubric", []):
        for reason in solution.leaks(requirement):
            yield f"its rubric {reason}"
    if "task" in row:
        yield from unstated(text_of(row), row)


def benchmark_ngrams(paths):
    """Runs of 13 words in the texts of benchmark files."""
    grams = set()
    for path in map(Path, paths):
        files = [path] if path.is_file() else sorted(path.rglob("*"))
        files = [file for file in files if file.suffix in (".json", ".jsonl", ".md", ".txt")]
        if not files:
            raise InputError(f"--benchmark {path}: no such file, and no *.json, *.jsonl, *.md or *.txt in it")
        for file in files:
            text = file.read_text(encoding="utf-8", errors="replace")
            if file.suffix != ".md":  # what JSON writes as \n or \u00e9
                text = re.sub(r"\\(u([\da-fA-F]{4})|.)", lambda sign: chr(int(sign[2] or "20", 16)), text)
            grams |= runs_of(words_of(text), 13)
    return grams


def ask_judge(settings, work, rows):
    """Store another model's verdict beside the rules' own; a leak that it sees is a reason."""
    prompts = []
    for row in rows:
        text = "\n".join([text_of(row), *row["turns"][0].get("rubric", [])])
        user = f"The task:\n{text}\n\nThe change:\n{row['material']['secret']}\n"
        user += f"Its tests:\n{row['material']['tests']}"
        prompts.append([{"role": "system", "content": JUDGE}, {"role": "user", "content": user}])
    answers = answers_to(settings, work, rows, prompts, settings.judge_model, Verdict)
    for row, answer in zip(rows, answers):
        verdict, reason = draft_of(answer, Verdict)
        row["meta"]["judge"] = {"model": settings.judge_model} | (verdict.model_dump() if verdict else {})
        if reason or verdict.leaks:
            row["reasons"].append(reason or f"leaks, says the judge: {verdict.why}")


def check(settings, work, rows):
    """Give every task the reasons against it; of two that are nearly the same the first is kept."""
    benchmark = benchmark_ngrams(settings.benchmark)
    live = [row for row in open_rows(rows) if "parts" not in row]  # a chain is filled from its parts
    for row in live:
        if "material" in row:
            row["reasons"] += read_draft(row) or text_reasons(row)
        if re.search(SECRET, text_of(row)):
            row["reasons"].append("a secret or an e-mail address")
        if runs_of(words_of(text_of(row)), 13) & benchmark:
            row["reasons"].append("shares 13 words in a row with a benchmark")
    if settings.judge_model:
        ask_judge(settings, work, list(filter(is_mined, open_rows(live))))
    fill_chains(rows)
    mark_repetitions(open_rows(rows))
    print(f"to review: {work / '4_check.jsonl'} ({len(open_rows(rows))} tasks)")
    return rows


def fill_chains(rows):
    """The turns of a chain are those of its parts; it takes their place if all of them passed."""
    by_id = {row["query_id"]: row for row in reversed(rows)}  # of one number the first was proven
    for row in rows:
        if "parts" not in row or row["reasons"]:
            continue
        parts = [by_id[name] for name in row["parts"]]
        if any(part["reasons"] for part in parts):
            row["reasons"] = ["one of its turns was rejected"]
            continue
        row |= {key: parts[0][key] for key in ("domain", "subdomain")}
        for part, proven in zip(parts, row["task"]["turns"]):
            row["turns"].append(part["turns"][0] | without(proven, "query"))
            part["reasons"] = [f"a turn of {row['query_id']}"]


def mark_repetitions(rows):
    near = similarities(list(map(text_of, rows)))
    for i, row in enumerate(rows):
        same = [other for j, other in enumerate(rows[:i]) if near[i, j] > 0.8 and not other["reasons"]]
        row["reasons"] += [f"nearly the same as another: {other['query_id']}" for other in same[:1]]


# ---- select ----

def text_of(row):
    return "\n".join(turn["query"] for turn in row["turns"])


class Edit(pydantic.BaseModel):  # what a reviewer changed
    queries: list[pydantic.constr(pattern=r"\w")] | None = None
    rubric: list[pydantic.constr(pattern=r"\w")] | None = None
    domain: Literal["vibe_coding", "research"] | None = None
    subdomain: str | None = None


class Review(pydantic.BaseModel):
    query_id: str
    reviewer: str
    decision: Literal["accept", "reject"]
    reason: str | None = None
    edit: Edit | None = None
    at: str = ""


def decisions(path):
    """{query_id: {reviewer: last decision}}, and the edits in the order in which they were made."""
    found, edits = defaultdict(dict), defaultdict(list)
    named = read_jsonl(path, append_only=True) if path.exists() else ()
    rows = [checked(Review, where, row) for where, row in named]
    for row in sorted(rows, key=lambda row: row["at"]):
        found[row["query_id"]][row["reviewer"]] = row
        if "edit" in row:
            edits[row["query_id"]].append(row["edit"])
    return found, edits


def apply_edits(row, edits, by_id):
    """The rules judge an edited task again; of a chain every turn, as the pull request that it was."""
    for edit in edits:
        row |= without(edit, "queries", "rubric")
        for turn, query in zip(row["turns"], edit.get("queries", [])):
            turn["query"] = query
        if "rubric" in edit:
            row["turns"][0]["rubric"] = edit["rubric"]
    if not row["turns"][0].get("rubric", True):
        del row["turns"][0]["rubric"]
    row["reasons"] += text_reasons(row) if edits else []
    for name, turn in zip(row.get("parts", ()) if edits else (), row["turns"]):
        row["reasons"] += secret_reasons(by_id[name] | {"turns": [turn]})


def apply_reviews(rows, path, reject):
    """Use the reviewers' edits, which go through the rules again, and rejections; print their agreement."""
    found, edits = decisions(path)
    by_id = {row["query_id"]: row for row in reversed(rows)}
    for row in open_rows(rows):
        apply_edits(row, edits[row["query_id"]], by_id)
        given = found[row["query_id"]].values()
        against = [one.get("reason") or "no reason" for one in given if one["decision"] == "reject"]
        if len(against) > (0 if reject == "any" else len(given) / 2):
            row["reasons"] += [f"rejected by a reviewer: {reason}" for reason in against]
    units = []
    for given in filter(None, found.values()):
        units.append([one["decision"] for one in given.values()])
    if units:
        alpha, n = agreement(units)
        print(f"review: {len(units)} tasks decided, {n} by two or more; Krippendorff's alpha {alpha:.2f}")


def agreement(units):
    """(Krippendorff's alpha for nominal values, number of units with two or more); 1.0 where nobody differs.

    units: the decisions on each task. alpha = 1 - observed / expected disagreement.
    """
    units = [Counter(unit) for unit in units if len(unit) > 1]
    values = sum(units, Counter())
    observed = sum(different_pairs(unit) / (unit.total() - 1) for unit in units)
    expected = different_pairs(values) / max(values.total() - 1, 1)
    return (1 - observed / expected if expected else 1.0), len(units)


def different_pairs(counts):
    """Ordered pairs of values that differ."""
    return counts.total() ** 2 - sum(count * count for count in counts.values())


def similarities(texts):
    """Cosine of TF-IDF between every two texts, [n, n]."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectors = TfidfVectorizer(sublinear_tf=True, token_pattern=r"\w+").fit_transform([*texts, "end"])[:-1]
    return (vectors @ vectors.T).toarray()


def diverse(rows, n, max_per_repo):
    """At most n rows in order: the domain rarest so far, then maximal marginal relevance.

    Greedy, so that a smaller n gives the beginning of the same order.
    """
    near = similarities([text_of(row) for row in rows])
    chosen = []
    left = list(range(len(rows)))
    domains = Counter()
    repos = Counter()

    def gain(i):
        quality = 0.5 if rows[i]["meta"].get("difficulty") == "easy" else 1.0
        return -domains[rows[i]["domain"]], quality - 0.5 * max(near[i, chosen], default=0)

    while left and len(chosen) < n:
        chosen.append(best := max(left, key=gain))
        domains[rows[best]["domain"]] += 1
        repos[rows[best]["meta"].get("repo")] += 1
        left = [i for i in left if i != best and repos[rows[i]["meta"].get("repo")] < max_per_repo]
    return [rows[i] for i in chosen]


def place_folders(row, output, given):
    """Put workspace and private beside the output: the folder can be moved as a whole."""
    if "task" in row:
        proven = ("workspace", "private", "venv", "needs")
        row |= {key: row["task"][key] for key in proven if key in row["task"]}
    elif "tree" in row:  # no tests, no environment: a tree alone
        row["workspace"] = str(output.parent / "workspaces" / row["query_id"])
        shutil.rmtree(row["workspace"], ignore_errors=True)
        checkout(*row["tree"], row["workspace"])
    for name, folder in (("workspace", "workspaces"), ("private", "private")):
        if name in row:
            source = Path(row[name])
            target = output.parent / folder / (row["query_id"] + (source.suffix if source.is_file() else ""))
            place_folder(source, target, given)
            row[name] = str(target.relative_to(output.parent))
    if "venv" in row:
        row["venv"] = os.path.relpath(row["venv"], output.parent)


def place_folder(source, target, given):
    """Copy a folder or a .tar to where it is not yet, and nothing that is given lies."""
    place = target.resolve()
    if source.resolve() == place:
        return
    if source.resolve() in place.parents:
        raise InputError(f"{source}: this workspace holds the output: choose another --output_file")
    if any(place in (path, *path.parents) for path in given):
        raise InputError(f"{target}: would take the place of a given folder: choose another --output_file")
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(target, ignore_errors=True)
    if source.is_dir():
        shutil.copytree(source, target, symlinks=True)
    else:
        shutil.copy(source, target)


def interleave(groups):
    """One list of several, in which every beginning has the mixture of the whole."""
    ranked = []
    for group in groups:
        ranked += [((i + 0.5) / len(group), row["query_id"], row) for i, row in enumerate(group)]
    return [row for _, _, row in sorted(ranked, key=lambda one: one[:2])]


def select(settings, work, rows):
    """Choose, and write both files."""
    apply_reviews(rows, work / "reviews.jsonl", settings.reject)
    good = open_rows(rows)
    mined = list(filter(is_mined, good))
    own = diverse([row for row in good if row not in mined], settings.n_real, len(good))
    mined = diverse(mined, settings.n_pr, settings.max_per_repo)
    if (settings.real or settings.papers or settings.issues) and len(own) < settings.n_real:
        print(f"select: --n_real {settings.n_real}, but only {len(own)} can be had")
    if settings.repos and len(mined) < settings.n_pr:
        print(f"select: --n_pr {settings.n_pr}, but only {len(mined)} can be had")
    chosen = interleave([own, mined])
    leave_out(good, chosen, OVER_QUOTA)
    write_both(Path(settings.output_file), chosen, [row for row in rows if row["reasons"]])
    return rows


def write_both(output, chosen, rejected):
    """The tasks with their folders, and the rejected ones with their reasons."""
    given = set()
    for row in chosen + rejected:
        given.update(Path(row[name]).resolve() for name in ("workspace", "private") if name in row)
    for row in chosen:
        place_folders(row, output, given)
    path = output.with_name("rejected_" + output.name)
    write_jsonl(path, map(finished, rejected))
    if not chosen:
        raise InputError(f"no query is left: {path} says why; {what_to_do(rejected)}")
    write_jsonl(output, (without(finished(row), "reasons") for row in chosen))


def finished(row):
    """The task alone, without what only the steps need; a mined one keeps its solution as a diff in meta."""
    if is_mined(row) and "material" in row:
        row["meta"]["code_diff"] = row["material"]["secret"]
    return without(row, "pr", "tree", "material", "task", "answer", "parts")


def what_to_do(rows):
    """The commonest reason and its remedy, of those that got past the rule if any did."""
    if not rows:
        return "no merged pull request was found: does the clone have a history with their numbers?"
    rows = [row for row in rows if "material" in row and BEYOND not in row["reasons"]] or rows
    [(reason, count)] = Counter(row["reasons"][0] for row in rows).most_common(1)
    known = [remedy for start, remedy in REMEDIES.items() if reason.startswith(start)]
    return f"mostly ({count} of {len(rows)}): {reason}: {[*known, 'mine more repositories'][0]}"


def print_funnel(rows, chosen):
    """The paper's funnel with this run's numbers."""
    pulls = [row for row in rows if row["source"] == "pull_request"]
    lost = Counter(row["reasons"][0] for row in pulls if row["reasons"])
    drawn = [row for row in pulls if is_mined(row)]
    passed = len(drawn) + lost[NOT_DRAWN]
    short = passed + lost["only markdown"]
    print_counts({
        "repositories (paper: 100 with over 10,000 stars each, which a clone does not know)":
            len({row["meta"]["repo"] for row in pulls}),
        "merged pull requests": short + lost["not under 1,200 tokens"],
        "under 1,200 tokens": short,
        "not only markdown": passed,
        "drawn, at most 100 a repository": len(drawn),
        "written": sum("answer" in row for row in pulls),
        "passed the rules and the reviewers": sum(set(row["reasons"]) <= {OVER_QUOTA} for row in drawn),
        "chosen (paper: 18)": sum(map(is_mined, chosen)),
    }.items())


def write_settings(settings):
    """Everything that decided about the output, beside it."""
    inputs = {clone: head_of(clone) for clone in settings.repos}
    for path in filter(None, (settings.real, settings.issues, __file__)):
        if os.path.isfile(path):
            inputs[path] = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    versions = {name: importlib.metadata.version(name) for name in ("openai", "pydantic", "scikit-learn")}
    versions["python"] = sys.version.split()[0]
    record = {"settings": asdict(settings), "versions": versions, "inputs": inputs}
    path = Path(settings.output_file).with_suffix(".settings.json")
    path.write_text(json.dumps(record, indent=1) + "\n")


def check_rule(settings):
    """Raises InputError for a setting that only the other rule reads."""
    defaults = Settings()
    for name in OF_TESTS if settings.rule == "paper" else ("seed",):
        if getattr(settings, name) != getattr(defaults, name):
            raise InputError(f"--{name} does nothing with --rule {settings.rule}")


def check_settings(settings):
    check_rule(settings)
    if not (settings.real or settings.repos or settings.papers):
        raise InputError("nothing to read: give --real FILE_OR_DIR, --repos CLONE... or --papers DIR")
    if settings.issues and not settings.repos:
        raise InputError("--issues needs the clones of their repositories: --repos CLONE...")
    for name in ("concurrency", "timeout", "call_seconds", "setup_seconds"):
        if getattr(settings, name) < 1:
            raise InputError(f"--{name} must be 1 or more")
    if settings.timeout > 500:
        raise InputError("--timeout must be 500 or less: 04 ends a check after 600 s (--check_seconds)")
    if settings.test_command and "{report}" not in settings.test_command:
        raise InputError("--test_command must write JUnit XML: pytest --junitxml={report} {files}")


def main(settings):
    check_settings(settings)
    work = Path(settings.output_file).absolute().with_name("work")  # 04 reads task files that lie elsewhere
    work.mkdir(parents=True, exist_ok=True)
    rows, before = None, None
    for number, step in enumerate((mine, verify, write, check, select), 1):
        name = f"{number}_{step.__name__}"
        if settings.step in ("all", step.__name__):
            rows = step_rows(work, before) if before and rows is None else rows or []
            live = open_rows(rows)
            rows = step(settings, work, rows)
            if not settings.dry_run:
                write_jsonl(work / f"{name}.jsonl", rows)
            if step is verify and settings.rule == "paper":
                print("verify: pull requests are not run: --rule paper demands no tests")
                live = [row for row in live if not is_mined(row)]
            print_step(step.__name__, live)
        before = name
    if settings.step in ("all", "select"):
        print_selection(settings, rows)


def print_selection(settings, rows):
    write_settings(settings)
    chosen = open_rows(rows)
    if settings.rule == "paper":
        print_funnel(rows, chosen)
    print(f"queries: {len(chosen)}\nrejected: {len(rows) - len(chosen)}\noutput_file: {settings.output_file}")


def print_step(name, live):
    """How many tasks passed a step, own queries and pull requests apart, and why the others did not."""
    groups, counts = defaultdict(list), defaultdict(Counter)
    for row in live:
        groups[row["source"]].append(not row["reasons"])
        for reason in row["reasons"]:
            counts[row["source"]][reason if reason.startswith("environment") else reason.split(": ")[0]] += 1
    for source, passed in groups.items():
        print(f"{name}: {sum(passed)} of {len(passed)} pass ({source})")
        print_counts(counts[source].most_common())


if __name__ == "__main__":
    try:
        main(*parse_settings(TrlParser(Settings)))
    except (InputError, OSError) as error:
        print(f"{Path(__file__).name}: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"{Path(__file__).name}: stopped; run again to go on", file=sys.stderr)
        sys.exit(130)
