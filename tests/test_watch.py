"""The page of a run that goes on, asked for as a browser would."""

import http.client
import json
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from fedpilot.errors import FedpilotError
from fedpilot.report import page, watch
from tests import chromium
from tests.test_cli import fedpilot
from tests.test_report import line, plan, record


@dataclass
class Served:
    """A server in a thread, and what it said."""

    path: Path
    said: list[str] = field(default_factory=list)

    def start(self) -> None:
        self.thread = threading.Thread(target=watch.serve, args=([self.path], 0, self.said.append), daemon=True)
        self.thread.start()
        deadline = time.monotonic() + 30
        while not self.said:
            assert time.monotonic() < deadline
            time.sleep(0.01)

    @property
    def url(self) -> str:
        return next(word for word in self.said[0].split() if word.startswith("http://127.0.0.1:"))

    def ask(self, path: str, host: str | None = None) -> tuple[int, str]:
        connection = http.client.HTTPConnection(self.url.removeprefix("http://").strip("/"), timeout=30)
        connection.request("GET", path, headers={} if host is None else {"Host": host})
        answer = connection.getresponse()
        text = answer.read().decode()
        connection.close()
        return answer.status, text

    def end(self) -> None:
        """Writes what a run writes at its end, and waits."""
        (self.path / "manifest.json").touch()
        page.write([self.path])
        os.utime(self.path / page.FILE, (time.time() + 5, time.time() + 5))
        self.thread.join(30)
        assert not self.thread.is_alive()


def add(path: Path, number: int, accuracy: float) -> None:
    text = json.dumps(line(number, accuracy, plans=[plan(0, [2])], uploads=[{"client_id": 0}])) + "\n"
    with (path / "metrics.jsonl").open("a") as file:
        file.write(text)


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    """A run of three rounds that has just begun."""
    monkeypatch.setattr(watch, "POLL_S", 0.1)
    monkeypatch.setattr(watch, "LINGER_S", 0.5)
    path = tmp_path / "run"
    record(path, [], config={"run": {"rounds": 3}})
    made = Served(path)
    made.start()
    yield made
    if made.thread.is_alive():
        while len((path / "metrics.jsonl").read_text().splitlines()) < 4:
            add(path, len((path / "metrics.jsonl").read_text().splitlines()), 0.5)
        made.end()


def version(served: Served) -> str:
    return str(json.loads(served.ask("/version")[1])["version"])


def test_the_page_waits_for_the_first_evaluation_and_then_follows_the_rounds(served: Served) -> None:
    before = version(served)
    status, text = served.ask("/")
    assert status == 200
    assert before in text
    add(served.path, 0, 0.25)
    first = version(served)
    assert first != before
    assert "0.25" in served.ask("/")[1]
    add(served.path, 1, 0.875)
    text = served.ask("/")[1]
    assert version(served) not in (before, first)
    assert "0.875" in text
    assert version(served) in text


def test_the_server_ends_when_the_run_has_ended_and_says_where_the_page_is(served: Served) -> None:
    for number in range(4):
        add(served.path, number, 0.5)
    assert json.loads(served.ask("/version")[1])["over"] is False
    served.end()
    assert served.said[-1] == f"the run is over; its page is {served.path / 'report.html'}"


def test_a_page_that_somebody_wrote_in_the_middle_does_not_end_the_watch(served: Served) -> None:
    add(served.path, 0, 0.5)
    add(served.path, 1, 0.5)
    page.write([served.path])
    os.utime(served.path / page.FILE, (time.time() + 5, time.time() + 5))
    assert json.loads(served.ask("/version")[1])["over"] is False


@pytest.mark.parametrize(
    "path", ["/manifest.json", "/metrics.jsonl", "/../run/manifest.json", "/%2e%2e/", "//etc/passwd"]
)
def test_nothing_else_of_the_machine_is_served(served: Served, path: str) -> None:
    assert served.ask(path)[0] == 404


def test_another_name_for_this_machine_is_refused(served: Served) -> None:
    assert served.ask("/", host="evil.example")[0] == 403
    assert served.ask("/", host="localhost:1")[0] == 200


def test_a_comparison_that_has_no_run_yet_is_waited_for(tmp_path: Path) -> None:
    watched = watch.Watched([tmp_path])
    assert "Nothing is on record yet" in watched.html()
    assert not watched.over()
    for method in ("fedit", "flora"):
        record(tmp_path / method / "seed-0", [line(0, 0.125), line(1, 0.5)])
    text = watched.html()
    assert "fedit" in text
    assert "flora" in text
    page.write([tmp_path])
    os.utime(tmp_path / page.FILE, (time.time() + 5, time.time() + 5))
    assert watched.over()


def test_what_cannot_be_watched_is_said(tmp_path: Path, served: Served) -> None:
    result = fedpilot("watch", str(tmp_path / "none"))
    assert result.exit_code == 1
    assert "DIR must be a run directory" in result.output
    taken = int(served.url.rstrip("/").rpartition(":")[2])
    with pytest.raises(FedpilotError, match="--port must be free"):
        watch.serve([served.path], taken, lambda said: None)


@pytest.mark.slow
def test_a_browser_sees_new_rounds_by_itself_without_an_error_or_a_request_to_elsewhere(
    served: Served, tmp_path: Path
) -> None:
    with chromium.Page(tmp_path / "browser") as browser:
        browser.call("Page.navigate", url=served.url)
        expect(browser, "no round has been evaluated yet")
        for number, accuracy in enumerate((0.125, 0.5, 0.625, 0.9375)):
            add(served.path, number, accuracy)
            expect(browser, f"{accuracy:.4f}".rstrip("0"))
        ender = threading.Thread(target=served.end)
        ender.start()
        expect(browser, "The run is over.")
        ender.join(60)
        assert browser.said == []
        assert browser.requests
        assert all(url.startswith(served.url) for url in browser.requests)


def expect(browser: chromium.Page, text: str) -> None:
    """Waits until the page has the text; while it loads itself anew there may be no document."""
    deadline = time.monotonic() + 60
    while True:
        assert time.monotonic() < deadline, text
        try:
            if text in (browser.run("document.body ? document.body.textContent : ''") or ""):
                return
        except AssertionError:
            pass
        time.sleep(0.1)
