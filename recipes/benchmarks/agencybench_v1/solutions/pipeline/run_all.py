"""The whole pipeline, subtask by subtask; reports/final_report.json says how each one ended."""

import json
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
STEPS = {
    "task1": ["task1_generator.py", "--seed", "42", "--count", "10"],
    "task2": ["task2_kvstore.py", "--test-recovery"],
    "task3": ["task3_integration_test.py"],
    "task4": ["task4_integration_test.py"],
    "task5": ["task5_autorepair.py", "--simulate-failure"],
}

codes = {}
for name, (script, *flags) in STEPS.items():
    codes[name] = subprocess.run([sys.executable, HERE / script, *flags]).returncode
failed = any(codes.values())
(HERE / "reports").mkdir(exist_ok=True)
report = {"exit_codes": codes, "passed": not failed}
(HERE / "reports/final_report.json").write_text(json.dumps(report) + "\n")
sys.exit(failed)
