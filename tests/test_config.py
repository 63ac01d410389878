"""Settings: where values come from, what a wrong one says, and the way through a file and back."""

import math
import re
from dataclasses import dataclass, field, replace
from enum import Enum
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashtrain import config
from flashtrain.errors import UserError


class Precision(Enum):
    full = 1
    half = 2


@dataclass(frozen=True, kw_only=True)
class AdamW:
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.95)


@dataclass(frozen=True, kw_only=True)
class Muon:
    lr: float = 0.02
    momentum: float | None = 0.95


@dataclass(frozen=True, kw_only=True)
class Method:
    """A base class that other modules extend."""

    start: int = 0


@dataclass(frozen=True, kw_only=True)
class Growing(Method):
    factor: float = 2.0


@dataclass(frozen=True, kw_only=True)
class Source:
    path: Path
    weight: float | None = None


@dataclass(frozen=True, kw_only=True)
class Train:
    steps: int = 100
    warmup: int = 10
    clip: float | None = 1.0
    compile: bool = False
    name: str | None = None
    mode: Literal["eager", "graph"] = "eager"
    milestones: tuple[int, ...] = (10, 20)
    precision: Precision = Precision.full

    def __post_init__(self) -> None:
        if self.warmup > self.steps:
            raise ValueError(f"warmup {self.warmup} exceeds steps {self.steps}")


@dataclass(frozen=True, kw_only=True)
class Settings:
    seed: int = 0
    out: Path = Path("runs")
    train: Train = field(default_factory=Train)
    optimizer: AdamW | Muon = field(default_factory=AdamW)
    method: Method | None = None
    sources: tuple[Source, ...] = ()
    labels: dict[str, int] = field(default_factory=dict)
    ragged: tuple[int | None, ...] = ()
    half_life: float = field(init=False, default=0.5)


FULL = Settings(
    seed=3,
    out=Path("a b"),
    train=Train(clip=None, name="x, y", milestones=(), precision=Precision.half, mode="graph", compile=True),
    optimizer=Muon(momentum=None),
    method=Growing(factor=math.inf),
    sources=(Source(path=Path("a")), Source(path=Path("b"), weight=2.0)),
    labels={"one": 1},
    ragged=(None, 4, None, None),
)


def overridden(*words: str, base: Settings | None = None) -> Settings:
    return config.resolve(base or Settings(), overrides=words)


