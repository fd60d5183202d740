"""Figures in documents are those of the result files, and a document that says otherwise is found."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import bench_results as made
import pytest

from fusebert.bench.report.figures import END, VIEWS, documents, newest, rewrite, update
from fusebert.train.errors import UserError

ROOT = Path(__file__).parents[3]


def step_of(ratio, **settings):
    contestants = [
        made.contestant("fusebert", "ours", [1.0] * 5),
        made.contestant("transformers", "peer", [ratio] * 5),
    ]
    return made.step(contestants, **settings)


@pytest.fixture
def project(tmp_path):
    """A project with results and two documents."""
    for name, result in {
        "2026-01-01-cpu-step-mini-equal": step_of(2.5),
        "2026-01-01-cpu-step-mini-ragged": step_of(7.0, ragged=True),
        "2026-01-01-cpu-pretrain": made.pretrain(),
        "2026-01-01-cpu-parity": made.parity(),
        "2026-01-01-aot-sm_90": made.aot(),
        "2026-01-01-predict-h100": made.predict(),
        "2026-01-01-gpu-calibrate": made.calibrate(),
        "2026-01-01-gpu-race": made.race(),
        "2026-01-01-cpu-kernels": made.kernels([made.attention(64, step_of(1.6)["contestants"])], "cpu"),
    }.items():
        put(tmp_path, name, result)
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text(f"# Title\n\n{marker('step', 'cpu-step-*')}\nold\n{END}\n\nafter\n")
    (tmp_path / "docs" / "a.md").write_text("".join(f"{marker(v, f'*{v}*')}\n{END}\n" for v in VIEWS))
    return tmp_path


def put(root, name, result):
    path = root / "bench" / "results" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result))


def marker(view, name):
    return f"<!-- figures {view} bench/results/*-{name}.json -->"


def refresh(root, *, check=False):
    said = []
    changed = update(documents(root), root, check=check, say=said.append)
    return [path.relative_to(root).as_posix() for path in changed], said


def test_the_committed_documents_say_what_their_result_files_say():
    said = []
    assert update(documents(ROOT), ROOT, check=True, say=said.append) == [], said


def test_predicted_steps(project):
    (project / "README.md").write_text(f"{marker('predict', 'predict-*')}\n{END}\n")
    refresh(project)
    row = "| base | equal, 128 | H100 | 10 | 2 | 3 | 6 | 10 | 71,428,571 | 35,714,286 to 40,000,000 |"
    assert row in (project / "README.md").read_text().splitlines()


def test_figures_are_written_between_the_markers_and_nothing_else_is_touched(project):
    assert refresh(project)[0] == ["README.md", "docs/a.md"]
    lines = (project / "README.md").read_text().splitlines()
    assert lines[:3] == ["# Title", "", marker("step", "cpu-step-*")]
    assert lines[-3:] == [END, "", "after"]
    assert "old" not in lines
    assert "| mini | all 128 | 2.50 [2.38, 2.62] | 1,000,000 |" in lines
    assert "| mini | ragged up to 128 | 7.00 [6.65, 7.35] | 1,000,000 |" in lines


def test_writing_again_changes_nothing(project):
    refresh(project)
    assert refresh(project) == ([], [])
    assert refresh(project, check=True) == ([], [])


def test_a_reader_sees_which_file_a_figure_is_from(project):
    refresh(project)
    text = (project / "README.md").read_text()
    for name in ("2026-01-01-cpu-step-mini-equal.json", "2026-01-01-cpu-step-mini-ragged.json"):
        assert f"[{name}](bench/results/{name})" in text
    words = " ".join(text.split())
    for about in ("Made-up CPU", "2 thread(s)", "torch 9.9.9", "commit abcdef123456", "CPU path", "dropout 0.1"):
        assert about in words
    # From docs/ the way leads up.
    links = (project / "docs" / "a.md").read_text()
    for target in [part.partition(")")[0] for part in links.split("](")[1:]]:
        assert (project / "docs" / target).resolve().is_file()


def test_every_view_writes_its_figures(project):
    refresh(project)
    text = " ".join((project / "docs" / "a.md").read_text().split())
    for figure in (
        "| attention N=64, forward+backward | 1.60 [1.52, 1.68] | transformers | 1.000 ms | 1 % |",
        "| masked-LM accuracy | 0.1 % | 27.3 % |",
        "2,743 steps, 5.6 M tokens seen, 19,695 real tokens/s",
        "| 4 steps, 2 layers of 128 | float32 | largest 2.00e-08, allowed 1.00e-03 | the same run |",
        "| sm_90 | 2 | 1 | HGMMA |",
    ):
        assert figure in text


def test_a_document_that_disagrees_is_found_and_left_alone(project):
    refresh(project)
    path = project / "README.md"
    path.write_text(path.read_text().replace("2.50", "2.60"))
    kept = path.read_text()
    changed, said = refresh(project, check=True)
    assert changed == ["README.md"]
    assert "python -m fusebert.bench.readme" in said[0]
    assert path.read_text() == kept


def test_a_result_that_changes_is_found(project):
    refresh(project)
    put(project, "2026-01-01-cpu-step-mini-equal", step_of(3.0))
    assert refresh(project, check=True)[0] == ["README.md", "docs/a.md"]


def test_of_one_name_the_newest_date_counts(project):
    put(project, "2026-02-01-cpu-step-mini-equal", step_of(4.0))
    put(project, "2025-12-31-cpu-step-mini-equal", step_of(9.0))
    found = [path.name for path in newest(project, "bench/results/*-cpu-step-*.json")]
    assert found == ["2026-02-01-cpu-step-mini-equal.json", "2026-01-01-cpu-step-mini-ragged.json"]
    refresh(project)
    text = (project / "README.md").read_text()
    assert "4.00 [" in text
    assert "9.00 [" not in text
    assert "2.50 [" not in text


def test_no_file_is_said(project):
    shutil.rmtree(project / "bench")
    refresh(project)
    assert "No figures yet: no file matches `bench/results/*-cpu-step-*.json`" in (project / "README.md").read_text()


def test_what_is_wrong_stands_there_as_wrong(project):
    result = step_of(2.5)
    result["contestants"][1] = made.contestant("transformers", "peer", None)
    put(project, "2026-01-01-cpu-step-mini-equal", result)
    result = step_of(7.0, ragged=True)
    result["contestants"][0] = made.contestant("fusebert", "ours", None)
    result["contestants"][1]["ratio_to_ours"] = None
    put(project, "2026-01-01-cpu-step-mini-ragged", result)
    refresh(project)
    text = (project / "README.md").read_text()
    assert "| mini | all 128 | WRONG | 1,000,000 |" in text
    assert "| mini | ragged up to 128 |  | WRONG |" in text


def test_an_indented_marker_is_an_example(project):
    text = f"    {marker('nonsense', 'x')}\n    kept\n    {END}\n"
    assert rewrite(text, project / "README.md", project) == text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"{marker('step', 'cpu-step-*')}\n", "has no <!-- end of figures -->"),
        (f"{marker('step', 'cpu-step-*')}\n{marker('aot', 'aot-*')}\n{END}\n", "before the next"),
        (f"{END}\n", "without a beginning"),
        (
            f"{marker('poem', 'cpu-step-*')}\n{END}\n",
            "choose one of step, fuse, quality, embed",
        ),
        (f"{marker('step', 'cpu-parity')}\n{END}\n", "of kind 'train_parity'"),
        (f"<!-- figures step bench/results/undated.json -->\n{END}\n", "call it DATE-NAME.json"),
        (f"{marker('step', 'torn')}\n{END}\n", "not a whole step result"),
        (f"{marker('step', '*-step-mini-*')}\n{END}\n", "vocab_size is 30522"),
    ],
)
def test_mistakes_are_one_clear_error(project, text, message):
    put(project, "undated", step_of(1.0))
    put(project, "2026-01-01-torn", {"kind": "step", "schema": 1})
    put(project, "2026-01-01-another-step-mini-equal", step_of(1.0, vocab_size=100))
    with pytest.raises(UserError) as caught:
        rewrite(text, project / "README.md", project)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_command(project):
    command = [sys.executable, "-m", "fusebert.bench.readme", "--check"]
    environment = os.environ | {"PYTHONSAFEPATH": "1"}
    done = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert done.stdout.splitlines() == [
        f"{name}: differs from its result files; run python -m fusebert.bench.readme"
        for name in ("README.md", "docs/a.md")
    ]
