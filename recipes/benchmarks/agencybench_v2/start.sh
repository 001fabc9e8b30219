# Start a grader in its folder, with what it asks for: the judges' port, and for pages the stand-in of its container.
cd ..
export PATH=/bridge:$PATH SII_BRIDGE_PATH=/bridge/agent.socket
export PLAYWRIGHT_BROWSERS_PATH=/bridge/browsers FONTCONFIG_FILE=/bridge/fonts.conf
# The clone at /repository belongs to another user
[ ! -e /repository ] || git config --global safe.directory '*'
[ ! -e /bridge/judge.socket ] || python3 -I /bridge/relay.py 8089 /bridge/judge.socket &
if [ "$1" = browser ]; then
    python3 -I /bridge/sandbox_api.py &
    for _ in $(seq 300); do  # a minute: a busy machine starts a browser slowly
        (exec 3<> /dev/tcp/127.0.0.1/9222) 2> /dev/null && break
        kill -0 $! 2> /dev/null || break
        sleep 0.2
    done
    (exec 3<> /dev/tcp/127.0.0.1/9222) 2> /dev/null || { echo "Bail out! chromium does not start"; exit 1; }
fi
arguments="--env .env"
grep -q -e '"--description"' eval_task.py && arguments="$arguments --description description.json"
python3 eval_task.py $arguments > /tmp/grader.log 2>&1
code=$?
cp /tmp/grader.log agent/  # not before: some graders let the agent work in this folder
[ $code = 0 ] || tail -n 1 /tmp/grader.log
exit $code
