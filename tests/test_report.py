"""The report shows every text as text, stands alone, and its JSON gives the record back."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from fake_runs import answers, flipped, make_run

from qlora_recipes.commands.compare import compare_folders
from qlora_recipes.comparison.escape import markdown, plain
from qlora_recipes.comparison.findings import Report
from qlora_recipes.comparison.report import read_report, render_html, render_json, render_markdown, write_report
from qlora_recipes.errors import RunFolderError
from qlora_recipes.evaluation.records import Divergence, DocRecord, LayerError

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
    assert sections == ["verdict", "differences", "flips", "bits", "cost", "losses", "controls", "validity"]


def test_plots_follow_the_colors_of_the_page(report: Report) -> None:
    html = render_html(report)
    assert html.count("<svg") == 3
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
