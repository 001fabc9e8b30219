"""The work of bench.py's agent in Inspect: its generate loop, its openai-api provider, a tool that reads.

    PYTHON recipes/bench/inspect_loop.py BASE_URL EPISODES FOLDER

PYTHON is of an environment with inspect-ai 0.3.285 and openai. Prints [CPU seconds, seconds, steps] as JSON.
It has no sandbox, 04's loop has one.
"""

import json
import os
import sys
import tempfile
import time
from pathlib import Path

EPISODES = int(sys.argv[2])
FOLDER = Path(sys.argv[3])
os.environ |= {"LOCAL_BASE_URL": sys.argv[1], "LOCAL_API_KEY": "x"}

from inspect_ai import Task, eval  # noqa: E402
from inspect_ai.dataset import Sample  # noqa: E402
from inspect_ai.solver import solver  # noqa: E402
from inspect_ai.tool import tool  # noqa: E402


@tool
def read_file():
    async def execute(absolute_path: str):
        """Read a text file.

        Args:
            absolute_path: The file.
        """
        return (FOLDER / Path(absolute_path).name).read_text()

    return execute


@solver
def agent():
    async def solve(state, generate):
        state.tools = [read_file()]
        return await generate(state, tool_calls="loop")

    return solve


samples = [Sample(id=number, input=f"t{number}") for number in range(EPISODES)]
task = Task(dataset=samples, solver=agent())
many = {"max_connections": EPISODES, "max_samples": EPISODES, "temperature": 0.6, "top_p": 0.95}
started = time.perf_counter()
cpu = time.process_time()
steps = 0
with tempfile.TemporaryDirectory() as logs:
    (log,) = eval(task, model="openai-api/local/x", display="none", log_dir=logs, **many)
    times = time.process_time() - cpu, time.perf_counter() - started
    assert log.status == "success", log.error
    for sample in log.samples:  # read from the disk
        steps += sum(message.role == "assistant" for message in sample.messages)
print(json.dumps([*times, steps]))
