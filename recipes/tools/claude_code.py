"""Claude Code's tools (names and parameters of 2.1, and of 1.0 where they were others; the words are ours):

    python 04_eval.py --tools recipes/tools/claude_code.py ...    # functions, run beside the server
    python 02_format_trajectories.py ~/.claude/projects           # schemas of sessions that hold none

The server gives ROOT, clip(text) and run_command(command, folder, seconds) -> (exit code, stdout, stderr).
What needs a network, a person or another agent says so in one line.
"""
import json
import os
import re
import shlex
import signal
import tempfile

TOOLS = []
STATE = {"folder": None, "todos": []}  # what lasts from call to call
SEEN = set()  # files that were read or written: only those may be changed
TASKS = {}  # id of a command in the background: [its process, the file of its output, characters told so far]
FOLDERS = (".git", "node_modules", "__pycache__")
TYPES = {"py": "py pyi", "js": "js jsx mjs cjs", "ts": "ts tsx", "rust": "rs", "go": "go", "java": "java",
         "c": "c h", "cpp": "cc cpp cxx hpp h", "md": "md", "json": "json", "html": "html htm"}  # fmt: skip
TODO = {
    "type": "object",
    "properties": {
        "content": {"type": "string"},
        "status": {"type": "string", "enum": ["pending", "in_progress", "completed"]},
        "activeForm": {"type": "string", "description": "The task as it is said while it is done."},
    },
    "required": ["content", "status", "activeForm"],
}
EDIT = {
    "type": "object",
    "properties": {
        "old_string": {"type": "string"},
        "new_string": {"type": "string"},
        "replace_all": {"type": "boolean"},
    },
    "required": ["old_string", "new_string"],
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


def array_of(items):
    return {"type": "array", "items": items if isinstance(items, dict) else {"type": items}}


def one_of(*values):
    return {"type": "string", "enum": list(values)}


def full(path):
    """An absolute path; a relative one starts at the folder of the last command, while there is one."""
    here = STATE["folder"] if os.path.isdir(STATE["folder"] or "") else ROOT  # noqa: F821
    return os.path.join(here, path)


def text_of(path):
    if not os.path.exists(path):
        raise ValueError(f"File does not exist: {path}")
    if not os.path.isfile(path):
        raise ValueError(f"Not a regular file: {path}")
    with open(path, encoding="utf-8", errors="replace", newline="") as file:
        return file.read(50_000_000)


def save(path, text):
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    with open(path, "w", encoding="utf-8", errors="replace", newline="") as file:
        file.write(text)
    SEEN.add(path)


# Commands
@tool("Run a bash command. The working directory stays for the next command, variables do not.",
      command="string", timeout="number: Milliseconds, at most 600000; 120000 if left out.",
      description="string: What the command does, in a few words.",
      run_in_background="boolean: Return at once; read the output with TaskOutput.",
      dangerouslyDisableSandbox="boolean")  # fmt: skip
def Bash(command, timeout=120_000, description="", run_in_background=False, dangerouslyDisableSandbox=False):
    folder = full(".")
    if run_in_background:
        return start(command, folder)
    with tempfile.NamedTemporaryFile("r") as place:
        told = f"{command}\n_code=$?; pwd -P > {place.name} 2> /dev/null; exit $_code"
        code, stdout, stderr = run_command(told, folder, min(timeout, 600_000) / 1000)  # noqa: F821
        moved = place.read().strip()
    STATE["folder"] = moved or folder
    output = "\n".join(filter(None, [stdout, stderr]))
    if code is None:
        raise ValueError(f"Command timed out\n{output}")
    if code:
        raise ValueError(f"Exit code {code}\n{output}")
    return output or "(no output)"


def start(command, folder):
    log = tempfile.mkstemp(prefix="task-")[1]
    command = f"setsid bash -c {shlex.quote(command)} > {log} 2>&1 & echo $!"
    _, process, _ = run_command(command, folder)  # noqa: F821
    task = f"bash_{len(TASKS) + 1}"
    TASKS[task] = [int(process), log, 0]
    return f"Command running in background with ID: {task}"


def is_running(process):
    try:
        with open(f"/proc/{process}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def task_of(id):
    if id not in TASKS:
        raise ValueError(f"No task found with ID: {id}")
    return TASKS[id]


def news_of(id):
    """The state of a command in the background and what it wrote since the last look."""
    process, log, told = task_of(id)
    text = text_of(log)
    TASKS[id][2] = len(text)
    state = "running" if is_running(process) else "completed"
    return f"<status>{state}</status>\n<output>\n{clip(text[told:])}\n</output>"  # noqa: F821


@tool("Read what a command in the background has written.", task_id="string",
      block="boolean: Wait for its end.", timeout="number: Milliseconds to wait.")  # fmt: skip
def TaskOutput(task_id, block=True, timeout=30_000):
    process = task_of(task_id)[0]
    if block:
        wait = f"while kill -0 {process}; do sleep 0.1; done 2> /dev/null"
        run_command(wait, ROOT, min(timeout, 600_000) / 1000)  # noqa: F821
    return news_of(task_id)


@tool("Stop a command in the background.", task_id="string", shell_id="string: The old name of task_id.")
def TaskStop(task_id=None, shell_id=None):
    id = task_id or shell_id
    process = task_of(id)[0]
    if is_running(process):
        os.killpg(process, signal.SIGKILL)
    return f"Successfully stopped task: {id}"


@tool("Read what a command in the background has written since the last look (before 2.0.64).",
      bash_id="string", filter="string: Regular expression of the lines to show.")  # fmt: skip
def BashOutput(bash_id, filter=None):
    lines = news_of(bash_id).splitlines()
    return "\n".join(line for line in lines if not filter or line[:1] == "<" or re.search(filter, line))


@tool("Stop a command in the background (before 2.0.64).", shell_id="string")
def KillShell(shell_id):
    return TaskStop(shell_id)


# Files
@tool("Read a text file; the lines come numbered.", file_path="string: Absolute path.",
      offset="number: First line, counted from 1.", limit="number: Number of lines, 2000 if left out.",
      pages="string: Pages of a PDF.")  # fmt: skip
def Read(file_path, offset=1, limit=2000, pages=None):
    path = full(file_path)
    if path.endswith((".png", ".jpg", ".jpeg", ".gif", ".webp", ".pdf")):
        raise ValueError("Images and PDF files cannot be shown here.")
    lines = text_of(path).splitlines()
    SEEN.add(path)
    first = max(int(offset), 1)
    shown = []
    for number, line in enumerate(lines[first - 1 : first - 1 + int(limit)], first):
        shown.append(f"{number:6}\t{line[:2000]}")
    return clip("\n".join(shown)) or "(the file is empty here)"  # noqa: F821


@tool("Write a file; one that exists must have been read before.", file_path="string: Absolute path.",
      content="string")  # fmt: skip
def Write(file_path, content):
    path = full(file_path)
    known = os.path.exists(path)
    if known and path not in SEEN:
        raise ValueError("File has not been read yet. Read it first before writing to it.")
    save(path, content)
    return f"{'The file has been updated' if known else 'File created successfully'}: {file_path}"


def replaced(text, old_string, new_string, replace_all):
    count = text.count(old_string) if old_string else 0
    if old_string == new_string:
        raise ValueError("No changes to make: old_string and new_string are the same.")
    if not count:
        raise ValueError(f"String to replace not found in file.\nString: {old_string}")
    if count > 1 and not replace_all:
        raise ValueError(f"Found {count} matches of the string to replace, but replace_all is false.")
    return text.replace(old_string, new_string)


@tool("Replace a text in a file. It must occur once, unless replace_all.", file_path="string: Absolute path.",
      old_string="string", new_string="string", replace_all="boolean")  # fmt: skip
def Edit(file_path, old_string, new_string, replace_all=False):
    edit = {"old_string": old_string, "new_string": new_string, "replace_all": replace_all}
    return MultiEdit(file_path, [edit])


@tool("Several replacements in one file, one after the other; all or none (before 2.0).",
      file_path="string: Absolute path.", edits=array_of(EDIT))  # fmt: skip
def MultiEdit(file_path, edits):
    path = full(file_path)
    if edits[0]["old_string"] == "" and not os.path.exists(path):
        save(path, edits[0]["new_string"])
        return f"File created successfully: {file_path}"
    text = text_of(path)
    if path not in SEEN:
        raise ValueError("File has not been read yet. Read it first before writing to it.")
    for edit in edits:
        text = replaced(text, edit["old_string"], edit["new_string"], edit.get("replace_all", False))
    save(path, text)
    return f"The file {file_path} has been updated successfully."


@tool("Change a cell of a Jupyter notebook.", notebook_path="string: Absolute path.", new_source="string",
      cell_id="string: Its id, or its number as cell-N.", cell_type=one_of("code", "markdown"),
      edit_mode=one_of("replace", "insert", "delete"))  # fmt: skip
def NotebookEdit(notebook_path, new_source, cell_id=None, cell_type=None, edit_mode="replace"):
    path = full(notebook_path)
    notebook = json.loads(text_of(path))
    cells = notebook["cells"]
    place = -1 if edit_mode == "insert" and not cell_id else place_of(cells, cell_id)
    if edit_mode == "delete":
        del cells[place]
    elif edit_mode == "insert":
        cell = {"cell_type": cell_type or "code", "metadata": {}, "source": new_source}
        if cell["cell_type"] == "code":
            cell |= {"outputs": [], "execution_count": None}
        cells.insert(place + 1, cell)
    else:
        cells[place]["source"] = new_source
        cells[place]["cell_type"] = cell_type or cells[place]["cell_type"]
    save(path, json.dumps(notebook, indent=1))
    return f"Notebook {notebook_path}: {edit_mode} done."


def place_of(cells, cell_id):
    for place, cell in enumerate(cells):
        if cell_id in (cell.get("id", ""), f"cell-{place}"):
            return place
    raise ValueError(f"Cell not found: {cell_id}")


# Search
def files_below(folder):
    """Regular files below a folder, or the file itself."""
    if os.path.isfile(folder):
        return [folder]
    found = []
    for here, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if name not in FOLDERS)
        for name in sorted(files):
            path = os.path.join(here, name)
            found += [path] if os.path.isfile(path) else []
    return found


def glob_regex(pattern):
    """'**/' stands for zero or more folders; {a,b} for one of several."""
    parts = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]", "{": "(?:", "}": ")", ",": "|"}
    regex = ""
    for part in re.split(r"(\*\*/|\*\*|\*|\?|\{|\}|,|\[[^\]]+\])", pattern):
        regex += parts.get(part) or (part if part.startswith("[") else re.escape(part))
    return re.compile(regex)


