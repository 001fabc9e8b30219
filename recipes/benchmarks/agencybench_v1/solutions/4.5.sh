mkdir -p workspace && cp -r /private/solutions/pipeline/* workspace/ && python3 workspace/task5_autorepair.py --simulate-failure
