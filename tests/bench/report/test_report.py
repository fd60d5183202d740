"""The report: every kind of result on one page that needs nothing else, and what is wrong stands there as wrong."""

import html
import html.parser
import itertools
import json
import sys
from pathlib import Path

import bench_results as made
import pytest
from typer.testing import CliRunner

from fusebert.bench.cli import app
from fusebert.bench.report.sections import CPU_WARNING
from fusebert.bench.report.write import write_report
from fusebert.train.errors import UserError

PNG = b"\x89PNG\r\n\x1a\n"
VOID = {"meta", "img", "source", "br"}


EVERY_KIND = {
    "kernels": made.every_operator,
    "step": made.some_step,
    "train": lambda: made.train({"fusebert": [1.0] * 5, "transformers": [2.25] * 5, "wrong one": None}),
    "parity": made.parity,
    "pretrain": made.pretrain,
    "aot": made.aot,
    "campaign": made.campaign,
    "predict": made.predict,
    "calibrate": made.calibrate,
    "race": made.race,
}


def report_of(tmp_path, *, draw=False, **results):
    """(folder, page, Markdown); without ``draw`` as where matplotlib is not installed, which is faster."""
    paths = []
    for name, result in results.items():
        paths.append(tmp_path / f"{name}.json")
        paths[-1].write_text(json.dumps(result))
    out = tmp_path / "report"
    with pytest.MonkeyPatch.context() as patch:
        if not draw:
            patch.setitem(sys.modules, "matplotlib", None)
        write_report(paths, out, say=lambda _: None)
    return out, (out / "report.html").read_text(), (out / "report.md").read_text()


