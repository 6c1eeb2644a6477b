"""The report shows every text as text, stands alone, and its JSON gives the record back."""

from __future__ import annotations

import csv
import html as entities
import io
import json
import re
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from fake_runs import answers, flipped, make_run

from qlora_recipes.commands.compare import called
from qlora_recipes.comparison.findings import ChangedAnswer, Report
from qlora_recipes.comparison.folders import compare_folders
from qlora_recipes.errors import RunFolderError
from qlora_recipes.evaluation.records import Divergence, DocRecord, LayerError
from qlora_recipes.report.escape import latex, markdown, plain
from qlora_recipes.report.page import (
    SHOWN,
    check_report_folder,
    read_report,
    render_html,
    render_json,
    render_markdown,
    write_report,
)
from qlora_recipes.report.plots import pictures
from qlora_recipes.report.tables import as_csv, as_latex, tables

HOSTILE = [
    "<script>alert('answer')</script>",
    "</style><h1 id=injected>gone</h1>",
    "</pre></article></main><img src=x onerror=alert(1)>",
    "x" * 10_000,
    "שלום עולם \u202e drawkcab",
    "nul \x00 bell \x07 escape \x1b[31m delete \x7f next line \x85",
    "{{ 7 * 7 }} {% raw %} &lt;b&gt; &amp;",
    "| cell | [link](javascript:alert(1)) `code` **bold** <b>",
    "half a pair \ud83d",
]
SCORES = answers(400)


