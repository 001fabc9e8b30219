mkdir -p workspace && cp -r /private/solutions/pipeline/* workspace/ && python3 workspace/task1_generator.py --seed 42 --count 10 --out workspace/data/events.jsonl