def written(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "run.toml"
    file.write_text(text)
    return file


def test_later_sources_win(tmp_path: Path) -> None:
    file = written(tmp_path, "seed = 1\n[train]\nsteps = 50\nwarmup = 5\n")
    result = config.resolve(Settings(), file, ["--train.steps", "60"])
    assert result == Settings(seed=1, train=Train(steps=60, warmup=5))
    assert overridden("--seed", "1", "--seed=2").seed == 2


@pytest.mark.parametrize(
    ("words", "value"),
    [
        (["--seed", "-4"], Settings(seed=-4)),
        (["--seed=7"], Settings(seed=7)),
        (["--out", "/data/x y"], Settings(out=Path("/data/x y"))),
        (["--train.clip", "-1e-3"], Settings(train=Train(clip=-1e-3))),
        (["--train.clip", "None"], Settings(train=Train(clip=None))),
        (["--train.compile", "True"], Settings(train=Train(compile=True))),
        (["--train.compile=true"], Settings(train=Train(compile=True))),
        (["--train.name", "a,b"], Settings(train=Train(name="a,b"))),
        (["--train.name=--x"], Settings(train=Train(name="--x"))),
        (["--train.name=a=b"], Settings(train=Train(name="a=b"))),
        (["--train.name="], Settings(train=Train(name=""))),
        (["--train.mode", "graph"], Settings(train=Train(mode="graph"))),
        (["--train.precision", "half"], Settings(train=Train(precision=Precision.half))),
        (["--train.milestones", "1", "2", "3"], Settings(train=Train(milestones=(1, 2, 3)))),
        (["--train.milestones=1,2"], Settings(train=Train(milestones=(1, 2)))),
        (["--train.milestones", "7"], Settings(train=Train(milestones=(7,)))),
        (["--train.milestones="], Settings(train=Train(milestones=()))),
        (["--optimizer.betas", "0.5", "0.6"], Settings(optimizer=AdamW(betas=(0.5, 0.6)))),
        (["--optimizer.class", "Muon", "--optimizer.lr", "1"], Settings(optimizer=Muon(lr=1.0))),
        (["--method.class", "Growing", "--method.factor=3"], Settings(method=Growing(factor=3.0))),
        (["--method.class", "Method"], Settings(method=Method())),
        (["--ragged", "1", "None"], Settings(ragged=(1, None))),
        (["--train.steps", "5", "--train.warmup", "5"], Settings(train=Train(steps=5, warmup=5))),
    ],
)
def test_overrides_take_the_type_of_their_field(words: list[str], value: Settings) -> None:
    result = overridden(*words)
    assert result == value
    assert repr(result) == repr(value)  # 1 == 1.0 == True would pass for each other


def test_a_section_can_be_switched_off() -> None:
    assert overridden("--method", "None", base=Settings(method=Growing())) == Settings()


def test_choosing_the_class_that_is_there_keeps_its_values() -> None:
    base = Settings(optimizer=AdamW(lr=5.0))
    assert overridden("--optimizer.class", "AdamW", base=base) == base


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--train.stpes", "5"], "unknown key --train.stpes; the nearest is --train.steps"),
        (["--steps", "5"], "unknown key --steps; the nearest is --train.steps"),
        (["--train.steps.x", "5"], "unknown key --train.steps.x; the nearest is --train.steps"),
        (["--optimizer.momentum", "5"], "unknown key --optimizer.momentum; the nearest is --optimizer."),
        (["--train.class", "Train"], "unknown key --train.class; the nearest is --optimizer.class"),
        (["--class", "Train"], "unknown key --class; the nearest is --method.class"),
        (["--half_life", "5"], "unknown key --half_life; the nearest is "),
        (["--train.steps", "abc"], "--train.steps abc: expected int"),
        (["--train.steps", "1.5"], "--train.steps 1.5: expected int"),
        (["--train.steps", "1", "2"], "--train.steps 1 2: expected int"),
        (["--train.steps="], "--train.steps : expected int"),
        (["--train.clip", "x"], "--train.clip x: expected float or None"),
        (["--train.compile", "1"], "--train.compile 1: expected true or false"),
        (["--train.mode", "fast"], "--train.mode fast: expected one of eager, graph"),
        (["--train.precision", "x"], "--train.precision x: expected one of full, half"),
        (["--train.milestones", "1", "b"], "--train.milestones 1 b: expected a list of int"),
        (["--optimizer.betas", "1"], r"--optimizer.betas 1: expected 2 values \(float, float\)"),
        (["--optimizer.class", "Adam"], "--optimizer.class: unknown class Adam; the nearest is AdamW"),
        (["--optimizer.class"], "--optimizer.class needs a value: AdamW or Muon"),
        (["--sources", "a"], "--sources a: expected a list of Source"),
        (["--train.steps"], "--train.steps needs a value: int"),
        (["--train.steps", "--seed", "1"], "--train.steps needs a value: int"),
        (["--train", "3"], "--train is a section: set one of its keys, such as --train.steps"),
        (["--train"], "--train is a section"),
        (["--optimizer", "None"], "--optimizer is a section"),
        (["--method", "3"], "--method is a section: set one of its keys, such as --method.class"),
        (["train.steps", "3"], "unexpected argument train.steps: settings are written --dotted.key VALUE"),
        (["--"], "unexpected argument --"),
        (["--train.steps", "5"], "train: warmup 10 exceeds steps 5"),
    ],
)
def test_a_wrong_override_is_one_line(
    words: list[str], message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match=f"^{message}") as caught:
        overridden(*words)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sede = 1", "unknown key sede; the nearest is seed"),
        ("[trian]\nsteps = 1", "unknown key trian; the nearest is "),
        ("[train]\nstpes = 1", "unknown key train.stpes; the nearest is train.steps"),
        ("[train]\nsteps = 1.0", "train.steps = 1.0: expected int"),
        ("[train]\nsteps = true", "train.steps = True: expected int"),
        ("[train]\nclip = 'x'", "train.clip = 'x': expected float or None"),
        ("[train]\ncompile = 1", "train.compile = 1: expected true or false"),
        ("[train]\nmode = 'fast'", "train.mode = 'fast': expected one of eager, graph"),
        ("[train]\nmilestones = 3", "train.milestones = 3: expected a list of int"),
        ("[optimizer]\nbetas = [0.5]", r"optimizer.betas = \[0.5\]: expected 2 values \(float, float\)"),
        ("train = 3", "train = 3: expected Train"),
        ("seed = {a = 1}", "seed = {'a': 1}: expected int"),
        ("None = ['seed']", "seed = None: expected int"),
        ("None = ['sede']", "unknown key sede; the nearest is seed"),
        ("None = 3", "None = 3: expected a list of keys"),
        ("seed = 1\nNone = ['seed.x']", "None = .*: expected a list of keys"),
        ("[optimizer]\nclass = 'SGD'", "optimizer: unknown class SGD; the nearest is "),
        ("[method]\nfactor = 3", "unknown key method.factor; the nearest is method.class"),
        (
            "[[sources]]\npath = 'a'\nwieght = 1",
            "unknown key sources.0.wieght; the nearest is sources.0.weight",
        ),
        ("[[sources]]\nweight = 1", "sources.0: Source needs a value for path"),
        ("[train]\nsteps = 1", "train: warmup 10 exceeds steps 1"),
        ("seed = ", "not valid TOML: Invalid value"),
    ],
)
def test_a_wrong_file_is_one_line(tmp_path: Path, text: str, message: str) -> None:
    file = written(tmp_path, text)
    where = "" if message.startswith("train: ") else f"{re.escape(str(file))}: "
    with pytest.raises(UserError, match=f"^{where}{message}") as caught:
        config.resolve(Settings(), file)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none.toml: cannot be read: No such file"):
        config.resolve(Settings(), tmp_path / "none.toml")


