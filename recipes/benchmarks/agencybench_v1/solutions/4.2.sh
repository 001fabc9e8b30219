mkdir -p workspace && cp -r /private/solutions/pipeline/* workspace/ && python3 workspace/task2_kvstore.py --test-recovery