class Reader(html.parser.HTMLParser):
    """Tags that fit together, rows of tables, and every address."""

    def __init__(self, text):
        super().__init__()
        self.open, self.rows, self.addresses, self.ids, self.words = [], [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.addresses += [attributes[name] for name in ("src", "href", "srcset") if name in attributes]
        self.ids.append(attributes.get("id"))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append((attributes.get("class", ""), []))
        if tag in ("td", "th"):
            self.rows[-1][1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][1][-1] += data

    def row(self, *starts):
        """The class and cells of the first row that begins with these cells."""
        return next(each for each in self.rows if tuple(each[1][: len(starts)]) == starts)


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    pytest.importorskip("matplotlib")
    results = {name: make() for name, make in EVERY_KIND.items()}
    return report_of(tmp_path_factory.mktemp("everything"), draw=True, **results)


def test_one_page_that_needs_nothing_else(everything):
    out, page_text, _ = everything
    reader = Reader(page_text)
    assert "http" not in page_text.replace('lang="en"', "")
    for address in reader.addresses:
        assert address.startswith("data:image/png;base64,") or address.removeprefix("#") in reader.ids
    assert "viewport" in page_text
    assert "prefers-color-scheme: dark" in page_text
    pngs = list(out.glob("*.png"))
    assert all(path.read_bytes().startswith(PNG) for path in pngs)
    assert page_text.count("<img ") == len(pngs) == page_text.count("<source ")


def test_markdown_names_every_plot_and_nothing_else(everything):
    out, _, markdown = everything
    linked = {line.partition("](")[2].rstrip(")") for line in markdown.splitlines() if line.startswith("![")}
    assert linked == {path.name for path in out.glob("*.png")}


def test_every_kind_has_its_section(everything):
    _, page_text, markdown = everything
    for words in (
        "Operators, bfloat16, Made-up GPU",
        "Training step, mini, float32, lengths all 128, CPU path",
        "Training run beside Transformers, mini, float32",
        "Training beside Transformers, float32",
        "Pretraining run, tiny",
        "Compiled kernels, sm_90",
        "Campaign",
        "Method",
        "Environment",
    ):
        assert words in page_text
        assert words in markdown


def test_figures_are_those_of_the_files(everything):
    reader = Reader(everything[1])
    assert reader.row("attention N=64, forward+backward")[1] == [
        "attention N=64, forward+backward",
        "2.00 [1.90, 2.10]",
        "sdpa flash",
        "1.000 ms",
        "1 %",
    ]
    kind, cells = reader.row("transformers", "right")
    assert cells == [
        "transformers",
        "right",
        "2.0e-03",
        "1.50",
        "400,000",
        "2.500 ms",
        "0.0 %",
        "2.50 [2.38, 2.62]",
        "50.0 %",
        "",
    ]
    assert kind == "peer"
    assert reader.row("fusebert", "right", "2.0e-03", "1.50", "1,000,000")[0] == "ours"
    cells = reader.row("transformers", "right", "444,444")[1]
    assert cells[3:] == ["2.25 [2.14, 2.36]", "2", "2,000", "6.5000", "6.2500", ""]
    assert reader.row("masked-LM accuracy")[1][1:] == ["0.1 %", "27.3 %"]
    assert reader.row("kernels", "OUT OF TIME")[0] == "bad"
    assert reader.row("attention N=64", "attn_short_backward")[0] == "bad"  # it spills


def test_what_is_wrong_is_shown_as_wrong_and_without_a_time(everything):
    _, page_text, markdown = everything
    reader = Reader(page_text)
    kind, cells = reader.row("transformers, bf16 weights")
    assert kind == "peer bad"
    assert cells[1] == "WRONG"
    assert cells[4:] == [""] * 6
    assert reader.row("attention", "N=64", "sdpa cudnn", "WRONG")[1][4] == "dq is 99.0 times as far as PyTorch"
    assert "| **sdpa cudnn** | WRONG |" in markdown


def test_what_is_wrong_of_ours_is_never_the_summary_of_a_case(tmp_path):
    result = made.every_operator()
    result["results"][0]["contestants"][0] = made.contestant("fusebert attention_varlen", "ours", None)
    for each in result["results"][0]["contestants"][1:]:
        if "timing" in each:
            each["ratio_to_ours"] = None
    _, page_text, _ = report_of(tmp_path, kernels=result)
    kind, cells = Reader(page_text).row("attention N=64, forward+backward")
    assert kind == "bad"
    assert cells[1:] == ["", "sdpa flash", "NOT TIMED", ""]


def test_missing_peers_are_named_with_their_remedy(everything):
    reader = Reader(everything[1])
    for op in ("attention", "mlm_loss"):
        assert reader.row("flash-attn", op)[1][2:] == ["not installed: pip install flash-attn", "every case"]


def test_where_it_was_measured(everything):
    reader = Reader(everything[1])
    assert reader.row("commit", "abcdef123456")
    assert "torch 9.9.9" in reader.row("packages")[1][1]
    assert reader.row("not installed")[1][1] == "liger-kernel"
    assert "driver_version 1.2.3" in reader.row("GPU before")[1][1]
    assert "clocks.sm 1500" in reader.row("GPU before")[1][1]
    seen = reader.row("GPU meanwhile")[1][1]
    assert "SM 900 to 1500 MHz, median 1400" in seen
    assert seen.endswith("; HELD DOWN by the driver in 25 % of the samples")
    assert reader.row("ceilings")[1][1] == "ceilings after the run: copy 99 %, matmul 97 % of before"


def test_cpu_results_say_that_they_time_the_cpu_path(tmp_path):
    (tmp_path / "gpu").mkdir()
    for device, path in (("cpu", tmp_path), ("cuda", tmp_path / "gpu")):
        _, page_text, markdown = report_of(path, kernels=made.every_operator(device))
        assert (CPU_WARNING in html.unescape(page_text)) == (device == "cpu")
        assert (CPU_WARNING in markdown) == (device == "cpu")


def test_a_run_cut_short_says_so(tmp_path):
    result = made.every_operator()
    del result["seconds"]
    result["left_out"] = ["attention N=8192"]
    result["did_not_fit"] = ["attention N=16384"]
    _, page_text, _ = report_of(tmp_path, kernels=result)
    assert "cut short" in page_text
    assert "Left out for want of time: attention N=8192" in page_text
    assert "for want of memory: attention N=16384" in page_text


def test_parity_that_fails_says_so(tmp_path):
    _, page_text, _ = report_of(tmp_path, parity=made.parity(right=False))
    assert "NOT THE SAME RUN" in page_text
    assert Reader(page_text).row("fusebert")[0] == "ours bad"


def test_names_from_files_are_text_not_markup(tmp_path):
    result = made.every_operator()
    evil = '<script>alert("x")</script>|`'
    for each in result["results"]:
        each["contestants"][1]["name"] = evil
        each["missing"] = [{"name": evil, "reason": evil}]
    _, page_text, markdown = report_of(tmp_path, kernels=result)
    reader = Reader(page_text)
    assert page_text.count("<script>") == 1  # the page's own
    assert reader.row(evil, "attention")
    assert "<script>" not in markdown
    tables = itertools.groupby(markdown.splitlines(), lambda line: line.startswith("|"))
    for is_table, rows in tables:
        if is_table:
            assert len({line.replace("\\|", "").count("|") for line in rows}) == 1


def test_without_matplotlib_there_are_tables(tmp_path):
    out, page_text, markdown = report_of(tmp_path, kernels=made.every_operator(), step=made.some_step())
    assert {path.name for path in out.iterdir()} == {"report.html", "report.md"}
    for text in (page_text, markdown):
        assert "pip install matplotlib" in text
        assert "2.00 [1.90, 2.10]" in text
        assert "![" not in text
    assert "<img" not in page_text


def test_every_committed_result_can_be_read(tmp_path):
    """The commands' own files, where the others of this module are made up."""
    files = sorted((Path(__file__).parents[3] / "bench" / "results").glob("*.json"))
    assert len(files) >= 3
    write_report(files, tmp_path / "out", say=lambda _: None)
    words = (tmp_path / "out" / "report.md").read_text()
    assert all(file.name in words for file in files)


def test_files_of_one_name_keep_apart(tmp_path):
    pytest.importorskip("matplotlib")
    paths = []
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        paths.append(tmp_path / folder / "step.json")
        paths[-1].write_text(json.dumps(made.some_step()))
    write_report(paths, tmp_path / "out", say=lambda _: None)
    names = {path.name for path in (tmp_path / "out").glob("*.png")}
    assert names == {f"{stem}-{plot}.png" for stem in ("step", "step-2") for plot in ("tokens-per-s", "speed-up")}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file"),
        ("{", "not JSON"),
        ("[1, 2]", "not a result file"),
        ('{"a": 1}', "not a result file"),
        (
            '{"kind": "poem", "schema": 1}',
            "of kind 'poem'; this command takes aot, calibrate, campaign, embed, finetune, finetune_parity, fuse, "
            "kernels, predict, predict_op, pretrain, quality, race, step, train",
        ),
        ('{"kind": "step", "schema": 99}', "version 99 of the result files; this fusebert reads version 1"),
        ('{"kind": "step", "schema": 1}', "not a whole step result"),
        ('{"kind": "kernels", "schema": 1, "results": 7}', "not a whole kernels result"),
    ],
)
def test_what_is_no_result_is_one_clear_error(tmp_path, content, message):
    path = tmp_path / "x.json"
    if content is not None:
        path.write_text(content)
    done = CliRunner().invoke(app, ["report", str(path), "--out", str(tmp_path / "out")])
    assert isinstance(done.exception, UserError)
    assert message in str(done.exception)
    assert str(path) in str(done.exception)
    assert "\n" not in str(done.exception)
    assert not (tmp_path / "out").exists()


def test_the_command_says_what_it_wrote(tmp_path):
    path = tmp_path / "aot.json"
    path.write_text(json.dumps(made.aot()))
    done = CliRunner().invoke(app, ["report", str(path), "--out", str(tmp_path / "deep" / "out")])
    assert done.exit_code == 0, done.output
    assert "report.html: 1 result file(s)" in done.output
    assert (tmp_path / "deep" / "out" / "report.md").is_file()
