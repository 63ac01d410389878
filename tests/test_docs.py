"""The guides of docs/ are followed, their links lead somewhere, and a made-up option is found."""

import ast
import json
import re
import shutil
from pathlib import Path

import pytest

from flashtrain import config
from flashtrain.launch.main import COMMANDS
from flashtrain.recipes import demo
from tests import guides
from tests.guides import DOCS, ROOT, Block
from tests.train import runs

README = ROOT / "README.md"
# The guides' runs are as small as their settings allow: steps, not lessons, are what is tested.
SMALLER = ["--train.steps=12", "--train.batch=4", "--train.sequence=64", "--train.evaluation_windows=8"]
SMALLER_MODEL = ["--model.layers=2", "--model.hidden=96", "--model.mlp_width=128"]
# What else a guide must have shown, beside commands that end well. story.md has a test file of its own.
SHOWN = {
    "bench.md": ["wrote runs/bench/mfu.json", "norms and pointwise"],
    "embedding-one-op.md": ["rank 0: as in one process", "rank 1: as in one process"],
    "faults.md": ["ended with exit code 2", "No space left on device", '"step": 3'],
    "many-nodes.md": ["--nnodes 2", "these ranks fit together"],
    "own-data.md": ["tokenizer.json: 512 tokens", "70.0% of the samples", "sets/more/tokens: "],
    "own-model.md": ["step 5: 1 of 1 layers share", "starting with the weights of runs/base", "came along"],
    "reading-the-overlap-report.md": ["embedding: a look-up", "100.0% of the transfers hidden"],
    "troubleshooting-hangs.md": ["CPU ranks of one machine"],
    "watching.md": ["steps-11-12.rank0.json.gz", "wrote both.html"],
}
# Where lines come from that runs end with.
SOURCES = [("flashtrain", "py"), ("launch", "py"), ("csrc", "cpp")]


def reader(folder: Path, text: Path) -> guides.Reader:
    smaller = [*SMALLER, f"--data.source={text}"]
    small = [*smaller, *SMALLER_MODEL]
    return guides.Reader(folder, {"demo": small, "epas": small, "continue-pretraining": smaller})


