"""What the commands draw: fronts, grids of bits, scores, comparisons, reasons; at 80 columns, piped, hostile."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mpsearch.cli.looks import Pen, front_plot, grid_lines, worth_lines
from mpsearch.cli.main import run
from mpsearch.cli.scores import score_lines
from mpsearch.layer import Layers
from mpsearch.testing.views import pretended
from mpsearch.views.difference import difference
from mpsearch.views.points import Points
from mpsearch.views.study_view import StudyView
from mpsearch.views.why import why
from tests.stored_views import store_view

HOSTILE = "\x1b[31m</b>\u202egnp.exe\x07"


@pytest.fixture(scope="module")
def view() -> StudyView:
    return pretended(60, 30, 5)


@pytest.fixture(scope="module")
def storage(view: StudyView, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("stored") / "results.db"
    store_view(replace(view, measured=view.measured[:1]), path, "few", measured=True)
    store_view(view, path, "none", measured=False)
    return store_view(view, path, "made-up")


@pytest.fixture
def shell(storage: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Shell:
    monkeypatch.setenv("MPSEARCH_STORAGE", storage)
    return Shell(capsys)


class Shell:
    """Runs command lines; keeps what the last one printed."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self.capsys = capsys
        self.out = self.err = ""

    def __call__(self, *arguments: str) -> int:
        code = run(arguments)
        self.out, self.err = self.capsys.readouterr()
        return code


def drawn(view: StudyView, pen: Pen) -> list[str]:
    choice = view.points.choice[view.chosen].tolist() if len(view.points) else [0] * len(view.layers)
    lines = [*front_plot(view, pen), *grid_lines(view, choice, pen), *worth_lines(view.worth, pen)]
    return [*lines, *(score_lines(view, pen) if view.scores is not None else [])]


def fits(lines: list[str], width: int) -> None:
    # Lines to copy are never broken.
    assert max(len(line) for line in lines if not line.startswith("         ")) <= width
    assert all(line == line.rstrip() for line in lines)


@pytest.mark.parametrize("layers", [1, 2, 30, 2000])
@pytest.mark.parametrize("unicode", [True, False])
def test_drawings_keep_to_80_columns(layers: int, unicode: bool) -> None:
    lines = drawn(pretended(12, layers, 5), Pen(80, unicode))
    fits(lines, 80)
    assert len(lines) < 200
    if not unicode:
        assert "".join(lines).isascii()


def test_a_grid_folds_rows_that_are_the_same() -> None:
    view = pretended(12, 30, 5)
    same = np.zeros(len(view.layers), dtype=int)
    assert grid_lines(view, same.tolist(), Pen()) == [
        "block  q_proj  k_proj  v_proj  o_proj  gate_proj  up_proj  down_proj",
        "0..3        2       2       2       2          2        2          2",
        "model.embed_tokens 2  lm_head 2",
    ]
    same[8] = 4
    assert grid_lines(view, same.tolist(), Pen())[2] == (
        "1           8       2       2       2          2        2          2"
    )


def test_a_grid_shows_every_layer_of_every_plan(view: StudyView) -> None:
    pen = Pen(0)
    for row in view.points.choice[:20]:
        seen: set[str] = set()
        for line in grid_lines(view, row.tolist(), pen)[1:]:
            seen |= set(re.findall(r"(?<= )\d+", line))
        assert seen >= {str(view.bits[j]) for j in row.tolist()}


def test_a_plot_marks_the_chosen_and_the_uniform_plans(view: StudyView) -> None:
    lines = front_plot(view, Pen())
    body = "\n".join(lines[:-1])
    assert body.count("★") == 1
    assert 1 <= body.count("◆") <= 5
    assert lines[0] == "measured or predicted loss, nats/token (log)"
    assert "MiB" in lines[-2]
    assert "bits)" in lines[-2]


def one_point(view: StudyView, loss: float) -> StudyView:
    points = view.points
    first = {name: getattr(points, name)[:1] for name in ("keys", "plans", "labels", "groups", "spread", "doubt")}
    first |= {"bound": points.bound[:1], "choice": points.choice[:1], "predicted": np.array([loss])}
    cost = {name: values[:1] for name, values in points.cost.items()}
    return replace(view, points=replace(points, **first, loss=np.array([loss]), cost=cost))


@pytest.mark.parametrize("loss", [0.5, 0.0, -1.0, np.nan, np.inf])
def test_a_front_of_one_point_is_drawn_whatever_its_loss(view: StudyView, loss: float) -> None:
    lines = drawn(one_point(view, loss), Pen())
    fits(lines, 80)
    assert (sum("★" in line for line in lines) == 2) == (loss == 0.5)


