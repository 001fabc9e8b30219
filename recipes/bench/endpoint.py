"""A scripted endpoint for bench.py: a call of read_file in every step but the last, which answers.

    python recipes/bench/endpoint.py STEPS SECONDS_UNTIL_IT_ANSWERS LOG

Prints its port. LOG gets the first user message of every request.
"""

import asyncio
import json
import sys

STEPS = int(sys.argv[1])
DELAY = float(sys.argv[2])
LOG = open(sys.argv[3], "a", buffering=1)
TEXT = "x" * 500
ARGUMENTS = json.dumps({"absolute_path": "/workspace/a"})
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"


def reply(body):
    done = sum(message["role"] == "assistant" for message in body["messages"])
    users = [message for message in body["messages"] if message["role"] == "user"]
    LOG.write(users[0]["content"].replace("\n", " ") + "\n")
    message = {"role": "assistant", "content": TEXT}
    if done < STEPS - 1:
        function = {"name": "read_file", "arguments": ARGUMENTS}
        call = {"id": f"c{done}", "type": "function", "function": function}
        message["tool_calls"] = [call]
    reason = "tool_calls" if "tool_calls" in message else "stop"
    choice = {"index": 0, "message": message, "finish_reason": reason}
    usage = {"prompt_tokens": 9, "completion_tokens": 9, "total_tokens": 18}
    whole = {"id": "x", "object": "chat.completion", "created": 0, "model": "x"}
    return json.dumps(whole | {"choices": [choice], "usage": usage}).encode()


async def answer(reader, writer):
    while True:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
        except asyncio.IncompleteReadError:
            return
        size = 0
        for line in head.split(b"\r\n"):
            if line.startswith(b"content-length:"):
                size = int(line.split(b":")[1])
        data = b'{"data": []}'  # of GET /v1/models
        if size:
            data = reply(json.loads(await reader.readexactly(size)))
            await asyncio.sleep(DELAY)
        writer.write(HEAD % len(data) + data)


async def main():
    server = await asyncio.start_server(answer, "127.0.0.1", 0, limit=1 << 24)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


asyncio.run(main())