@tool("Find files by a glob pattern; the last changed come first.", pattern="string: E.g. '**/*.py'.",
      path="string: Folder to search in.")  # fmt: skip
def Glob(pattern, path=""):
    folder = full(path)
    regex = glob_regex(os.path.relpath(pattern, folder) if os.path.isabs(pattern) else pattern)
    found = [file for file in files_below(folder) if regex.fullmatch(os.path.relpath(file, folder))]
    found.sort(key=os.path.getmtime, reverse=True)
    more = ["(Results are truncated. Use a more specific path or pattern.)"] if len(found) > 100 else []
    return "\n".join(found[:100] + more) or "No files found"


@tool("Search the contents of files by regular expression.", pattern="string", path="string: File or folder.",
      glob="string: Only files that match, e.g. '*.js'.",
      output_mode=one_of("content", "files_with_matches", "count"),
      **{"-B": "number: Lines before each match.", "-A": "number: Lines after it.",
         "-C": "number: Lines around it.", "-n": "boolean: Line numbers; true if left out.",
         "-i": "boolean: Ignore case."},
      context="number: The same as -C.", type="string: Kind of file: py, js, rust ...",
      head_limit="number: At most this many lines, 250 if left out; 0 for all.",
      offset="number: Skip this many.", multiline="boolean: . matches line ends.")  # fmt: skip
