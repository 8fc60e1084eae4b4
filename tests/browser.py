"""A headless Chromium, driven over a pipe: what a page asks for, complains of, measures and looks like.

$CHROMIUM names the program; otherwise the usual names are looked for. The protocol is the DevTools protocol.
"""

from __future__ import annotations

import base64
import fcntl
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
_SECONDS = 60
# Chromium reads commands from descriptor 3 and writes events to 4.
_WIRED = (
    "import os, sys; os.dup2(int(sys.argv[1]), 3); os.dup2(int(sys.argv[2]), 4); os.execv(sys.argv[3], sys.argv[3:])"
)


def find() -> str | None:
    """The program, or None where there is none."""
    named = os.environ.get("CHROMIUM")
    return next(filter(None, map(shutil.which, [named] if named else NAMES)), None)


@dataclass
class Visit:
    """What happened while a page was open: addresses asked for, and what was said on the console."""

    requests: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)


class Browser:
    """One tab."""

    def __init__(self, commands: BinaryIO, events: BinaryIO) -> None:
        self._commands, self._events = commands, events
        self._last, self._session, self._unread = 0, "", b""
        self.visit = Visit()
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._call(f"{domain}.enable")

    def open(self, path: Path, *, width: int, dark: bool = False, media: str = "screen") -> Visit:
        """Show a file in a window `width` pixels wide, and wait until it has loaded with its pictures."""
        self.visit = Visit()
        self._call(
            "Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 600
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._call("Emulation.setEmulatedMedia", media=media, features=[scheme])
        self._call("Page.navigate", url=path.resolve().as_uri())
        deadline = time.monotonic() + _SECONDS
        while self.evaluate("document.readyState") != "complete":
            assert time.monotonic() < deadline, f"{path} did not load in {_SECONDS} s"
            time.sleep(0.05)
        self.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
        return self.visit

    def evaluate(self, script: str) -> Any:
        """The value of an expression in the page, awaited where it is a promise."""
        answer = self._call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def screenshot(self) -> bytes:
        """All of the page as a PNG."""
        return base64.b64decode(self._call("Page.captureScreenshot", captureBeyondViewport=True)["data"])

    def pdf(self) -> bytes:
        """The page as it is printed."""
        return base64.b64decode(self._call("Page.printToPDF", printBackground=False)["data"])

    def _call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._last += 1
        message: dict[str, Any] = {"id": self._last, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        self._commands.write(json.dumps(message).encode() + b"\0")
        self._commands.flush()
        while True:
            event = json.loads(self._read())
            if event.get("id") == self._last:
                assert "error" not in event, f"{method}: {event['error']}"
                result: dict[str, Any] = event["result"]
                return result
            self._note(event)

    def _read(self) -> bytes:
        while b"\0" not in self._unread:
            more = os.read(self._events.fileno(), 1 << 16)
            assert more, "the browser ended"
            self._unread += more
        message, _, self._unread = self._unread.partition(b"\0")
        return message

    def _note(self, event: dict[str, Any]) -> None:
        method, told = event.get("method"), event.get("params", {})
        if method == "Network.requestWillBeSent":
            self.visit.requests.append(told["request"]["url"])
        elif method == "Log.entryAdded":
            self.visit.complaints.append(told["entry"]["text"])
        elif method == "Runtime.consoleAPICalled":
            self.visit.complaints.append(json.dumps(told["args"]))
        elif method == "Runtime.exceptionThrown":
            self.visit.complaints.append(json.dumps(told["exceptionDetails"]))


@contextmanager
def started(program: str, profile: Path) -> Iterator[Browser]:
    """A browser with a new profile, which ends with the block. It resolves no name, so that nothing can be reached."""
    command_read, command_write = _pipe()
    event_read, event_write = _pipe()
    arguments = [
        *("--headless=new", "--remote-debugging-pipe", f"--user-data-dir={profile}", "--no-first-run"),
        *("--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars", "--host-resolver-rules=MAP * ~NOTFOUND"),
        *(["--no-sandbox"] if os.geteuid() == 0 else []),  # Chromium's sandbox does not start for root
    ]
    process = subprocess.Popen(
        [sys.executable, "-c", _WIRED, str(command_read), str(event_write), program, *arguments],
        pass_fds=(command_read, event_write),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(command_read)
    os.close(event_write)
    with os.fdopen(command_write, "wb") as commands, os.fdopen(event_read, "rb") as events:
        try:
            yield Browser(commands, events)
        finally:
            process.terminate()
            process.wait(_SECONDS)


def _pipe() -> tuple[int, int]:
    """Both ends, above the descriptors that Chromium wants."""
    ends = os.pipe()
    moved = tuple(fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in ends)
    for end in ends:
        os.close(end)
    return moved[0], moved[1]
