"""Gemini CLI's tools (names and parameters of 0.61; the words are ours):

    python 04_eval.py --tools recipes/tools/gemini_cli.py ...    # functions, run beside the server
    python 02_format_trajectories.py ~/.gemini/tmp               # schemas of sessions that hold none

(04's own eight are those of 0.4.) The server gives ROOT, clip(text) and run_command(command, folder, seconds)
-> (exit code, stdout, stderr). What needs a network, a person or another agent says so in one line.
"""
import os
import re
import shlex

TOOLS = []
FOLDERS = (".git", "node_modules", "__pycache__")
STRINGS = {"type": "array", "items": {"type": "string"}}
FILTERING = {
    "type": "object",
    "properties": {"respect_git_ignore": {"type": "boolean"}, "respect_gemini_ignore": {"type": "boolean"}},
}
TODO = {
    "type": "object",
    "properties": {
        "description": {"type": "string"},
        "status": {"type": "string", "enum": ["pending", "in_progress", "completed", "cancelled", "blocked"]},
    },
    "required": ["description", "status"],
}


def tool(text, **properties):
    """Adds the function below to TOOLS. A property is a JSON schema or "type: description"; it is required
    where the function has no default for it."""

    def add(function):
        described = {}
        for key, value in properties.items():
            if isinstance(value, str):
                kind, _, told = value.partition(": ")
                value = {"type": kind} | ({"description": told} if told else {})
            described[key] = value
        code = function.__code__
        required = code.co_varnames[: code.co_argcount - len(function.__defaults__ or ())]
        parameters = {"type": "object", "properties": described, "required": list(required)}
        schema = {"name": function.__name__, "description": text, "parameters": parameters}
        TOOLS.append({"type": "function", "function": schema})
        return function

    return add


def full(path):
    return os.path.join(ROOT, path or "")  # noqa: F821


def text_of(path):
    if not os.path.isfile(path):
        raise ValueError(f"File not found: {path}")
    with open(path, encoding="utf-8", errors="replace", newline="") as file:
        return file.read(50_000_000)


def save(path, text):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "w", encoding="utf-8", errors="replace", newline="") as file:
        file.write(text)


def files_below(folder, pattern="**", case_sensitive=True):
    """Regular files whose path from the folder matches a glob; '**/' stands for zero or more folders."""
    parts = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]", "{": "(?:", "}": ")", ",": "|"}
    text = ""
    for part in re.split(r"(\*\*/|\*\*|\*|\?|\{|\}|,|\[[^\]]+\])", pattern):
        text += parts.get(part) or (part if part.startswith("[") else re.escape(part))
    regex = re.compile(text, 0 if case_sensitive else re.IGNORECASE)
    found = []
    for here, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if name not in FOLDERS)
        for name in sorted(files):
            path = os.path.join(here, name)
            if os.path.isfile(path) and regex.fullmatch(os.path.relpath(path, folder)):
                found.append(path)
    return found


# Commands
@tool("Run a command with bash -c.", command="string", description="string: What it does.",
      dir_path="string: Folder to run it in.", is_background="boolean: Return at once.",
      delay_ms="integer: How long to watch a command in the background.")  # fmt: skip
def run_shell_command(command, description="", dir_path="", is_background=False, delay_ms=200):
    if is_background:
        told = f"setsid bash -c {shlex.quote(command)} > /dev/null 2>&1 & echo $!"
        _, process, _ = run_command(told, full(dir_path))  # noqa: F821
        return f"Command moved to background (PID: {process})."
    code, output, _ = run_command(f"exec 2>&1\n{command}", full(dir_path))  # noqa: F821
    if code is None:
        return f"Command timed out and was ended.\nOutput: {output or '(empty)'}"
    return f"Output: {output or '(empty)'}" + (f"\nExit Code: {code}" if code else "")


# Files
@tool("Read a text file.", file_path="string", start_line="integer: First line, counted from 1.",
      end_line="integer: Last line.")  # fmt: skip
def read_file(file_path, start_line=1, end_line=None):
    lines = text_of(full(file_path)).splitlines(keepends=True)
    last = min(len(lines), int(end_line or start_line + 1999))
    text = "".join(line[:2000] for line in lines[int(start_line) - 1 : last])
    if start_line != 1 or last != len(lines):
        text = f"[Lines {int(start_line)}-{last} of {len(lines)}; use start_line and end_line]\n{text}"
    return clip(text)  # noqa: F821


@tool("Write a file; it is created or overwritten.", file_path="string", content="string")
def write_file(file_path, content):
    known = os.path.exists(full(file_path))
    save(full(file_path), content)
    return f"Successfully {'overwrote file' if known else 'created and wrote to new file'}: {file_path}."


@tool("Replace a text in a file. It must occur once, unless allow_multiple.", file_path="string",
      instruction="string: What the change is for.", old_string="string: Empty to create the file.",
      new_string="string", allow_multiple="boolean")  # fmt: skip
def replace(file_path, instruction, old_string, new_string, allow_multiple=False):
    path = full(file_path)
    if old_string == "":
        if os.path.exists(path):
            raise ValueError(f"Failed to edit, the file already exists: {file_path}")
        return write_file(file_path, new_string)
    text = text_of(path)
    count = text.count(old_string)
    if not count:
        raise ValueError(f"Failed to edit, 0 occurrences found for old_string in {file_path}.")
    if count > 1 and not allow_multiple:
        raise ValueError(f"Failed to edit, expected 1 occurrence but found {count} in {file_path}.")
    save(path, text.replace(old_string, new_string))
    return f"Successfully modified file: {file_path} ({count} replacement{'s' if count > 1 else ''})."


