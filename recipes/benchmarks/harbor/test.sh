#!/bin/bash
# The check of a turn, on the agent's folder and with the names that it knows; harbor.py out wrote this
answer='import json; steps = json.load(open("/logs/agent/trajectory.json"))["steps"]
print([step["message"] for step in steps if step["source"] == "agent"][-1], end="")'
mkdir -p /logs/verifier /answers
python3 -I -c "$answer" > /answer.md 2> /dev/null || cp /logs/agent/oracle.txt /answer.md 2> /dev/null
cp /answer.md "/answers/$(($(ls /answers | wc -l) + 1)).md"
cp -rT /tests/private /private 2> /dev/null
cp -aT /workspace /workspace.before  # a later turn goes on with what the agent left, not the check
cd /workspace
bash /tests/check.sh | tee /logs/verifier/check.txt
code=${PIPESTATUS[0]}
find /workspace -mindepth 1 -delete
cp -aT /workspace.before /workspace
rm -rf /workspace.before /private
# No reward: the check could not run, or decide
undecided='^([Bb]ail out!|1\.\.0\b|(not )?ok\b.* # ?([Ss]kip|SKIP))'
grep -Eq "$undecided" /logs/verifier/check.txt || [ "$code" = 126 ] || [ "$code" = 127 ] && exit
echo $((code == 0)) > /logs/verifier/reward.txt
