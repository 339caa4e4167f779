import json
import re
import shutil
import time
import zipfile
from collections import Counter
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from hatchling.builders.wheel import WheelBuilder

from fedpilot import jobs
from fedpilot.config.recipe import load_recipe
from fedpilot.errors import RecordError
from fedpilot.record import RunDirectory
from fedpilot.report import figures, page, reading, svg, theme, words
from fedpilot.report.reading import Run
from tests import chromium
from tests.test_cli import RECIPE, fedpilot, save_data, save_model

HOSTILE = "<script>alert(1)</script>"
VOID = {"meta", "input", "br", "img", "link"}


class Parsed(HTMLParser):
    """A page taken apart: tags with their attributes and the text inside, as a browser would."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.inside: list[tuple[str, str]] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.inside.append((self.open[-1] if self.open else "", data))

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]

    def text(self) -> str:
        return " ".join(data for tag, data in self.inside if tag not in ("script", "style"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with its baseline, of clients whose names try to break out; the smallest is left out."""
    home = tmp_path_factory.mktemp("report")
    save_model(home / "model")
    save_data(home / "data.csv")
    rows = (
        (home / "data.csv").read_text().replace("Bern", HOSTILE).replace("Oslo", 'R&B "x"').replace(",bad,", ",b<a>d,")
    )
    (home / "data.csv").write_text(rows)
    recipe = RECIPE.format(folder=home, memory='["20 KiB", "1 GiB", "1 GiB"]')
    for name in ("model", "data.csv"):
        recipe = recipe.replace(f'"{name}"', f'"{home / name}"')
    (home / "recipe.toml").write_text(recipe)
    result = fedpilot("run", str(home / "recipe.toml"), "--out", str(home / "run"))
    assert result.exit_code == 0, result.output
    assert "report.html" in result.output
    return home


@pytest.fixture(scope="module")
def run(folder: Path) -> Path:
    return folder / "run"