def test_what_is_not_there_is_not_drawn() -> None:
    empty = StudyView("empty", "running", Layers(()), Points.of([], []))
    assert front_plot(empty, Pen()) == []
    assert grid_lines(empty, [], Pen()) == []
    assert worth_lines(empty.worth, Pen())[-1] == "         mpsearch watch empty"


def test_show_puts_the_verdict_first_and_no_colour_into_a_pipe(shell: Shell, view: StudyView) -> None:
    assert shell("show", "made-up") == 0
    lines = shell.out.splitlines()
    assert lines[0].startswith("made-up: complete; 30 layers in 30 decisions")
    assert lines[2].startswith("Mixing")
    assert "\x1b" not in shell.out
    assert "…" not in shell.out
    for name in view.grid.row_names[-1:]:
        assert name in shell.out
    assert shell("show", "made-up", "--json") == 0
    body = json.loads(shell.out)
    assert body["worth"]["gain"]["value"] == pytest.approx(view.worth.gain.value if view.worth.gain else 0)


def test_show_without_measurements_says_what_to_do(shell: Shell) -> None:
    assert shell("show", "none") == 3
    assert "has no measured plan yet: it is complete" in shell.err
    assert "mpsearch resume none" in shell.err


def test_why_prints_the_numbers_of_the_view(shell: Shell, view: StudyView) -> None:
    name = view.layers[9].name
    found = why(view, view.chosen, name)
    assert shell("why", "made-up", name, "--json") == 0
    (body,) = json.loads(shell.out)["layers"]
    assert body["options"] == found.to_json()["options"]
    assert body["up"] == found.to_json()["up"]
    assert shell("why", "made-up", name) == 0
    assert f"rank {found.up.rank} of {found.up.of}" in shell.out if found.up else "no scored format" in shell.out
    assert f"►  {found.format}" in shell.out


def test_why_of_a_pattern_has_a_line_for_each_decision(shell: Shell) -> None:
    assert shell("why", "made-up", "*.q_proj") == 0
    assert sum("q_proj" in line for line in shell.out.splitlines()) == 4
    assert shell("why", "made-up", "*.q_proj", "--json") == 0
    assert len(json.loads(shell.out)["layers"]) == 4


@pytest.mark.parametrize(
    ("line", "code", "told"),
    [
        (["why", "made-up", "lm_hed"], 3, "did you mean 'lm_head'"),
        (["why", "made-pu", "lm_head"], 3, "did you mean 'made-up'"),
        (["why", "made-up:unifrm int4-g64", "lm_head"], 3, "did you mean 'uniform int4-g64'"),
        (["why", "gone.json", "lm_head"], 3, "gone.json"),
        (["compare", "made-up", "ffffff"], 3, "no plan file, study or key"),
        (["layers", "--study", "made-up", "--scores", "--at", "int4-g65"], 3, "did you mean 'int4-g64'"),
        (["layers", "nowhere", "--scores"], 3, "no study of 'nowhere'"),
        (["layers"], 2, "no model is named"),
    ],
)
def test_mistakes_are_told(shell: Shell, line: list[str], code: int, told: str) -> None:
    assert shell(*line) == code
    assert told in shell.err


def test_plans_are_found_by_file_label_bits_and_key(shell: Shell, view: StudyView, tmp_path: Path) -> None:
    i = view.points.labels.index("uniform int4-g64")
    plan = view.plan(i)
    plan.save(tmp_path / "plan.json")
    wanted = []
    for name in (str(tmp_path / "plan.json"), "made-up:uniform int4-g64", plan.assignment[:12], plan.key[:12]):
        assert shell("compare", "made-up", name, "--json") == 0, shell.err
        wanted.append(json.loads(shell.out)["second"])
    assert wanted[0]["plan"] == plan.assignment
    assert all(one == wanted[0] for one in wanted)
    bits = 8 * view.points.cost["weights"] / view.weights
    mixed = [j for j, label in enumerate(view.points.labels) if label == "mixed"]
    assert shell("compare", "made-up", f"made-up:mixed@{bits[mixed[2]]:.6f}", "--json") == 0
    assert json.loads(shell.out)["second"]["bits"] == pytest.approx(bits[mixed[2]], abs=1e-6)