def test_a_file_that_is_no_text_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match=r"run.toml: not valid TOML"):
        config.resolve(Settings(), tmp_path / "run.toml")


@pytest.mark.parametrize("base", [Settings(), FULL], ids=["defaults", "full"])
@pytest.mark.parametrize(
    "saved",
    [
        Settings(),
        FULL,
        replace(FULL, method=Method(start=4), optimizer=AdamW()),
        Settings(train=Train(name="None")),
        Settings(sources=(Source(path=Path("a")),), ragged=(None,)),
        Settings(labels={"with space": 1, "": 2}),
    ],
    ids=["defaults", "full", "base class", "text None", "nested None", "odd labels"],
)
def test_a_saved_file_gives_back_an_equal_object(tmp_path: Path, base: Settings, saved: Settings) -> None:
    config.save(saved, tmp_path / "run.toml")
    again = config.resolve(base, tmp_path / "run.toml")
    assert again == saved
    assert repr(again) == repr(saved)
    assert config.from_dict(Settings, config.to_dict(saved)) == saved


text = st.text(st.characters(codec="utf-8"), max_size=8)
floats = st.floats(allow_nan=False)


@settings(max_examples=60, deadline=None)
@given(
    st.builds(
        Settings,
        seed=st.integers(-(2**63), 2**63 - 1),
        train=st.builds(
            Train, steps=st.just(10), clip=st.none() | floats, name=st.none() | text, compile=st.booleans()
        ),
        optimizer=st.builds(AdamW, lr=floats) | st.builds(Muon, momentum=st.none() | floats),
        method=st.none() | st.builds(Method) | st.builds(Growing, factor=floats),
        labels=st.dictionaries(text, st.integers(0, 9), max_size=3),
        ragged=st.lists(st.none() | st.integers(0, 9), max_size=4).map(tuple),
    )
)
def test_any_settings_survive_the_file(tmp_path_factory: pytest.TempPathFactory, saved: Settings) -> None:
    file = tmp_path_factory.mktemp("config") / "run.toml"
    config.save(saved, file)
    assert repr(config.resolve(FULL, file)) == repr(saved)
    assert repr(config.resolve(Settings(), file)) == repr(saved)


def test_nan_survives_the_file(tmp_path: Path) -> None:
    config.save(Settings(optimizer=AdamW(lr=math.nan)), tmp_path / "run.toml")
    assert math.isnan(config.resolve(Settings(), tmp_path / "run.toml").optimizer.lr)


def test_of_several_types_the_exact_one_is_kept(tmp_path: Path) -> None:
    @dataclass(frozen=True, kw_only=True)
    class Loose:
        number: float | int = 0.5
        where: Path | str = ""

    config.save(Loose(number=1, where="x"), tmp_path / "run.toml")
    assert repr(config.resolve(Loose(), tmp_path / "run.toml")) == repr(Loose(number=1, where="x"))


def test_settings_that_a_file_cannot_hold_are_not_written(tmp_path: Path) -> None:
    @dataclass(frozen=True, kw_only=True)
    class Ambiguous:
        where: str | Path = "x"

    with pytest.raises(TypeError, match="do not survive TOML"):
        config.save(Ambiguous(where=Path("x")), tmp_path / "run.toml")
    assert not (tmp_path / "run.toml").exists()


def test_a_class_that_the_field_does_not_declare_is_refused() -> None:
    with pytest.raises(TypeError, match="Source is none of the classes that its field declares"):
        config.to_dict(Settings(optimizer=Source(path=Path("x"))))  # type: ignore[arg-type]


def test_a_base_without_defaults_can_be_overridden() -> None:
    assert config.resolve(Source(path=Path("a")), overrides=["--weight", "2"]).weight == 2.0
    with pytest.raises(UserError, match="Source needs a value for path"):
        config.from_dict(Source, {"weight": 1})


def test_to_dict_is_plain() -> None:
    data = config.to_dict(FULL)
    assert data["out"] == "a b"
    assert data["train"]["precision"] == "half"
    assert data["train"]["clip"] is None
    assert data["optimizer"] == {"class": "Muon", "lr": 0.02, "momentum": None}
    assert data["sources"][1] == {"path": "b", "weight": 2.0}
    assert "half_life" not in data


def test_keys_are_those_that_can_be_set() -> None:
    keys = config.keys(Settings(method=Method()))
    assert keys[:3] == ["seed", "out", "train.steps"]
    assert {"optimizer.class", "optimizer.betas", "method.class", "method.start", "sources"} <= set(keys)
    assert not {"train", "train.class", "half_life", "optimizer.momentum"} & set(keys)
    assert config.keys(Settings())[-4:] == ["method", "sources", "labels", "ragged"]


def test_the_base_is_left_as_it_was() -> None:
    base = Settings(labels={"a": 1})
    before: Any = repr(base)
    overridden("--seed", "4", "--labels", "b", "2", base=base)
    assert repr(base) == before