@pytest.fixture(scope="module")
def comparison(folder: Path) -> Path:
    """The same runs where a comparison has them: two methods, two seeds, the second a little better."""
    made = folder / "cmp"
    for method, source in (("fed-pilot", folder / "run"), ("fedit", folder / "run" / "baseline")):
        for seed in (0, 1):
            path = made / method / f"seed-{seed}"
            path.mkdir(parents=True)
            shutil.copy(folder / "run" / "population.json", path)
            manifest = json.loads((source / "manifest.json").read_text()) | {"seed": seed, "num_blocks": 3}
            (path / "manifest.json").write_text(json.dumps(manifest))
            lines = [json.loads(line) for line in (source / "metrics.jsonl").read_text().splitlines()]
            for line in lines:
                line["metrics"]["accuracy"] += 0.1 * seed * line["round"]
            (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return made


@pytest.fixture(scope="module")
def parsed(run: Path) -> Parsed:
    return Parsed((run / "report.html").read_text())


def record(path: Path, lines: list[dict[str, object]], **manifest: object) -> Run:
    """A run that somebody wrote down."""
    path.mkdir(parents=True, exist_ok=True)
    body = {"num_blocks": 3, "tiers": ["small", "large"], "config": {"run": {"rounds": len(lines) - 1}}, **manifest}
    (path / "manifest.json").write_text(json.dumps(body))
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return reading.read(path)


def line(round: int, accuracy: float = 0.5, **more: object) -> dict[str, object]:
    return {"round": round, "metrics": {"accuracy": accuracy}, **more}


def plan(client: int, trained: list[int], **more: object) -> dict[str, object]:
    return {"client_id": client, "budget_bytes": 100, "trained": trained, **more}


def large(path: Path, clients: int = 1000, blocks: int = 32, rounds: int = 200, cohort: int = 25) -> Path:
    """A record as large as the page must bear."""
    rng = np.random.default_rng(0)
    path.mkdir()
    tiers = [("small", "medium", "large")[k % 3] for k in range(clients)]
    config = {"run": {"rounds": rounds}, "clients": {"memory": [100, 200, 300], "tiers": ["small", "medium", "large"]}}
    (path / "manifest.json").write_text(json.dumps({"num_blocks": blocks, "tiers": tiers, "config": config}))
    with (path / "metrics.jsonl").open("w") as stream:
        for round in range(rounds + 1):
            plans = [
                plan(
                    int(client),
                    np.flatnonzero(rng.random(blocks) < 0.5).tolist(),
                    values={str(block): float(value) for block, value in enumerate(rng.random(blocks))},
                    peak_bytes=90,
                )
                for client in rng.choice(clients, cohort if round else 0, replace=False)
            ]
            stream.write(json.dumps(line(round, 1 - 1 / (round + 1), plans=plans)) + "\n")
    return path


# --- what is recorded ---------------------------------------------------------------------------------------------


def test_the_record_is_added_up(tmp_path: Path) -> None:
    lines = [
        line(0),
        line(
            1,
            plans=[plan(0, [2], values={"1": 0.25, "2": 0.5}, ranks={"2": 8}, peak_bytes=70), plan(1, [0, 2])],
            uploads=[
                {"client_id": 0, "num_examples": 1, "bytes_up": 5, "metrics": {"loss": 1.0, "peak_bytes": 60.0}},
                {"client_id": 1, "num_examples": 3, "bytes_up": 7, "metrics": {"loss": 2.0}},
            ],
            bytes_down=20,
            bytes_up=12,
            bytes_base=4,
        ),
        line(2, plans=[plan(0, [2], values={"2": 1.0}, ranks={"2": {"q": 4, "v": 8}}, peak_bytes=80)]),
        line(3, left_out=[{"client_id": 1, "reason": "no room", "needed_bytes": 150}]),
        line(4, failures=[{"client_id": 0, "reason": "gone"}], plans=[plan(0, [1])]),
    ]
    run = record(tmp_path, lines)
    tally = run.tally
    assert tally.trained.tolist() == [[0, 1, 2], [1, 0, 1]]
    assert tally.asked.tolist() == [3, 1]
    assert tally.left_out.tolist() == [0, 1]
    assert tally.predicted.tolist() == [80, 0]
    assert tally.measured.tolist() == [60, 0]
    assert tally.bytes_up.tolist() == [5, 7]
    assert tally.mean_value[0, 1:].tolist() == [0.25, 0.75]
    assert tally.value_last[0, 2] == 1.0
    assert tally.rank_last[0].tolist() == [0, 0, reading.MIXED]
    assert tally.block_rounds.tolist() == [1, 1, 2]
    assert tally.block_gap.tolist() == [3, 3, 2]
    assert run.rounds[1].train_loss == pytest.approx(1.75)
    assert (run.rounds[1].bytes_base, run.rounds[2].bytes_base) == (4, None)
    assert run.left_out["no room"].needed_bytes == {1: 150}
    assert run.failures["gone"].clients == {0: 1}


def test_a_record_without_population_tiers_or_blocks_is_read(tmp_path: Path) -> None:
    path = tmp_path / "old"
    path.mkdir()
    (path / "manifest.json").write_text("{}")
    lines = [line(0), line(1, plans=[plan(2, [1])]), line(2, plans=[plan(0, [4], ranks={"5": 2})])]
    (path / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    found = reading.read(path)
    assert found.tally.trained.shape == (3, 5)
    assert found.tally.trained[2, 1] == 1
    Parsed(page.render([path]))


def test_a_run_that_has_only_begun_has_a_page(tmp_path: Path) -> None:
    record(tmp_path / "new", [])
    assert "no round has been evaluated yet" in Parsed(page.render([tmp_path / "new"])).text()
    record(tmp_path / "first", [line(0, 0.25)])
    assert "has not trained yet" in Parsed(page.render([tmp_path / "first"])).text()


def test_metrics_that_are_no_numbers_are_told_and_not_drawn(tmp_path: Path) -> None:
    broken = [line(0), {"round": 1, "metrics": {"accuracy": None}}, line(2, 0.75)]
    record(tmp_path / "run", broken)
    text = page.render([tmp_path / "run"])
    assert "not a number" in text
    assert "nan" not in re.sub(r"<script>.*?</script>", "", text, flags=re.DOTALL).lower().replace("nanc", "")


def test_a_folder_without_runs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match=r"must hold a run or a comparison, got no manifest\.json"):
        reading.find([tmp_path])


# --- words --------------------------------------------------------------------------------------------------------


def test_the_headline_answers_all_five_questions(parsed: Parsed) -> None:
    text = parsed.text()
    for question in ("Did it work?", "Who trained what", "inside the budget?", "What did it cost?", "What to change?"):
        assert question in text
    assert "2 of 3 clients trained, 1 never fitted" in text
    assert "At equal rounds (3 rounds against 3)" in text
    assert "everyone stayed inside" in text


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ([line(0, 0.5), line(1, 0.4)], "is no better than before training"),
        ([line(k, 0.1 * k) for k in range(6)], "The last round was the best so far"),
        (
            [line(0, 0.1), line(1, 0.9), line(2, 0.6), line(3, 0.5)],
            "was best in round 1 (0.9000) and is worse by 0.4000",
        ),
        (
            [
                line(k, 0.5 + 0.01 * k) | {"metrics": {"accuracy": 0.5 + 0.01 * k, "loss": abs(k - 2) + 1}}
                for k in range(6)
            ],
            "lowest in round 2",
        ),
        ([line(0), line(1, left_out=[{"client_id": 0, "reason": "r", "needed_bytes": 2**21}])], "2.0 MiB instead of"),
        ([line(0), line(1, plans=[plan(0, [1, 2])])], "Nobody ever trained block 0"),
        ([line(0), line(1, plans=[plan(0, [0, 1, 2], peak_bytes=30)])], "Much memory is unused in tier small (30%)"),
        ([line(0), line(1, failures=[{"client_id": 1, "reason": "its card burnt"}])], "because: its card burnt"),
        ([line(0), line(1, facts={"aggregation_error": 0.25})], "25% away from the clients' exact mean"),
        (
            [line(0), line(1, plans=[plan(1, [0])], uploads=[{"client_id": 1, "metrics": {"peak_bytes": 120}}])],
            "Over budget: client 1.",
        ),
    ],
)
def test_advice_follows_from_the_record(tmp_path: Path, lines: list[dict[str, object]], said: str) -> None:
    config = {"run": {"rounds": 1}, "clients": {"memory": [100, 100], "tiers": ["small", "large"]}}
    run = record(tmp_path, lines, config=config)
    assert said in " ".join(words.change([reading.Group("m", (run,))]).sentences)