def test_compare_prints_the_numbers_of_the_view(shell: Shell, view: StudyView) -> None:
    other = view.points.labels.index("uniform int4-g64")
    found = difference(view.plan(view.chosen), view.plan(other), view)
    assert shell("compare", "made-up", "made-up:uniform int4-g64", "--json") == 0
    body = json.loads(shell.out)
    assert body["changes"] == found.to_json()["changes"]
    assert body["waterfall"] == found.to_json()["waterfall"]
    assert shell("compare", "made-up", "made-up:uniform int4-g64") == 0
    assert f"the same in {found.same} of 30 layers" in shell.out
    assert found.changes[0].decision in shell.out
    assert shell("compare", "made-up", "made-up") == 0
    assert "the same in 30 of 30 layers" in shell.out


def test_scores_are_listed_with_their_errors(shell: Shell, view: StudyView) -> None:
    assert view.scores is not None
    assert shell("layers", "--study", "made-up", "--scores", "--at", "int4-g64") == 0
    column = view.scores.formats.index("int4-g64")
    top = int(view.scores.value[:, column].argmax())
    first = next(line for line in shell.out.splitlines() if line.startswith(view.scores.layers[top]))
    assert f"{view.scores.value[top, column]:.4g}  ± {view.scores.spread[top, column]:.2g}" in first
    assert shell("layers", "/models/made-up", "--scores", "--json") == 0
    body = json.loads(shell.out)
    assert len(body["rows"]) == 30
    assert body["rows"][top]["scores"]["int4-g64"]["loss"] == view.scores.value[top, column]


def test_missing_scores_are_said_to_be_missing(view: StudyView) -> None:
    assert view.scores is not None
    value, spread = view.scores.value.copy(), view.scores.spread.copy()
    value[3], spread[3] = np.nan, np.nan
    status = tuple(("not_observed",) * 5 if i == 3 else row for i, row in enumerate(view.scores.status))
    gaps = replace(view, scores=replace(view.scores, value=value, spread=spread, status=status))
    lines = list(score_lines(gaps, Pen()))
    assert lines[-1].split()[:3] == ["…0.v_proj", "not", "observed"] or "not observed" in lines[-1]
    assert lines[-1].endswith("?????")
    assert gaps.worth.bound == view.worth.bound
    found = why(gaps, None, gaps.layers[3].name)
    assert (found.up, found.down) == (None, None)
    assert found.flags == ("not scored in any format", f"not observed: {', '.join(sorted_names(gaps))}")


def sorted_names(view: StudyView) -> list[str]:
    sizes = view.sizes[3].tolist()
    return [name for _, name in sorted(zip(sizes, view.points.formats, strict=True)) if _ == _]


def test_hostile_names_are_text_only(tmp_path: Path, shell: Shell) -> None:
    view = pretended(30, 20, 4, hostile=HOSTILE)
    # A database takes no label that is not printable.
    labels = tuple("".join(c for c in label if c.isprintable()) for label in view.points.labels)
    view = replace(view, points=replace(view.points, labels=labels), measured=())
    url = store_view(view, tmp_path / "hostile.db", "bad")
    name = view.layers[-1].name
    for line in (
        ["show", "bad"],
        ["why", "bad", name],
        ["why", "bad", "*"],
        ["compare", "bad", f"bad:{view.points.labels[4]}"],
        ["layers", "--study", "bad", "--scores"],
        ["why", "bad", HOSTILE],
        ["compare", "bad", HOSTILE],
    ):
        shell(*line, "--storage", url)
        assert shell.out or shell.err
        assert not re.search(
            r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]", shell.out + shell.err
        )


def test_an_output_that_knows_only_ascii_gets_ascii(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Pen, "of_output", classmethod(lambda cls: cls(80, False)))
    for line in (["why", "made-up", "lm_head"], ["compare", "made-up", "made-up:uniform int4-g64"],
                 ["layers", "--study", "made-up", "--scores"]):  # fmt: skip
        assert shell(*line) == 0
        assert shell.out.isascii()
        fits(shell.out.splitlines(), 80)


def test_colour_changes_nothing_but_the_colour(view: StudyView) -> None:
    lines = grid_lines(view, view.points.choice[view.chosen].tolist(), Pen())
    pen = Pen(colour=True)
    painted = [pen.painted(line) for line in lines]
    assert [re.sub(r"\x1b\[[\d;]*m", "", line) for line in painted] == lines
    assert "\x1b[" not in painted[0]
    assert painted[1].count("\x1b[48;5;") == len(view.grid.columns)
