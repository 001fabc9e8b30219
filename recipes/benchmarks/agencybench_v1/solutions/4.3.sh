mkdir -p workspace && cp -r /private/solutions/pipeline/* workspace/ && python3 workspace/task3_integration_test.py