def Grep(pattern, path="", glob=None, output_mode="files_with_matches", type=None, **options):
    flags = re.IGNORECASE if options.get("-i") else 0
    flags |= re.DOTALL | re.MULTILINE if options.get("multiline") else re.MULTILINE
    regex = re.compile(pattern, flags)
    lines = []
    for file in searched(full(path), glob, type):
        text = text_of(file)
        hits = [text.count("\n", 0, hit.start()) for hit in regex.finditer(text)]
        if hits and output_mode == "content":
            lines += around(file, text.splitlines(), hits, options)
        elif hits:
            lines.append(file if output_mode == "files_with_matches" else f"{file}:{len(hits)}")
    first = int(options.get("offset", 0))
    last = first + int(options.get("head_limit", 250) or len(lines))
    return clip("\n".join(lines[first:last])) or "No matches found"  # noqa: F821


def searched(folder, glob, kind):
    """The files below a folder that match a glob and are of a kind, where these are given."""
    ends = TYPES.get(kind, kind or "").split()
    found = []
    for file in files_below(folder):
        name = os.path.relpath(file, folder) if os.path.isdir(folder) else os.path.basename(file)
        if (not glob or matches(glob, name)) and (not ends or name.rpartition(".")[2] in ends):
            found.append(file)
    return found