def test_nothing_is_advised_where_nothing_is_wrong(tmp_path: Path) -> None:
    plans = [plan(0, [0, 1, 2], peak_bytes=90), plan(1, [0, 1, 2], peak_bytes=95)]
    run = record(tmp_path, [line(0, 0.1), line(1, 0.5, plans=plans), line(2, 0.5, plans=plans)])
    assert words.change([reading.Group("m", (run,))]).sentences == (words.NOTHING,)


def test_who_went_over_budget_is_named(tmp_path: Path) -> None:
    lines = [line(0), line(1, plans=[plan(1, [0])], uploads=[{"client_id": 1, "metrics": {"peak_bytes": 130}}])]
    answer = words.inside([reading.Group("m", (record(tmp_path, lines),))])
    assert answer.tone == "bad"
    assert "OVER BUDGET: client 1 by 30 B" in answer.sentences[0]


def test_a_comparison_says_who_leads_and_over_how_many_seeds(comparison: Path) -> None:
    text = Parsed(page.render([comparison])).text()
    assert re.search(r"is ahead of \S+ by \d\.\d{4} in accuracy \(2 seeds", text) or "are level" in text
    assert "over 2 seeds" in text


def test_privacy_spent_is_said_and_drawn(tmp_path: Path) -> None:
    record(tmp_path, [line(0), line(1, facts={"epsilon": 1.5}), line(2, facts={"epsilon": 2.5})])
    text = Parsed(page.render([tmp_path])).text()
    assert "epsilon 2.5" in text
    assert "Privacy spent (epsilon)" in text


# --- the page -----------------------------------------------------------------------------------------------------


def test_everything_that_the_record_says_is_on_the_page(parsed: Parsed, run: Path) -> None:
    text = parsed.text()
    for title in (
        *("Training loss", "Accuracy over bytes", "Accuracy over measured seconds", "Aggregation error"),
        *("Who trained which block, and how often", "Memory: budget, predicted and measured peak"),
        *("Coverage of blocks", "Who has what data", "Global score of blocks", "Failed and left out"),
        *("Resolved configuration", "How to reproduce", "down: changes of the base that clients lacked"),
    ):
        assert title in text, title
    manifest = RunDirectory.open(run).manifest
    assert str(manifest["commit"] or "installed, not a checkout") in text
    assert f"fedpilot run {run / 'recipe.toml'}" in text
    assert "for the least that this method trains" in text


