"""The report's page while a run goes on, served to this machine alone.

Three answers are given, to whoever asks by a name of this machine: the page, its version, and nothing for an icon. The
page asks for the version and loads itself anew when there is another. Nothing of the run but its report is readable.
"""

import hashlib
import json
import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from fedpilot.errors import FedpilotError, RecordError
from fedpilot.report import page

logger = logging.getLogger(__name__)

HOST = "127.0.0.1"
POLL_S = 1.0
LINGER_S = 5.0
"""Seconds that the server stays after the end, so that open pages see it."""


@dataclass
class Watched:
    """Runs whose page is rendered again when their records have grown.

    Attributes:
        paths: Run directories and folders of comparisons; they may still be empty.
    """

    paths: Sequence[Path]
    _lock: threading.Lock = field(init=False, default_factory=threading.Lock)
    _rendered: tuple[str, str] = field(init=False, default=("", ""))

    def records(self) -> list[Path]:
        """The files that grow with each round."""
        patterns = ("metrics.jsonl", "baseline/metrics.jsonl", "*/seed-*/metrics.jsonl")
        return sorted(file for path in self.paths for pattern in patterns for file in path.glob(pattern))

    def version(self) -> str:
        """Changes with what the page shows."""
        facts = [(str(file), (found := file.stat()).st_size, found.st_mtime_ns) for file in self._files()]
        return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]

    def _files(self) -> list[Path]:
        patterns = ("manifest.json", "*/seed-*/manifest.json", "test.json", "comparison.json")
        return [*self.records(), *sorted(file for path in self.paths for name in patterns for file in path.glob(name))]

    def over(self) -> bool:
        """Whether every run wrote its page after its last round, as a run does when it ends."""
        return all(self._over(path) for path in self.paths)

    def _over(self, path: Path) -> bool:
        written, records = path / page.FILE, Watched([path]).records()
        if not records or not written.exists():
            return False
        if any(file.stat().st_mtime_ns > written.stat().st_mtime_ns for file in records):
            return False
        return not (path / "manifest.json").exists() or _may_be_over(path)

    def html(self) -> str:
        """The page, or one that says what is waited for."""
        with self._lock:
            version = self.version()
            if self._rendered[0] != version:
                try:
                    text = page.render(self.paths, live=version)
                except (RecordError, ValueError, KeyError) as error:  # a run that has just begun, or is being written
                    logger.info("no page yet: %s", error)
                    text = page.waiting([str(path) for path in self.paths], version)
                self._rendered = version, text
            return self._rendered[1]


def _may_be_over(path: Path) -> bool:
    """Whether all rounds are on record, or the recipe has a reason to end before.

    ``fedpilot report`` may have written the page in the middle of a run.
    """
    from fedpilot.record import RunDirectory

    directory = RunDirectory.open(path)
    config: Any = directory.manifest.get("config")
    if not isinstance(config, dict):
        return True
    private = (config.get("privacy") or {}).get("kind", "none") != "none"  # its budget may end a run
    early = (config.get("evaluation") or {}).get("patience") or private
    rounds = (config.get("run") or {}).get("rounds", 0)
    lines = directory.lines()
    return bool(early) or (bool(lines) and int(str(lines[-1]["round"])) >= rounds)


def _handler(watched: Watched) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        """Answers for one connection."""

        def do_GET(self) -> None:
            host = self.headers.get("Host", "").partition(":")[0]
            if host not in (HOST, "localhost"):  # another site's name that was made to mean this machine
                self.send_error(403)
            elif self.path == "/":
                self._answer(watched.html(), "text/html; charset=utf-8")
            elif self.path == "/version":
                over = watched.over()  # before the version: what ends comes with a version of its own
                facts = {"version": watched.version(), "over": over, "poll_ms": round(1000 * POLL_S)}
                self._answer(json.dumps(facts), "application/json")
            elif self.path == "/favicon.ico":
                self.send_response(204)
                self.end_headers()
            else:
                self.send_error(404)

        def _answer(self, text: str, kind: str) -> None:
            body = text.encode()
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Cache-Control", "no-store")
            self.send_header("X-Content-Type-Options", "nosniff")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *arguments: object) -> None:
            logger.debug(format, *arguments)

    return Handler


def serve(paths: Sequence[Path], port: int, say: Callable[[str], None]) -> None:
    """Serves until the runs are over.

    Args:
        paths: Run directories and folders of comparisons.
        port: Of the loopback address; 0 for a free one.
        say: Gets the address, and what happens.

    Raises:
        FedpilotError: The port is taken, or a directory is not there.
    """
    for path in paths:
        if not path.is_dir():
            raise FedpilotError(f"DIR must be a run directory or the folder of a comparison, got {path}")
    watched = Watched(paths)
    if watched.over():
        say(f"the run is over; its page is {paths[0] / page.FILE}")
        return
    try:
        server = ThreadingHTTPServer((HOST, port), _handler(watched))
    except OSError as error:
        raise FedpilotError(f"--port must be free on {HOST}, got {port} ({error}); choose another, or 0") from error
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.1}, daemon=True)
    thread.start()
    try:
        say(f"watching at http://{HOST}:{server.server_address[1]}/ until the run ends; Ctrl-C ends it before")
        while not watched.over():
            time.sleep(POLL_S)
        time.sleep(LINGER_S)
        say(f"the run is over; its page is {paths[0] / page.FILE}")
    finally:
        server.shutdown()
        server.server_close()