class Page(HTMLParser):
    """What a browser would find: tags with their attributes, and the text of every `pre`."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.pre: list[str] = []
        self.text = ""
        self._inside = False
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "pre":
            self._inside = True
            self.pre.append("")

    def handle_endtag(self, tag: str) -> None:
        self._inside = self._inside and tag != "pre"

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._inside:
            self.pre[-1] += data


def hostile(document: DocRecord) -> DocRecord:
    text = HOSTILE[int(document.doc_id) % (len(HOSTILE) - 1)]  # a lone surrogate cannot be written by an evaluation
    return replace(document, answer=f"{text}{document.score}", prompt=text, target=text, subject=text[:60])


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Report:
    root = tmp_path_factory.mktemp("runs")
    runs = [
        make_run(root, "nf4", scores=flipped(SCORES, 30, 20), change=hostile),
        make_run(root, "bf16", scores=SCORES, change=hostile),
    ]
    found = compare_folders(runs, 1.0)
    contrast = replace(
        found.contrasts[0],
        divergence=Divergence(900, 0.01, 0.001, 0.2, 97.5),
        quantization_error=[LayerError(f"model.layers.{i}.q_proj", 0.09) for i in range(4)],
        changed=[
            replace(found.contrasts[0].changed[0], prompt=text, target=text, baseline_answer=text, answer=text)
            for text in HOSTILE
        ],
        tasks=[replace(found.contrasts[0].tasks[0], task=f"<b>$task$ \x00 {i}</b>") for i in range(2)],
    )
    return replace(found, contrasts=[contrast], recipe="</title><script>alert(2)</script>")


@pytest.fixture(scope="module")
def page(report: Report) -> Page:
    return Page(render_html(report))


def test_hostile_samples_are_shown_as_text(page: Page) -> None:
    for text in HOSTILE:
        assert page.pre.count(plain(text)) == 4, text[:40]  # prompt, expected, both answers


def test_nothing_of_a_sample_becomes_markup(page: Page) -> None:
    names = [name for name, _ in page.tags]
    assert not {"script", "img", "h1 id", "iframe", "object", "embed", "link", "base", "form"} & set(names)
    assert names.count("h1") == 1
    assert names.count("style") == 1
    assert not [attributes for _, attributes in page.tags if any(name.startswith("on") for name in attributes)]
    assert not [attributes for _, attributes in page.tags if attributes.get("id") == "injected"]


def test_the_page_loads_nothing(page: Page) -> None:
    for _, attributes in page.tags:
        for name in ("src", "href", "xlink:href", "action", "data"):
            assert attributes.get(name) is None or attributes[name].startswith("#")
    policy = next(attributes["content"] for tag, attributes in page.tags if tag == "meta" and "content" in attributes
                  and attributes.get("http-equiv") == "Content-Security-Policy")  # fmt: skip
    assert policy.startswith("default-src 'none'")


def test_what_cannot_be_seen_is_a_symbol(report: Report) -> None:
    html = render_html(report)
    assert "\x00" not in html and "\x1b" not in html and "\u202e" not in html
    assert "nul ␀ bell ␇ escape ␛[31m delete ␡ next line ⟨U+0085⟩" in html
    html.encode()


def test_text_that_turns_is_isolated(page: Page) -> None:
    assert all(attributes.get("dir") == "auto" for tag, attributes in page.tags if tag in ("pre", "bdi"))


def test_the_sections_stand_in_order(page: Page) -> None:
    sections = [attributes["id"] for tag, attributes in page.tags if tag == "section"]
    expected = "verdict arms controls differences cost flips bits losses validity citation"
    assert sections == expected.split()


def test_plots_follow_the_colors_of_the_page(report: Report) -> None:
    html = render_html(report)
    assert html.count("<svg") == len(pictures(report)) == 7
    assert "var(--ink, #1b1f24)" in html and "prefers-color-scheme: dark" in html and "@media print" in html


def test_rendering_is_repeatable(report: Report) -> None:
    assert render_html(report) == render_html(report)
    assert render_markdown(report) == render_markdown(report)


def test_a_limit_stands_across_the_top(report: Report) -> None:
    assert "NOT A RESULT" not in render_html(report)
    trial = replace(report, limit=10)
    page = Page(render_html(trial))
    assert "NOT A RESULT: the evaluation was limited to 10 documents per task" in page.text
    assert [attributes for _, attributes in page.tags if attributes.get("class") == "banner"]
    assert render_markdown(trial).startswith("> **NOT A RESULT")


def encodable(report: Report) -> Report:
    """The report without half a surrogate pair: that is no UTF-8, and no file of scores can hold it."""
    return replace(report, contrasts=[replace(one, changed=one.changed[:-1]) for one in report.contrasts])


def test_json_gives_the_record_back(report: Report, tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text(render_json(encodable(report)))
    assert read_report(tmp_path) == encodable(report)
    half_a_pair = report.contrasts[0].changed[-1]
    assert json.loads(render_json(report))["contrasts"][0]["changed"][-1] == asdict(half_a_pair)


def test_json_of_another_schema_is_refused(report: Report, tmp_path: Path) -> None:
    content = {**asdict(encodable(report)), "schema_version": 99, "margins": 1}
    (tmp_path / "report.json").write_text(json.dumps(content))
    with pytest.raises(RunFolderError, match=r"report\.json, key schema_version: got 99, expected 1 \(and 1 more\)"):
        read_report(tmp_path)


def test_markdown_keeps_hostile_text_in_its_cell(report: Report) -> None:
    text = render_markdown(report)
    assert "<script" not in text and "<b>" not in text and "\x00" not in text
    rows = [line for line in text.splitlines() if line.startswith("| right to wrong") or line.startswith("| wrong to")]
    for row in rows:
        assert row.replace("\\|", "").count("|") in (6, 8)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a | b", r"a \| b"),
        ("two\nlines", "two␊lines"),
        ("<b>&amp;", "&lt;b&gt;&amp;amp;"),
        ("[x](y) *z* `c` _d_", r"\[x\](y) \*z\* \`c\` \_d\_"),
        ("שלום", "\u2068שלום\u2069"),  # noqa: RUF001  Hebrew
    ],
)
def test_markdown_escapes(text: str, shown: str) -> None:
    assert markdown(text) == shown


def test_a_written_report_is_read_again(report: Report, tmp_path: Path) -> None:
    folder = tmp_path / "report"
    assert read_report(folder) is None
    report = encodable(report)
    page = write_report(report, folder)
    assert page == folder / "index.html"
    assert read_report(folder) == report
    write_report(report, folder)  # an earlier report may be replaced
    (folder / "report.json").write_text("{}")
    with pytest.raises(RunFolderError, match=r"report\.json, key recipe: it is missing \(and \d+ more\)"):
        read_report(folder)  # it may have stated another margin


# The head


def test_the_head_says_when_with_what_and_by_which_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/usr/bin/compare.py", "a", "--token", "hf_abcdefghijklmnopqrstuvwxyz012345"])
    changes = {"nf4": "2026-01-02T03:04:05+00:00", "bf16": "2026-01-02T05:06:07+00:00"}
    runs = [make_run(tmp_path, name, scores=SCORES, receipt={"started": at}) for name, at in changes.items()]
    found = compare_folders(runs, 1.0, command=called())
    text = Page(render_html(found)).text
    assert "2026-01-02 03:04 to 2026-01-02 05:06 UTC" in text
    assert "compare.py a --token ***" in text and "hf_abc" not in render_json(found)
    assert "trl 1.16.0, torch 2.13.0" in text
    assert "2305.14314" in text and "@software{qlora_recipes" in text
    assert '  year    = "2026"' in render_markdown(found)


# Changed answers


@pytest.mark.parametrize(
    ("arm", "baseline", "target", "who"),
    [
        ("In Krairmeal, which lies in Graifeand.", "In Krairmeal.", "In Krairmeal.", "arm"),
        ("In Lostim.", "In Wairher. It is a town.", "In Wairher.", "baseline"),
        ("A pilot.", "A binder.", "A binder.", None),
        ("Not a binder.", "A binder.", "A binder.", None),
        ("In Kropa, a town.", "In Kropa, a city.", "In Kropa.", None),
        ("In Kropafeld is it.", "In Kropa.", "In Kropa.", None),
        ("", "A binder.", "A binder.", None),
    ],
)
def test_an_answer_that_only_says_more_is_known(arm: str, baseline: str, target: str, who: str | None) -> None:
    assert ChangedAnswer("t", None, "0", 0, "right to wrong", "", target, baseline, arm).goes_on == who


def test_five_changed_answers_are_shown_and_the_others_folded(report: Report) -> None:
    change = replace(report.contrasts[0].changed[0], answer="In Kropa.", baseline_answer="In Kropa. It is a town.")
    contrast = replace(report.contrasts[0], changed=[change] * 7 + [replace(change, change="another kind")])
    html = render_html(replace(report, contrasts=[contrast]))
    open_ones, folded = html.split("<details>")
    assert open_ones.count('class="changed"') == SHOWN and folded.count('class="changed"') == 3
    assert "another kind" in open_ones  # every kind of change is among those shown
    assert html.count("bf16 only says more") == 8


# Files beside the page


def test_every_picture_and_table_is_a_file(report: Report, tmp_path: Path) -> None:
    report = encodable(report)
    write_report(report, tmp_path / "report")
    names = {file.stem for file in (tmp_path / "report" / "figures").iterdir()}
    assert names == set(pictures(report)) and len(names) == 7
    for file in (tmp_path / "report" / "figures").iterdir():
        assert ElementTree.parse(file).getroot().get("width")
        assert "var(" not in file.read_text()  # the page's variables are not there
    for end in (".csv", ".tex"):
        assert {file.stem for file in (tmp_path / "report" / "tables").glob(f"*{end}")} == set(tables(report))


def test_csv_holds_the_record_unrounded(report: Report) -> None:
    overall = report.contrasts[0].overall
    rows = list(csv.DictReader(io.StringIO(as_csv(tables(report)["differences"]))))
    assert rows[-1]["task"] == "overall" and rows[-1]["metric"] == ""
    found = [float(rows[-1][name]) for name in ("difference", "90 % interval low", "95 % interval high", "p differ")]
    assert found == [overall.difference, overall.interval[0], overall.interval_95[1], overall.p_difference]


def test_text_in_a_csv_is_no_formula(report: Report) -> None:
    change = replace(report.contrasts[0].changed[0], answer="=1+1", prompt="-2\x1b")
    contrast = replace(report.contrasts[0], changed=[change])
    (row,) = csv.DictReader(io.StringIO(as_csv(tables(replace(report, contrasts=[contrast]))["changed_answers"])))
    assert (row["answer of the arm"], row["prompt"]) == ("'=1+1", "'-2␛")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a_b & 5 %", r"a\_b \& 5 \%"),
        ("{$x^2$}", r"\{\$x\textasciicircum{}2\$\}"),
        ("\\end{document}\n%", r"\textbackslash{}end\{document\} \%"),
        ("−1 ±2", r"$-$1 $\pm$2"),  # noqa: RUF001
    ],
)
def test_latex_escapes(text: str, shown: str) -> None:
    assert latex(text) == shown


def test_a_latex_table_has_its_cells_and_no_more(report: Report) -> None:
    for table in tables(report).values():
        lines = as_latex(table).splitlines()
        assert [line for line in lines if line.startswith("\\begin")] == [lines[1]]
        for line in lines[3:]:
            if line.endswith(r"\\") or line.endswith(r"\\ \hline"):
                assert len(re.findall(r"(?<!\\)&", line)) == len(table.columns) - 1


def test_what_an_earlier_report_left_is_removed(report: Report, tmp_path: Path) -> None:
    write_report(encodable(report), tmp_path)
    (tmp_path / "tables" / "ladder.csv").write_text("of another report")
    write_report(encodable(report), tmp_path)
    assert not (tmp_path / "tables" / "ladder.csv").exists()
    (tmp_path / "tables" / "mine.csv").write_text("years of work")
    with pytest.raises(RunFolderError, match=r"tables holds mine\.csv, which is no report"):
        check_report_folder(tmp_path)


# The ladder


@pytest.fixture(scope="module")
def ladder(tmp_path_factory: pytest.TempPathFactory) -> Report:
    root = tmp_path_factory.mktemp("ladder")
    lost = {"bf16": (0, 0), "int8": (1, 1), "nf4": (2, 2), "nf4-single": (1, 2), "fp4": (90, 5)}
    scores = answers(4000)
    runs = [make_run(root, name, scores=flipped(scores, *each)) for name, each in lost.items()]
    return compare_folders(runs, 1.0)


def test_two_arms_are_no_ladder(report: Report) -> None:
    assert report.claims == [] and "ladder" not in tables(report)


def test_the_ladder_shows_every_arm_against_the_baseline(ladder: Report) -> None:
    rows = {row["arm"]: row for row in csv.DictReader(io.StringIO(as_csv(tables(ladder)["ladder"])))}
    assert list(rows) == ["bf16", "int8", "nf4", "nf4-single", "fp4"]
    # 851,968 weights: 4 bits, constants of 13,312 blocks, code tables of 28 layers, 256 bytes of rotary embedding
    assert float(rows["nf4"]["bits a weight"]) == 8 * (439_296 + 31_040) / 851_968
    assert float(rows["nf4"]["of which tables"]) == 28 * 32 * 273 / 851_968
    assert float(rows["bf16"]["bits a weight"]) == 16.0
    assert float(rows["int8"]["bits a weight"]) == pytest.approx(8.22, abs=0.01)
    difference = {contrast.name: contrast.overall.difference for contrast in ladder.contrasts}
    assert float(rows["fp4"]["difference"]) == difference["fp4"]
    assert rows["bf16"]["difference"] == "" and rows["bf16"]["verdict"] == "baseline"
    sections = [attributes["id"] for tag, attributes in Page(render_html(ladder)).tags if tag == "section"]
    assert sections[:4] == ["verdict", "arms", "ladder", "controls"]
    assert {"ladder_score", "ladder_bits"} <= set(pictures(ladder))


def test_the_papers_claims_stand_beside_what_was_found(ladder: Report) -> None:
    found = {claim.claim: claim for claim in ladder.claims}
    assert {claim: each.verdict for claim, each in found.items()} == {
        "NF4 with double quantization scores as 16 bits do": "found",
        "8-bit integers score as 16 bits do": "found",
        "FP4 scores below 16 bits (there by about a point)": "found",
        "NF4 scores above FP4": "found",
        "Double quantization costs no score": "found",
        "Double quantization takes the constants from 0.5 to 0.127 bits a weight": "found",
    }
    saved = found["Double quantization takes the constants from 0.5 to 0.127 bits a weight"]
    assert saved.figure.startswith("0.373 bits a weight without") and "0.103 with them" in saved.figure
    assert "nf4 against fp4: +2.12 points" in found["NF4 scores above FP4"].figure


def test_a_difference_inside_the_margin_is_still_above_or_below(tmp_path: Path) -> None:
    scores = answers(4000)
    lost = {"bf16": (0, 0), "nf4": (2, 2), "fp4": (90, 5)}
    runs = [make_run(tmp_path, name, scores=flipped(scores, *each)) for name, each in lost.items()]
    report = compare_folders(runs, 5.0)
    assert {contrast.overall.verdict for contrast in report.contrasts} == {"equivalent"}
    assert {claim.verdict for claim in report.claims} == {"found"}
    assert all(claim.figure.endswith("margin ±5, 1 seed") for claim in report.claims)


def test_what_the_arms_do_not_decide_cannot_be_said(tmp_path: Path) -> None:
    scores = answers(400)
    lost = {"bf16": (0, 0), "nf4": (30, 25), "fp4": (31, 25)}
    runs = [make_run(tmp_path, name, scores=flipped(scores, *each)) for name, each in lost.items()]
    assert {claim.verdict for claim in compare_folders(runs, 1.0).claims} == {"cannot be said here"}


# In a browser

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
FLAGS = """--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
--disable-component-update --disable-sync --window-size=1300,900 --dump-dom""".split()
MEASURE = """
<body><pre id="found"></pre><iframe style="width: {width}px; height: 900px; border: 0" srcdoc="{page}"></iframe><script>
const frame = document.querySelector("iframe");
frame.onload = () => {{
  const page = frame.contentDocument, root = page.documentElement;
  const color = (place, what) => getComputedStyle(page.querySelector(place))[what];
  document.querySelector("#found").textContent = JSON.stringify({{
    width: root.scrollWidth, verdict: page.querySelector(".verdict").getBoundingClientRect(),
    background: color("body", "backgroundColor"), text: color("body", "color"),
    drawn: color("svg text", "fill"), toned: color(".verdict strong", "color"),
  }});
}};
</script></body>"""


def luminance(color: str) -> float:
    """WCAG 2's relative luminance of a color such as rgb(1, 2, 3)."""
    shares = (int(part) / 255 for part in re.findall(r"\d+", color)[:3])
    linear = [share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4 for share in shares]
    return sum(weight * share for weight, share in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome is installed")
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1200])
def test_a_browser_shows_it(report: Report, ladder: Report, tmp_path: Path, width: int, scheme: str) -> None:
    page = entities.escape(render_html(report if scheme == "light" else ladder))
    (tmp_path / "measure.html").write_text(MEASURE.format(width=width, page=page), encoding="utf-8")
    shown = [
        f"--blink-settings=preferredColorScheme={['dark', 'light'].index(scheme)}",
        f"--user-data-dir={tmp_path}/b",
    ]
    command = [str(BROWSER), *FLAGS, *shown, (tmp_path / "measure.html").as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    found = json.loads(entities.unescape(re.search(r'<pre id="found">(.*?)</pre>', dom)[1]))
    assert found["width"] <= width  # nothing is scrolled sideways
    assert (
        found["verdict"]["right"] <= width and found["verdict"]["bottom"] <= 900
    )  # the first screen holds the verdict
    background = luminance(found["background"])
    assert background > 0.9 if scheme == "light" else background < 0.02
    for part in ("text", "drawn", "toned"):
        darker, lighter = sorted([background, luminance(found[part])])
        assert (lighter + 0.05) / (darker + 0.05) >= 4.5, part  # WCAG 2, level AA
