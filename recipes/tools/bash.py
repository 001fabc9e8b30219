"""One tool, bash, as mini-swe-agent has it: 04_eval.py --tools recipes/tools/bash.py

Runs beside 04's server, which gives it run_command(command, folder, seconds) -> (exit code, stdout, stderr).
"""
COMMAND = {"type": "string", "description": "The bash command to execute"}
PARAMETERS = {"type": "object", "properties": {"command": COMMAND}, "required": ["command"]}
BASH = {"name": "bash", "description": "Execute a bash command", "parameters": PARAMETERS}
TOOLS = [{"type": "function", "function": BASH}]


def bash(command):
    code, output, _ = run_command(f"exec 2>&1\n{command}")  # noqa: F821
    if code is None:
        return f"<error>the command took too long and was ended</error>\n<output>\n{output}\n</output>"
    return f"<returncode>{code}</returncode>\n<output>\n{output}\n</output>"