@pytest.fixture(scope="module")
def first_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which first-run.md was followed."""
    folder = tmp_path_factory.mktemp("first")
    text = runs.write_text(folder / "text.txt")
    (folder / "printed").write_text(reader(folder, text).follow(DOCS / "first-run.md"))
    return folder


def test_the_first_run_leaves_what_its_guide_says(first_run: Path) -> None:
    out = first_run / "runs/first"
    rows = re.findall(r"^\| (`.*?) \|", (DOCS / "first-run.md").read_text(), re.MULTILINE)
    files = re.findall(r"`([^`]+)`", " ".join(rows))
    assert len(files) >= 9
    for name in files:
        assert (out / name).exists(), name
    assert len(runs.metrics(out)) == 12
    assert json.loads((first_run / "runs/short/sites.json").read_text()) == []
    printed = (first_run / "printed").read_text()
    assert f"wrote {out.relative_to(first_run)}/report.html" in printed


@pytest.mark.parametrize("name", SHOWN)
def test_a_guide_can_be_followed(name: str, first_run: Path, tmp_path: Path) -> None:
    shutil.copytree(first_run / "runs/first", tmp_path / "runs/first")
    printed = reader(tmp_path, first_run / "text.txt").follow(DOCS / name)
    for words in SHOWN[name]:
        assert words in printed, f"{name}: {words!r} is not in\n{printed}"


def test_no_guide_is_left_out() -> None:
    assert {file.name for file in DOCS.glob("*.md")} == {"story.md", "first-run.md", *SHOWN}
    for file in DOCS.glob("*.md"):
        assert f"docs/{file.name}" in README.read_text(), f"README.md has no link to {file.name}"


@pytest.mark.parametrize("file", [README, *sorted(DOCS.glob("*.md"))], ids=lambda file: file.name)
def test_links_lead_somewhere_and_commands_stand_in_fences(file: Path) -> None:
    text = file.read_text()
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
        assert target.startswith("https://") or (file.parent / target).exists(), target
    outside = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    assert not re.findall(r"^    \S.*$", outside, re.MULTILINE), "a block without a fence is not tested"


def test_commands_of_the_readme_are_known() -> None:
    found = [block for block in guides.blocks(README) if block.language == "sh"]
    assert found
    for block in found:
        guides.check(block)


def test_guides_can_be_followed_one_after_the_other_in_one_folder() -> None:
    """What refuses a folder that is there makes one that no other guide makes."""
    made: dict[str, str] = {}
    for file in sorted(DOCS.glob("*.md")):
        text = "".join(block.text for block in guides.blocks(file) if block.language == "sh")
        text = text.replace("\\\n", " ")
        for folder in re.findall(r"data (?:tokenizer|prepare) .*--out (\S+)|convert \S+ \S+ (\S+)", text):
            name = "".join(folder)
            assert name not in made, f"{file.name} and {made[name]} make {name}"
            made[name] = file.name
    assert len(made) >= 8


def test_every_promise_names_tests_that_exist() -> None:
    promises = README.read_text().partition("## What is promised")[2].partition("\n## ")[0]
    rows = [line.split("|")[1:3] for line in promises.splitlines() if line.startswith("| ")][1:]
    assert len(rows) >= 25
    for promise, held_by in rows:
        named = re.findall(r"`(\S+?)::(\w+)`", held_by)
        assert named, f"{promise}: no test is named"
        for file, name in named:
            tree = ast.parse((ROOT / "tests" / file).read_text())
            tests = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
            assert f"test_{name}" in tests, f"{promise}: {file} has no test_{name}"


def test_commands_in_passing_are_known() -> None:
    """Those in the running text: `flashtrain NAME ...`."""
    for file in (README, *DOCS.glob("*.md")):
        for name in re.findall(r"`flashtrain (\w+)", file.read_text()):
            assert name in COMMANDS, f"{file.name}: flashtrain {name}"


def test_settings_in_passing_exist() -> None:
    """Those in the running text: `section.key`, with dashes or without, with a value or without."""
    prepared = ["--data.class=PreparedData.Config", "--data.sets=set"]
    sharing = ["--model.sharing.class=Sharing", "--sharing.class=ProgressiveSharing.Config"]
    known = {
        key for words in ([], prepared, sharing) for key in config.keys(config.resolve(demo(), None, words))
    }
    sections = "|".join(sorted({key.partition(".")[0] for key in known if "." in key}))
    found = 0
    for file in (README, *DOCS.glob("*.md")):
        prose = re.sub(r"^```.*?^```$", "", file.read_text(), flags=re.MULTILINE | re.DOTALL)
        for key in re.findall(rf"`(?:--)?((?:{sections})\.\w+)(?: [^`]*)?`", prose):
            assert key in known, f"{file.name}: there is no setting {key}"
            found += 1
    assert found > 20


def test_error_lines_that_the_guide_explains_are_printed_somewhere() -> None:
    sources = [path for folder, ending in SOURCES for path in (ROOT / folder).rglob(f"*.{ending}")]
    printed = "\n".join(path.read_text() for path in sources)
    table = (DOCS / "troubleshooting-hangs.md").read_text().partition("| the end of the line")[2]
    rows = re.findall(r"^\| (`.*)", table.partition("\n\n")[0], re.MULTILINE)
    assert len(rows) >= 10
    for row in rows:
        for line in re.findall(r"`([^`]+)`", row.split("|")[0]):
            # Words in capitals stand for names and numbers.
            for part in re.split(r"\b[A-Z]+\b|\.\.\.", line):
                assert "in gloo's words" in row or part.strip(" )") in printed, f"nothing says {part!r}"


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("flashtrain train demo --train.stepps 3", "unknown key --train.stepps"),
        ("flashtrain train demo --train.steps many", "expected int"),
        ("flashtrain train demo \\\n    --parallel.tensor 3", "parallel.tensor 3 must divide it"),
        ("flashtrain trian demo", "unknown command trian"),
        ("flashtrain train dmeo", "no recipe dmeo"),
        ("flashtrain report runs/first --otu page.html", "unknown option --otu"),
        ("A=1 flashtrain data prepare x --tokenizer t --out d --wrokers 2 > log", "unknown option --wrokers"),
        ("flashtrain nodes slurm --nodes 2 --processes 8 -- train demo --model.layer 2", "unknown key"),
        ("torchrun --nproc-per-nodee 2 -m flashtrain.launch.main train demo", "2"),
        (
            "torchrun --nproc-per-node 2 -m flashtrain.launch.main train demo --comm.tranport host",
            "unknown key",
        ),
        ("python benchmarks/overlap.py --device cpu --wrold 2", "--wrold"),
        ("python benchmarks/overlaps.py", "no benchmarks/overlaps.py"),
        ("make demos", "no make demos"),
        ("echo a | flashtrian doctor", "echo is unknown"),
    ],
)
def test_a_made_up_option_is_found(line: str, says: str) -> None:
    with pytest.raises(AssertionError, match=re.escape(says)):
        guides.check(Block(README, 1, "sh", "gpu", f"# why\n{line}\n"))


def test_a_fence_that_no_test_knows_is_refused(tmp_path: Path) -> None:
    for fence in ("sh gqu", "bash", "", "toml"):
        (tmp_path / "guide.md").write_text(f"# Guide\n\n```{fence}\nls\n```\n")
        with pytest.raises(AssertionError, match=r"guide.md:3: a fence must not say"):
            guides.blocks(tmp_path / "guide.md")
    for text in ("```sh\nls\n", "- so:\n  ```sh\n  ls\n  ```\n"):
        (tmp_path / "guide.md").write_text(text)
        with pytest.raises(AssertionError, match="indented or not closed"):
            guides.blocks(tmp_path / "guide.md")


def test_a_command_that_fails_is_named_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "guide.md").write_text("# Guide\n\n```sh\nflashtrain report nowhere | cat\n```\n")
    with pytest.raises(AssertionError, match=r"(?s)guide.md:3 ended with 2.*there is no run in nowhere"):
        guides.Reader(tmp_path).follow(tmp_path / "guide.md")
