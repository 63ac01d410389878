"""``flashtrain schedule``: the table, the summary, the picture."""

from pathlib import Path

import pytest
from matplotlib import image

from flashtrain.launch import main


def show(capsys: pytest.CaptureFixture[str], *words: str) -> list[str]:
    assert main.main(["schedule", *words]) == 0
    return capsys.readouterr().out.splitlines()


def cells(lines: list[str]) -> list[list[str]]:
    """The body of the table: for each step the words of each rank's cell."""
    body = [line.strip("│").split("│") for line in lines if line.startswith("│")]
    return [[cell.strip() for cell in row] for row in body]


def test_the_table_has_a_row_for_each_step_and_a_column_for_each_rank(
    capsys: pytest.CaptureFixture[str],
) -> None:
    lines = show(capsys, "--op", "reduce_scatter", "--world", "3")
    assert cells(lines) == [
        ["0", "1  1→1 0←2", "2  2→2 1←0", "0  0→0 2←1"],
        ["1", "2  2→2 0←1", "0  0→0 1←2", "1  1→1 2←0"],
        ["2", "0*", "1*", "2*"],
    ]
    assert lines[-1] == "t_m/t_c 0.5 · makespan 3 t_c · bound 3 t_c · 100.0% of the transfers hidden"


def test_pieces_of_chunks_have_names(capsys: pytest.CaptureFixture[str]) -> None:
    lines = show(capsys, "--op", "all_gather", "--kind", "ring", "--world", "2", "--subchunks", "2")
    assert [row[1] for row in cells(lines)] == ["0.0* 0.0→1 1.0←1", "0.1* 0.1→1 1.1←1", "1.0", "1.1"]


@pytest.mark.parametrize(
    ("words", "summary"),
    [
        (["--ratio", "2"], "t_m/t_c 2 · makespan 7 t_c · bound 7 t_c · 50.0% of the transfers hidden"),
        (["--ratio", "4/2", "--subchunks", "2"], "makespan 6.5 t_c · bound 6.5 t_c"),
        (["--rows", "5", "0", "3", "4"], "bound not defined for ragged chunks"),
        (["--rows", "8"], "makespan 4 t_c · bound 4 t_c"),
        (["--rows", "10"], "bound not defined for ragged chunks"),
        (["--rows", "0"], "makespan 0 t_c · bound not defined for ragged chunks · nothing to transfer"),
        (["--world", "1"], "makespan 1 t_c · bound 1 t_c · nothing to transfer"),
        (["--ratio", "0"], "bound 4 t_c · nothing to transfer"),
    ],
)
def test_the_summary(capsys: pytest.CaptureFixture[str], words: list[str], summary: str) -> None:
    assert summary in show(capsys, "--op", "all_gather", *words)[-1]


@pytest.mark.parametrize(
    "words",
    [
        ["--op", "reduce_scatter", "--kind", "ring", "--ratio", "3"],
        ["--op", "all_gather", "--world", "12", "--subchunks", "2"],
        ["--op", "all_to_all", "--rows", "5", "0", "9"],
        ["--op", "all_gather", "--rows", "0"],
    ],
)
def test_the_picture(capsys: pytest.CaptureFixture[str], tmp_path: Path, words: list[str]) -> None:
    file = tmp_path / "schedule.png"
    lines = show(capsys, *words, "--out", str(file))
    assert lines[-1] == f"timeline drawn to {file}"
    drawn = image.imread(file)
    assert drawn.shape[1] == 1650
    assert len({tuple(pixel) for pixel in drawn[::7, ::7, :3].reshape(-1, 3)}) > 3


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--world", "0"], "--world 0: there must be at least one rank"),
        (["--subchunks", "0"], "--subchunks 0: a chunk has at least one piece"),
        (["--rows", "-1", "2"], "--rows -1: must not be negative"),
        (
            ["--rows", "1", "2", "--world", "3"],
            "--rows gives 2 row counts for --world 3: give one for each rank",
        ),
        (["--ratio", "x"], "--ratio x: expected a number or a fraction such as 0.5 or 2/3"),
        (["--ratio", "1/0"], "--ratio 1/0: expected a number"),
        (["--ratio=-1"], "--ratio -1: must not be negative"),
        (["--ratio", "1e400"], "--ratio 1e400: must not be negative, nor above 10**9"),
        (
            ["--out", "/no/such/folder/x.png"],
            "--out /no/such/folder/x.png: there is no folder /no/such/folder",
        ),
    ],
)
def test_wrong_arguments_are_one_line(
    capsys: pytest.CaptureFixture[str], words: list[str], line: str
) -> None:
    assert main.main(["schedule", "--op", "all_gather", *words]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert line in err


def test_a_family_that_does_not_exist_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["schedule", "--op", "all_to_all", "--kind", "ring"]) == 2
    assert "there is no ring schedule for all_to_all" in capsys.readouterr().err


def test_an_unknown_image_format_is_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main.main(["schedule", "--op", "all_gather", "--out", str(tmp_path / "a.docx")]) == 2
    assert "Format 'docx' is not supported" in capsys.readouterr().err
