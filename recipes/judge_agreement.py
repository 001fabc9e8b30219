"""Can this judge be believed? Its verdicts beside a person's, on twenty small pieces of work.

    python recipes/judge_agreement.py --judge_model NAME --judge_base_url URL [--config recipes/endpoints/...]

Takes 04_eval.py's settings of the judge (key, request, headers, sandbox) and its way of judging; --max_tokens
is for a judge that does not end by itself. Prints each disagreement, what was undecided, and Cohen's kappa
with its n; the work stands in judge_agreement.yaml. What speaks to the judge in it is part of the test.
"""

import asyncio
import importlib
import sys
import tempfile
from pathlib import Path

import yaml
from tqdm import tqdm
from trl import TrlParser

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def kappa(pairs):
    """Cohen's kappa of [(judge, person)], both bool; None where both say the same of everything."""
    agreed = sum(one == other for one, other in pairs) / len(pairs)
    judge = sum(one for one, _ in pairs) / len(pairs)
    person = sum(other for _, other in pairs) / len(pairs)
    by_chance = judge * person + (1 - judge) * (1 - person)
    return None if by_chance == 1 else (agreed - by_chance) / (1 - by_chance)


async def verdict_on(stage, endpoint, settings, tools, case, folder):
    """True, False, or why the judge could not decide."""
    schemas, program = tools
    turn = {"query": "Do what the requirement says.", "rubric": [case["requirement"]]}
    async with stage.Sandbox(settings, program, folder, 0, {}) as sandbox:
        sandbox.fill(None)
        for name, text in case["files"].items():
            (sandbox.workspace / name).write_text(text)
        sandbox.give(sandbox.workspace)
        try:
            return (await stage.judge_once(endpoint, sandbox, turn, list(schemas.values()), settings.seed))[0]
        except stage.NotRun as fault:
            return f"{fault.reason}: {fault.detail}"


async def judge_all(stage, settings, cases):
    """[verdict_on each case]"""
    tools = stage.load_tools(None)
    keys = [settings.judge_api_key_env, settings.api_key_env]
    judge = stage.with_changes(stage.judge_settings(settings), max_tokens=settings.max_tokens)
    endpoint = stage.Endpoint(judge, settings.judge_base_url, keys)
    verdicts = []
    with tempfile.TemporaryDirectory() as folder:
        settings.output_dir = folder
        Path(folder).chmod(0o755)
        await stage.try_sandbox(settings, tools[1])
        await stage.probe(endpoint, tools[0], stage.JUDGE_PROMPT % "probe")
        for case in tqdm(cases, unit="piece of work"):
            workspace = Path(folder, "workspace")
            verdicts.append(await verdict_on(stage, endpoint, settings, tools, case, workspace))
        stage.remove(Path(folder, "workspace"))
    return verdicts


def main(arguments=None):
    stage = importlib.import_module("04_eval")
    cases = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text())
    try:
        (settings,) = TrlParser(stage.Settings).parse_args_and_config(arguments)
        if not (settings.judge_model and settings.judge_base_url):
            raise stage.InputError("name the judge: --judge_model NAME --judge_base_url URL")
        stage.check_values(settings)
        verdicts = asyncio.run(judge_all(stage, settings, cases))
    except (OSError, TypeError, ValueError, yaml.YAMLError) as error:  # as parse_settings has them
        print(f"judge_agreement.py: {error}", file=sys.stderr)
        return 2
    pairs = []
    for case, verdict in zip(cases, verdicts):
        if isinstance(verdict, str):
            print(f"undecided: {case['requirement']}: {verdict[:200]}")
            continue
        pairs.append((verdict, case["passed"]))
        if verdict != case["passed"]:
            print(f"judge {verdict}, person {case['passed']}: {case['requirement']}: {case['files']}")
    value = kappa(pairs) if pairs else None
    print(f"decided: {len(pairs)} of {len(cases)}")
    print(f"agreement: {sum(one == other for one, other in pairs)} of {len(pairs)}")
    print("kappa: " + ("none" if value is None else f"{value:.2f}"))
    return 0 if pairs else 1


if __name__ == "__main__":
    sys.exit(main())
