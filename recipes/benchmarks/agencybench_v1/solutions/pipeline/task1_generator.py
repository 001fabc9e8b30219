"""Subtask 1: a reproducible stream of events. Same seed, schema and count: the same bytes."""

import argparse
import datetime
import json
import logging
import random
from pathlib import Path

HERE = Path(__file__).resolve().parent
FIRST = datetime.datetime(2025, 1, 1, tzinfo=datetime.timezone.utc)
SCHEMA = {
    "kind": {
        "type": "string",
        "enum": ["order", "refund", "visit"],
    },
    "amount": {
        "type": "integer",
        "minimum": 1,
        "maximum": 1000,
    },
    "weight": {"type": "number", "minimum": 0, "maximum": 1},
    "urgent": {"type": "boolean"},
}
SHAPE = "a JSON file: {field: {type, enum?, minimum?, maximum?}}"
OUT = HERE / "data/events.jsonl"
MODES = ("append", "overwrite")
TYPES = {
    "string": str,
    "integer": int,
    "number": (int, float),
    "boolean": bool,
}


def draw(rule, dice):
    """A value that the rule of a field allows."""
    if "enum" in rule:
        return dice.choice(rule["enum"])
    low = rule.get("minimum", 0)
    high = rule.get("maximum", 100)
    if rule["type"] == "integer":
        return dice.randint(low, high)
    if rule["type"] == "number":
        return round(dice.uniform(low, high), 6)
    return dice.random() < 0.5 if rule["type"] == "boolean" else f"text-{dice.randrange(10**6)}"


def validate(event, schema):
    """Raises ValueError unless the event is what the schema says."""
    for field in ("id", "timestamp", "payload"):
        if field not in event:
            raise ValueError(f"{field} is missing")
    datetime.datetime.fromisoformat(event["timestamp"])
    if set(event["payload"]) != set(schema):
        raise ValueError(f"payload has {sorted(event['payload'])}, not {sorted(schema)}")
    for field, rule in schema.items():
        value = event["payload"][field]
        if not isinstance(value, TYPES[rule["type"]]) or value not in rule.get("enum", [value]):
            raise ValueError(f"{field}: {value!r} is not what the schema says")


def generate(seed, count, schema, before=0):
    """Events number before + 1 to before + count."""
    dice = random.Random(f"{seed} {before} {json.dumps(schema, sort_keys=True)}")
    for number in range(before + 1, before + count + 1):
        moment = FIRST + datetime.timedelta(seconds=60 * number + dice.randrange(60))
        payload = {field: draw(schema[field], dice) for field in sorted(schema)}
        event = {"id": f"{seed}-{number:06}"}
        event["timestamp"] = moment.isoformat()
        event["payload"] = payload
        validate(event, schema)
        yield event


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--count", type=int, default=10)
    parser.add_argument("--schema", type=Path, help=SHAPE)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--mode", choices=MODES, default="overwrite")
    options = parser.parse_args()
    schema = json.loads(options.schema.read_text()) if options.schema else SCHEMA
    options.out.parent.mkdir(parents=True, exist_ok=True)
    append = options.mode == "append" and options.out.exists()
    before = len(options.out.read_bytes().splitlines()) if append else 0
    with options.out.open("a" if append else "w", encoding="utf-8") as file:
        for event in generate(options.seed, options.count, schema, before):
            file.write(json.dumps(event, ensure_ascii=False, separators=(",", ":")) + "\n")
    (HERE / "logs").mkdir(exist_ok=True)
    place = HERE / "logs/gen.log"
    logging.basicConfig(filename=place, level=logging.INFO, format="%(asctime)s %(message)s")
    logging.info("seed=%s count=%s mode=%s", options.seed, options.count, options.mode)
    print(f"{options.out}: {options.count} events")


if __name__ == "__main__":
    main()