def test_hostile_names_stay_text(parsed: Parsed) -> None:
    assert sum(data.count(HOSTILE) for tag, data in parsed.inside if tag not in ("script", "style")) > 3
    scripts = [attributes for attributes in parsed.of("script") if attributes.get("type") != "application/json"]
    assert len(scripts) == 1
    assert not any(name.startswith("on") for _, attributes in parsed.tags for name in attributes)
    assert 'R&B "x"' in parsed.text()
    blocks = [json.loads(data) for tag, data in parsed.inside if tag == "script" and data.startswith("{")]
    assert any(HOSTILE in block.get("rows", ()) for block in blocks)


def test_the_page_refers_to_nothing_outside(parsed: Parsed) -> None:
    for _, attributes in parsed.tags:
        for name in ("src", "href", "action", "data", "srcset", "poster"):
            assert (attributes.get(name) or "#").startswith("#")
    style = "".join(data for tag, data in parsed.inside if tag == "style")
    assert "url(" not in style
    assert "@import" not in style
    policy = next(one for one in parsed.of("meta") if one.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in str(policy["content"])
    assert "unsafe" not in str(policy["content"])


def test_ids_are_unique_and_every_reference_finds_its_own(parsed: Parsed) -> None:
    ids = Counter(attributes["id"] for _, attributes in parsed.tags if "id" in attributes)
    assert set(ids.values()) == {1}
    for _, attributes in parsed.tags:
        for reference in (attributes.get("aria-labelledby") or "").split():
            assert reference in ids
        if (attributes.get("href") or "").startswith("#"):
            assert str(attributes["href"])[1:] in ids


def test_every_plot_has_a_title_a_description_and_a_table(run: Path) -> None:
    text = (run / "report.html").read_text()
    figures = re.findall(r"<figure>.*?</figure>", text, flags=re.DOTALL)
    assert len(figures) >= 15
    for figure in figures:
        assert re.search(r"<title id=\"[\w-]+\">[^<]+</title><desc id=\"[\w-]+\">[^<]{20,}</desc>", figure)
        assert figure.count("<tr") > 1
        assert 'role="img"' in figure


def test_several_seeds_have_bands_and_the_spread_in_the_tables(comparison: Path) -> None:
    text = page.render([comparison])
    assert text.count('class="band"') >= 2
    assert re.search(r"<td>0\.\d{4} ± 0\.\d{4}</td>", text)
    assert "fed-pilot" in text
    assert "Settings that are not the same for all" in text


def test_several_directories_stand_side_by_side(run: Path, comparison: Path, tmp_path: Path) -> None:
    result = fedpilot("report", str(run), str(comparison), "--out", str(tmp_path / "both.html"))
    assert result.exit_code == 0, result.output
    text = Parsed((tmp_path / "both.html").read_text()).text()
    assert "run: fed-pilot" in text
    assert "cmp: fedit" in text


def test_report_of_nothing_is_refused_with_a_way_out(tmp_path: Path) -> None:
    result = fedpilot("report", str(tmp_path))
    assert result.exit_code == 1
    assert "name a run directory" in result.output


def test_a_report_that_fails_does_not_fail_the_run(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(paths: object, out: object = None) -> Path:
        raise ValueError("no ink")

    monkeypatch.setattr(page, "write", broken)
    recipe = load_recipe(folder / "recipe.toml", ["run.rounds=1", "baseline.name=fedit"])
    job = jobs.start(recipe, folder / "unwritten")
    jobs.run(job)
    assert len(job.directory.lines()) == 2
    assert "report.html could not be written" in caplog.text


def test_the_page_of_a_comparison_is_the_same_without_the_runs_tensors(comparison: Path) -> None:
    assert page.render([comparison]) == page.render([comparison])


def test_the_templates_are_in_the_wheel(tmp_path: Path) -> None:
    root = Path(__file__).parent.parent
    wheel = next(WheelBuilder(str(root)).build(directory=str(tmp_path), versions=["standard"]))
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {f"fedpilot/report/templates/report.{end}" for end in ("html.j2", "css", "js")} <= names


# --- colours and sizes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("palette", [theme.LIGHT, theme.DARK], ids=["light", "dark"])
def test_colours_stand_out_as_wcag_aa_asks(palette: dict[str, str]) -> None:
    for ground in ("page", "panel"):
        for text in ("text", "muted", "link", "good", "bad"):
            assert theme.contrast(palette[text], palette[ground]) >= 4.5, (text, ground)
        for mark in ("edge", "hatch", *(f"s{k}" for k in range(svg.SERIES))):
            assert theme.contrast(palette[mark], palette[ground]) >= 3, (mark, ground)
    for shade in range(svg.LEVELS):
        assert theme.contrast(palette[f"n{shade}"], palette[f"l{shade}"]) >= 4.5, shade
    for series in range(svg.SERIES):  # a line's name is written in its colour, on a button
        assert theme.contrast(palette[f"s{series}"], palette["panel"]) >= 4.5, series
    shades = [theme.luminance(palette[f"l{shade}"]) for shade in range(svg.LEVELS)]
    assert shades in (sorted(shades), sorted(shades, reverse=True))


def test_lines_differ_in_colour_or_dash() -> None:
    looks = [(index % svg.SERIES, svg.dash_of(index)) for index in range(2 * svg.SERIES)]
    assert len(set(looks)) == len(looks)


def test_a_heat_map_has_as_many_paths_as_shades_whatever_its_size() -> None:
    values = np.arange(300 * 7).reshape(300, 7) % 11 - 1
    table = svg.Table(["row", "value"], [["a", "b"]])
    names = [str(row) for row in range(300)]
    drawn = svg.heat_map(
        *("m", "title", "what", values, names, names, list("abcdefg")),
        unit="rounds",
        column_name="block",
        about=names,
        table=table,
    )
    assert drawn.svg.count("<path") == svg.LEVELS + 2  # hatching twice: the pattern and the cells
    assert drawn.data["values"] == values.tolist()


def test_a_thousand_clients_in_two_hundred_rounds_make_a_page_of_a_few_megabytes(tmp_path: Path) -> None:
    start = time.process_time()
    file = page.write([large(tmp_path / "large")])
    assert time.process_time() - start < 30
    assert file.stat().st_size < 4e6
    assert Parsed(file.read_text()).of("svg")


def test_where_every_client_has_its_own_budget_a_tier_has_the_bar_of_its_fullest_client(tmp_path: Path) -> None:
    tiers = ["small"] * 20 + ["large"] * 20
    plans = [
        {"client_id": k, "budget_bytes": 1000 + k, "trained": [0], "peak_bytes": 990 if k in (3, 30) else 400}
        for k in range(40)
    ]
    run = record(tmp_path, [line(0), line(1, plans=plans)], tiers=tiers)
    drawn = figures.budgets("g", run)
    assert drawn is not None
    assert [row[:3] for row in drawn.table.rows] == [["small", "1003 B", "990 B"], ["large", "1.0 KiB", "990 B"]]


# --- in a browser ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[chromium.Page]:
    with chromium.Page(tmp_path_factory.mktemp("browser")) as opened:
        yield opened


def at_round_3(browser: chromium.Page) -> tuple[float, float]:
    """In the first plot; the baseline may have more rounds, for equal time."""
    x = browser.run("JSON.parse(document.getElementById('c-metric-data').textContent).lines[0].x[3]")
    return browser.place("#c-metric svg", x / svg.WIDTH, 0.5)


def tip(browser: chromium.Page) -> str:
    return str(browser.run("document.getElementById('tip').hidden ? '' : document.getElementById('tip').textContent"))


@pytest.mark.slow  # they need Chromium, which `make slow` installs
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [360, 1200])
def test_the_page_is_silent_asks_for_nothing_and_fits(
    browser: chromium.Page, run: Path, width: int, dark: bool
) -> None:
    browser.said.clear()
    browser.requests.clear()
    browser.open(run / "report.html", width=width, dark=dark)
    assert browser.said == []
    assert browser.requests == [(run / "report.html").resolve().as_uri()]
    assert browser.run("document.documentElement.scrollWidth") <= width
    ground = browser.run("getComputedStyle(document.body).backgroundColor")
    wanted = (theme.DARK if dark else theme.LIGHT)["page"]
    assert ground == f"rgb({', '.join(str(int(wanted[k : k + 2], 16)) for k in (1, 3, 5))})"
    assert browser.run("[...document.querySelectorAll('.plot svg')].every(s => s.getBoundingClientRect().width > 200)")


@pytest.mark.slow  # they need Chromium, which `make slow` installs
def test_a_pointer_reads_every_kind_of_plot(browser: chromium.Page, run: Path) -> None:
    browser.open(run / "report.html")
    browser.point(*at_round_3(browser))
    assert re.match(r"round: 3\nfed-pilot: [\d.]+\nfedit \(exclusive\): [\d.]+$", tip(browser))
    browser.point(*browser.place("#g0-blocks", 0.4, 0.05))
    assert tip(browser).startswith(f"{HOSTILE}\ntiny, 20.0 KiB; asked in 0 rounds, left out 3 times\nblock ")
    browser.point(*browser.place("#g0-blocks", 0.4, 0.4))
    assert re.search(r"3 rounds\nscore, mean over rounds: [\d.]+\nscore, last: [\d.]+\nrank, last: 2$", tip(browser))
    browser.point(*browser.place("#g0-memory", 0.5, 0.5))
    assert "predicted peak" in tip(browser)
    browser.point(*browser.place("#g0-coverage", 0.9, 0.5))
    assert "block 2" in tip(browser)
    browser.point(*browser.place("h1"))
    assert tip(browser) == ""


@pytest.mark.slow  # they need Chromium, which `make slow` installs
def test_the_keyboard_reads_what_a_pointer_does_and_says_it_aloud(browser: chromium.Page, run: Path) -> None:
    browser.open(run / "report.html")
    browser.run("document.getElementById('g0-blocks').focus()")
    for key in ("ArrowDown", "ArrowDown", "ArrowRight"):
        browser.press(key)
    spoken = browser.run("document.getElementById('said').textContent")
    assert spoken == tip(browser)
    assert spoken.startswith('R&B "x"')
    assert "block 1: 3 rounds" in spoken
    browser.press("Escape")
    assert tip(browser) == ""


@pytest.mark.slow  # they need Chromium, which `make slow` installs
def test_filters_keep_the_clients_that_they_name(browser: chromium.Page, run: Path) -> None:
    browser.open(run / "report.html")

    def rows() -> int:
        return int(browser.run("document.querySelectorAll('#g0-blocks .names text').length"))

    assert rows() == 3
    browser.run(
        "(s => {s.value = 'large'; s.dispatchEvent(new Event('change'))})(document.querySelector('#g0 select'))"
    )
    assert rows() == 1
    assert browser.run("document.querySelector('#g0 output').textContent") == "1 of 3 clients shown"
    browser.point(*browser.place("#g0-blocks", 0.4, 0.05))
    assert tip(browser).startswith("Rome")
    hidden = "document.querySelectorAll('#g0 table[data-clients] tbody tr[hidden]').length"
    assert browser.run(hidden) == 4
    browser.run("(s => {s.value = 'zz'; s.dispatchEvent(new Event('input'))})(document.querySelector('#g0 input'))")
    assert rows() == 0
    browser.point(*browser.place("#g0-blocks", 0.4, 0.05))
    assert browser.said == []


@pytest.mark.slow  # they need Chromium, which `make slow` installs
def test_a_line_can_be_taken_away_and_the_theme_turned(browser: chromium.Page, run: Path) -> None:
    browser.open(run / "report.html")
    browser.run("document.querySelector('.lines button[data-line=\"1\"]').click()")
    assert browser.run("getComputedStyle(document.querySelector('#c-metric [data-s=\"1\"]')).display") == "none"
    browser.point(*at_round_3(browser))
    assert "fedit" not in tip(browser)
    before = browser.run("getComputedStyle(document.body).backgroundColor")
    browser.run("document.getElementById('theme').click()")
    assert browser.run("getComputedStyle(document.body).backgroundColor") != before


@pytest.mark.slow  # they need Chromium, which `make slow` installs
def test_the_large_page_opens_in_two_seconds_and_answers(browser: chromium.Page, tmp_path: Path) -> None:
    file = page.write([large(tmp_path / "large")])
    taken = min(browser.open(file) for _ in range(3))
    assert taken < 2
    browser.point(*browser.place("#g0-blocks", 0.5, 0.3))
    assert re.match(r"client \d+\nsmall", tip(browser))