def matches(glob, name):
    return glob_regex(glob if "/" in glob else f"**/{glob}").fullmatch(name)


def around(file, lines, hits, options):
    """The lines of the matches with those around them, as grep prints them."""
    both = options.get("-C", options.get("context", 0))
    before, after = int(options.get("-B", both)), int(options.get("-A", both))
    shown = set()
    for hit in hits:
        shown.update(range(max(0, hit - before), min(len(lines), hit + after + 1)))
    found = []
    for place in sorted(shown):
        mark = ":" if place in hits else "-"
        number = f"{place + 1}{mark}" if options.get("-n", True) else ""
        found.append(f"{file}{mark}{number}{lines[place]}")
    return found


@tool("List the files and folders of a folder (before 2.0).", path="string: Absolute path.",
      ignore=array_of("string"))  # fmt: skip
def LS(path, ignore=()):
    folder = full(path)
    names = []
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if not any(matches(pattern, entry.name) for pattern in ignore):
            names.append(f"  - {entry.name}{'/' if entry.is_dir() else ''}")
    return clip("\n".join([f"- {folder}/", *names]))  # noqa: F821


# Plans
@tool("Write down the list of tasks of this session; each call replaces the list.", todos=array_of(TODO))
def TodoWrite(todos):
    STATE["todos"] = todos
    return "Todos have been modified successfully. Continue to use the list to keep track of your progress."


@tool("Ask for leave to plan before anything is changed.")
def EnterPlanMode():
    return "Entered plan mode. Explore and design; change no file until the plan is approved."


@tool("Show the plan and ask for leave to carry it out.", plan="string: The plan (before 2.1).",
      allowedPrompts=array_of("object"))  # fmt: skip
def ExitPlanMode(plan="", allowedPrompts=()):
    return "The plan has been approved. You can now start coding."


# What there is not in a sandbox without network, person or other agents
@tool("Fetch a page and answer a question about it.", url="string", prompt="string")
def WebFetch(url, prompt):
    raise ValueError("There is no network in this sandbox.")


@tool("Search the web.", query="string", allowed_domains=array_of("string"),
      blocked_domains=array_of("string"))  # fmt: skip
def WebSearch(query, allowed_domains=(), blocked_domains=()):
    raise ValueError("There is no network in this sandbox.")


@tool("Give a task to another agent.", description="string: The task in a few words.", prompt="string",
      subagent_type="string", model=one_of("sonnet", "opus", "haiku"), run_in_background="boolean",
      name="string", team_name="string", isolation=one_of("worktree"),
      mode=one_of("acceptEdits", "auto", "bypassPermissions", "default", "dontAsk", "plan"))  # fmt: skip
def Agent(description, prompt, **options):
    raise ValueError("There are no other agents in this sandbox. Do the task yourself.")


@tool("Give a task to another agent (before 2.1.63).", description="string: The task in a few words.",
      prompt="string", subagent_type="string", model="string", resume="string",
      run_in_background="boolean")  # fmt: skip
def Task(description, prompt, subagent_type=None, **options):
    return Agent(description, prompt)


@tool("Ask the user.", questions=array_of("object"), answers="object", annotations="object",
      metadata="object")  # fmt: skip
def AskUserQuestion(questions, **options):
    raise ValueError("Nobody can answer in this session. Decide yourself.")


@tool("Load a skill.", skill="string: Its name.", args="string")
def Skill(skill, args=""):
    raise ValueError(f"Unknown skill: {skill}")


@tool("Load the schemas of tools that are only named so far.", query="string", max_results="number")
def ToolSearch(query, max_results=5):
    return "No matching deferred tools found"


@tool("List the resources of MCP servers.", server="string")
def ListMcpResourcesTool(server=None):
    return "No resources found. No MCP server is connected."


@tool("Read a resource of an MCP server.", server="string", uri="string")
def ReadMcpResourceTool(server, uri):
    raise ValueError(f'Server "{server}" not found. No MCP server is connected.')
