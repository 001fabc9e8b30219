"""A headless chromium, driven over its DevTools socket: what the tests of pages and of the review page share."""

import base64
import contextlib
import itertools
import json
import shutil
import subprocess
import time
from pathlib import Path

FLAGS = """--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
    --disable-component-update --disable-sync --disable-dev-shm-usage --hide-scrollbars --remote-debugging-port=0"""
PATIENCE = 120  # seconds; a busy machine starts a browser slowly


def find_chromium():
    return shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class BrowserError(Exception):
    """What the browser, or a script in it, says went wrong."""


class Browser:
    """One browser. `requests`, `errors`: what its pages asked for, what went wrong in their scripts."""

    def __init__(self, folder):
        from websockets.sync.client import connect

        command = [find_chromium(), *FLAGS.split(), f"--user-data-dir={folder}", "about:blank"]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        place = Path(folder, "DevToolsActivePort")
        deadline = time.monotonic() + PATIENCE
        while not (place.exists() and place.read_text().count("\n")):
            assert self.process.poll() is None and time.monotonic() < deadline, "chromium did not start"
            time.sleep(0.05)
        port, path = place.read_text().split("\n")[:2]
        self.stack = contextlib.ExitStack()
        self.socket = self.stack.enter_context(
            connect(f"ws://127.0.0.1:{port}{path}", max_size=None, proxy=None)
        )
        self.numbers, self.requests, self.errors, self.events = itertools.count(1), [], [], []

    def close(self):
        self.stack.close()
        self.process.terminate()
        self.process.wait(PATIENCE)

    def receive(self):
        message = json.loads(self.socket.recv(timeout=PATIENCE))
        method, params = message.get("method"), message.get("params", {})
        if method == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        if method == "Runtime.exceptionThrown":
            self.errors.append(params["exceptionDetails"]["text"])
        if method == "Log.entryAdded" and params["entry"]["level"] == "error":
            self.errors.append(params["entry"]["text"])
        if method:
            self.events.append((message.get("sessionId"), method))
        return message

    def call(self, method, session=None, **params):
        number = next(self.numbers)
        message = {"id": number, "method": method, "params": params}
        self.socket.send(json.dumps(message | ({"sessionId": session} if session else {})))
        while (reply := self.receive()).get("id") != number:
            pass
        if "error" in reply:
            raise BrowserError(reply["error"])
        return reply["result"]

    def tab(self):
        return Tab(self)


class Tab:
    def __init__(self, browser):
        self.browser = browser
        target = browser.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = browser.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method, **params):
        return self.browser.call(method, self.session, **params)

    def look(self, width, height=900, dark=False):
        """The size of the window, and light or dark."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def open(self, address):
        self.browser.events.clear()
        self.call("Page.navigate", url=str(address))
        while (self.session, "Page.loadEventFired") not in self.browser.events:
            self.browser.receive()

    def run(self, script):
        """The value of a piece of JavaScript, waited for."""
        reply = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in reply:
            raise BrowserError(reply["exceptionDetails"])
        return reply["result"].get("value")

    def wait(self, script):
        """Until a piece of JavaScript is true; while a page goes and the next one comes, it is not."""
        deadline = time.monotonic() + PATIENCE
        while not self.is_true(script):
            assert time.monotonic() < deadline, f"never true: {script}"
            time.sleep(0.02)

    def is_true(self, script):
        try:
            return self.run(script)
        except BrowserError:
            return False

    def press(self, key, repeat=False):
        """One key, as a keyboard sends it; repeat: held down."""
        text = {"text": key} if len(key) == 1 else {}
        self.call("Input.dispatchKeyEvent", type="keyDown", key=key, autoRepeat=repeat, **text)
        self.call("Input.dispatchKeyEvent", type="keyUp", key=key)

    def write(self, text):
        self.call("Input.insertText", text=text)

    def click(self, selector):
        """With the mouse, in the middle of what the selector finds; it must be in sight there."""
        find = f"document.querySelector({json.dumps(selector)})"
        box = self.run(
            f"(() => {{ const e = {find}; e.scrollIntoView({{block: 'center'}}); const b = e.getBoundingClientRect();"
            f" return [b.x + b.width / 2, b.y + b.height / 2, b.width * b.height] }})()"
        )
        assert box[2] > 0, f"{selector} cannot be seen"
        for kind in ("mousePressed", "mouseReleased"):
            where = {"x": box[0], "y": box[1], "button": "left", "clickCount": 1}
            self.call("Input.dispatchMouseEvent", type=kind, **where)

    def picture(self, path, whole=False):
        data = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)["data"]
        Path(path).write_bytes(base64.b64decode(data))

    def too_wide(self):
        """The elements that reach beyond the window (what scrolls within its own frame does not)."""
        return self.run("""document.documentElement.scrollWidth <= innerWidth ? [] :
            [...document.querySelectorAll("body *")].filter(e => e.getBoundingClientRect().right > innerWidth + 1)
            .map(e => e.outerHTML.slice(0, 200))""")
