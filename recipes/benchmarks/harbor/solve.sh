#!/bin/bash
# The task's solution, with the names that it knows; harbor.py out wrote this
cp -rT /solution/private /private 2> /dev/null
cd /workspace
bash /solution/solution.sh
code=$?
rm -rf /private
exit $code
