#!/bin/bash
# The task's check, with the names that it knows; harbor.py out wrote this
cp -rT /tests/private /private 2> /dev/null
mkdir -p /logs/verifier /answers
cp /logs/agent/oracle.txt /answer.md 2> /dev/null || touch /answer.md
cp /answer.md /answers/1.md
cd /workspace
if bash /tests/check.sh; then
    echo 1 > /logs/verifier/reward.txt
else
    echo 0 > /logs/verifier/reward.txt
fi