@tool("List the files and folders of a folder.", dir_path="string", ignore=STRINGS,
      file_filtering_options=FILTERING)  # fmt: skip
def list_directory(dir_path, ignore=(), file_filtering_options=None):
    hidden = set()
    for pattern in ignore:
        hidden.update(files_below(full(dir_path), pattern))
    rows = []
    for entry in os.scandir(full(dir_path)):
        if entry.path not in hidden:
            rows.append((not entry.is_dir(), entry.name))
    if not rows:
        return f"Directory {dir_path} is empty."
    lines = [name if is_file else f"[DIR] {name}" for is_file, name in sorted(rows)]
    return clip("\n".join([f"Directory listing for {dir_path}:", *lines]))  # noqa: F821


@tool("Read all files that match.", include=STRINGS, exclude=STRINGS, recursive="boolean",
      useDefaultExcludes="boolean", file_filtering_options=FILTERING)  # fmt: skip
def read_many_files(include, exclude=(), **options):
    hidden = set()
    for pattern in exclude:
        hidden.update(files_below(full(""), pattern))
    texts = {}
    for pattern in include:
        for path in files_below(full(""), pattern):
            if path not in hidden:
                texts[path] = f"--- {path} ---\n\n{text_of(path)}\n"
    return clip("\n".join(texts.values())) or "No files matched."  # noqa: F821


# Search
@tool("Find files by a glob pattern.", pattern="string: E.g. '**/*.py'.", dir_path="string",
      case_sensitive="boolean", respect_git_ignore="boolean", respect_gemini_ignore="boolean")  # fmt: skip
def glob(pattern, dir_path="", case_sensitive=False, **options):
    found = files_below(full(dir_path), pattern, case_sensitive)
    return clip("\n".join([f"Found {len(found)} file(s) matching {pattern!r}", *found]))  # noqa: F821


@tool("Search the contents of files by regular expression.", pattern="string", dir_path="string",
      include_pattern="string: Glob of the files to search.",
      exclude_pattern="string: Drop lines that match.", names_only="boolean", case_sensitive="boolean",
      fixed_strings="boolean", context="integer", after="integer", before="integer", no_ignore="boolean",
      max_matches_per_file="integer", total_max_matches="integer")  # fmt: skip
def grep_search(pattern, dir_path="", include_pattern="*", exclude_pattern=None, names_only=False, **options):
    text = re.escape(pattern) if options.get("fixed_strings") else pattern
    regex = re.compile(text, 0 if options.get("case_sensitive") else re.IGNORECASE)
    include = include_pattern if "/" in include_pattern else f"**/{include_pattern}"
    left = options.get("total_max_matches", 20_000)
    count = 0
    rows = []
    for path in files_below(full(dir_path), include):
        lines = text_of(path).splitlines()
        hits = []
        for place, line in enumerate(lines):
            if regex.search(line) and not (exclude_pattern and re.search(exclude_pattern, line)):
                hits.append(place)
        hits = hits[: options.get("max_matches_per_file")][: left - count]
        count += len(hits)
        if hits:
            rows.append(path if names_only else f"File: {os.path.relpath(path, full(dir_path))}")
            rows += [] if names_only else around(lines, hits, options)
    return clip("\n".join([f"Found {count} match(es) for {pattern!r}", *rows]))  # noqa: F821


def around(lines, hits, options):
    """The lines of the matches with those around them."""
    both = options.get("context", 0)
    shown = set()
    for hit in hits:
        first = max(0, hit - options.get("before", both))
        shown.update(range(first, min(len(lines), hit + options.get("after", both) + 1)))
    return [f"L{place + 1}{':' if place in hits else '-'} {lines[place]}" for place in sorted(shown)]


# Notes and plans
@tool("Write down the list of tasks of this session; each call replaces the list.",
      todos={"type": "array", "items": TODO})  # fmt: skip
def write_todos(todos):
    lines = [f"{number}. [{todo['status']}] {todo['description']}" for number, todo in enumerate(todos, 1)]
    return "\n".join(["Successfully updated the todo list. The current list is now:", *lines])


@tool("Remember a fact about the user for later sessions.", fact="string")
def save_memory(fact):
    return f'Okay, I\'ve remembered that: "{fact}"'


@tool("Say what the work is about now.", title="string", summary="string",
      strategic_intent="string")  # fmt: skip
def update_topic(strategic_intent, title="", summary=""):
    return f"Current topic: {title or strategic_intent}"


@tool("Begin to plan before anything is changed.", reason="string")
def enter_plan_mode(reason=""):
    return "Switched to plan mode."


@tool("Show the plan and ask for leave to carry it out.", plan_filename="string")
def exit_plan_mode(plan_filename):
    return "The plan has been approved. You can now start coding."


# What there is not in a sandbox without network, person or other agents
@tool("Fetch pages and work on them.", prompt="string: With the addresses and what to do.")
def web_fetch(prompt):
    raise ValueError("There is no network in this sandbox.")


@tool("Search the web.", query="string")
def google_web_search(query):
    raise ValueError("There is no network in this sandbox.")


@tool("Ask the user.", questions={"type": "array", "items": {"type": "object"}})
def ask_user(questions):
    raise ValueError("Nobody can answer in this session. Decide yourself.")


@tool("Load a skill.", name="string")
def activate_skill(name):
    raise ValueError(f"Skill not found: {name}")


@tool("Give a task to another agent.", agent_name="string", prompt="string")
def invoke_agent(agent_name, prompt):
    raise ValueError("There are no other agents in this sandbox. Do the task yourself.")


@tool("Read the documentation of Gemini CLI.", path="string")
def get_internal_docs(path=""):
    raise ValueError("The documentation is not installed here.")
