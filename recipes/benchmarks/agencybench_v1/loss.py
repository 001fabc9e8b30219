"""The check of task 8: the loss of workspace/equation.py, as evaluate_equation.py has it, on the task's data.

    python -I loss.py LIMIT FOLDER    # FOLDER has equation.parquet and the equation.py that was given

The equation runs in a process of its own that is asked for predictions and nothing else: what it prints
decides nothing. That process can open no file, so that an equation cannot look the data up; nor may it be
a table of them.
"""

import ctypes
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

try:
    import numpy
    import pandas
    import scipy.integrate  # the equation may use it
    import scipy.special  # and this
    from scipy.optimize import minimize
except ImportError as error:
    sys.exit(f"Bail out! {error}")

LONGEST = 10_000  # characters of equation.py; the data have 4,000 rows
LIMITS = {resource.RLIMIT_NOFILE: 0, resource.RLIMIT_NPROC: 0, resource.RLIMIT_DATA: 4 << 30}


def predict(path):
    """Answer each line of parameters on stdin with a line of predictions; the first line has the inputs."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    source = Path(path).read_text()
    columns = numpy.array(json.loads(input()))
    for limit, value in LIMITS.items():
        resource.setrlimit(limit, (value, value))
    names = {"__name__": "equation"}
    exec(compile(source, "equation.py", "exec"), names)
    for line in sys.stdin:
        values = names["equation"](*columns, numpy.array(json.loads(line)))
        print(json.dumps(numpy.broadcast_to(values, len(columns[0])).tolist()), file=out, flush=True)


class Equation:
    """An equation.py in its process: equation(parameters) -> predictions. ValueError: it gives none."""

    def __init__(self, path, columns):
        command = [sys.executable, "-I", __file__, "--predict", str(path)]
        self.process = subprocess.Popen(command, stdin=-1, stdout=-1, stderr=subprocess.DEVNULL, text=True)
        self.process.stdin.write(json.dumps(columns.tolist()) + "\n")

    def __call__(self, parameters):
        try:
            self.process.stdin.write(json.dumps(list(parameters)) + "\n")
            self.process.stdin.flush()
            return numpy.array(json.loads(self.process.stdout.readline()), dtype=float)
        except (BrokenPipeError, ValueError) as error:
            raise ValueError(f"equation.py gives no predictions ({error})") from None


def verdict(limit, folder):
    """(solved, what was found)."""
    rows = pandas.read_parquet(folder / "equation.parquet").iloc[0]["training_set"]
    observed, *columns = numpy.array([list(row) for row in rows]).T
    ours = Path("workspace/equation.py")
    if ours.is_symlink() or not ours.is_file() or ours.stat().st_size > LONGEST:
        return False, f"workspace/equation.py is missing, or has more than {LONGEST:,} characters"
    equation = Equation(ours, numpy.array(columns))
    given = Equation(folder / "equation.py", numpy.array(columns))
    start = [1.0] * 10
    if numpy.allclose(equation(start), given(start)):
        return False, "workspace/equation.py is the equation that was given"

    def loss(parameters):
        return numpy.mean((equation(parameters) - observed) ** 2)

    smallest = minimize(loss, start, method="BFGS").fun
    return bool(smallest < limit), f"its loss is {smallest:.3g}"


def main():
    if sys.argv[1] == "--predict":
        return predict(sys.argv[2])
    limit, folder = sys.argv[1:]
    ctypes.CDLL(None).prctl(4, 0)  # PR_SET_DUMPABLE: the equation's process cannot read this one's memory
    try:
        solved, found = verdict(float(limit), Path(folder))
    except ValueError as error:
        solved, found = False, str(error)
    except OSError as error:
        sys.exit(f"Bail out! {error}")
    text = f"the loss of equation.py, which is not the one that was given, is smaller than {limit}"
    print(f"# {found}\n{'ok' if solved else 'not ok'} - {text}")
    sys.exit(not solved)


if __name__ == "__main__":
    main()
