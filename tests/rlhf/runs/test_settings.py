"""Tests settings: which of several values wins, and the messages about wrong ones."""

import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml

from rlhf.generation.settings import GenerationSettings
from rlhf.models.settings import ModelSettings
from rlhf.runs.settings import (
    ConfigError,
    FolderSettings,
    StageSettings,
    default_settings,
    keys_of,
    load_config,
    settings_in_use,
)
from rlhf.training.settings import OptimSettings


@dataclass(frozen=True, kw_only=True)
class Part:
    """One of several things that a user names."""

    weight: float = 1.0
    """Weight of the part."""

    def __post_init__(self) -> None:
        if self.weight == 0:
            raise ValueError(f"weight is {self.weight}; give another")


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A stage for these tests."""

    output_dir: str
    """Folder to write."""
    model: ModelSettings
    """Model to train."""
    num_epochs: int = 1
    """Passes over the data."""
    text: str | None = None
    """Text records. None means no text."""
    optim: OptimSettings = field(default_factory=OptimSettings)
    """Optimizer."""
    generation: GenerationSettings = field(default_factory=GenerationSettings)
    """How responses are sampled."""
    parts: dict[str, Part] = field(default_factory=dict)
    """Parts by name."""

    def __post_init__(self) -> None:
        if self.num_epochs > 1 and self.text is None:
            raise ValueError(f"num_epochs is {self.num_epochs} but text is null; give a text")


NEEDED = ["--output_dir", "out", "--model.path", "base"]

PROGRAM = """
from rlhf.runs.program import run_stage
from tests.rlhf.runs.test_settings import Stage

def stage(config):
    if config.text == "interrupt":
        raise KeyboardInterrupt
    open(config.text).close()

if __name__ == "__main__":
    run_stage(stage, Stage)
"""


def write(folder: Path, name: str, text: str) -> str:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return str(path)


def run_program(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    program = write(folder, "program.py", PROGRAM)
    root = str(Path(__file__).parents[3])
    return subprocess.run(
        [sys.executable, program, *words],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": root, "PATH": "", "COLUMNS": "200"},
        check=False,
    )


def test_defaults_then_files_in_order_then_command_line(tmp_path: Path) -> None:
    first = write(
        tmp_path,
        "first.yaml",
        "output_dir: first\nmodel: {path: base}\n"
        "optim: {learning_rate: 5e-7, warmup_steps: 3, eps: 1e-6}\n",
    )
    second = write(tmp_path, "second.yaml", "optim:\n  warmup_steps: 4\n  eps: 1e-5\n")
    config = load_config(
        Stage, ["--config", first, "--config", second, "--optim.eps", "1e-4", "--text=null"]
    )
    assert config == Stage(
        output_dir="first",
        model=ModelSettings(path="base"),
        optim=OptimSettings(learning_rate=5e-7, warmup_steps=4, eps=1e-4),
    )


def test_no_setting_is_left_for_the_next_time(tmp_path: Path) -> None:
    before = load_config(Stage, NEEDED)
    file = write(tmp_path, "settings.yaml", "optim: {max_grad_norm: 7}\nparts: {x: {weight: 2}}")
    words = [*NEEDED, "--config", file, "--optim.betas", "[0.5, 0.6]", "--parts.y.weight", "3"]
    assert load_config(Stage, words).parts.keys() == {"x", "y"}
    with pytest.raises(ConfigError):
        load_config(Stage, [*words, "--num_epochs", "many"])
    assert load_config(Stage, NEEDED) == before


def test_numbers_with_an_exponent_are_numbers() -> None:
    rate = load_config(Stage, [*NEEDED, "--optim.learning_rate", "5e-7"]).optim.learning_rate
    assert isinstance(rate, float)
    assert rate == 5e-7


def test_defaults_are_those_of_sections_too() -> None:
    config = load_config(Stage, [*NEEDED, "--optim.learning_rate", "0.5", "--text", "a.jsonl"])
    defaults, chosen = default_settings(config), settings_in_use(config)
    assert "output_dir" not in defaults and "path" not in defaults["model"]
    assert defaults["model"]["dtype"] == ModelSettings(path="unused").dtype
    assert defaults["optim"] == settings_in_use(OptimSettings())
    assert defaults["text"] is None
    same = {**defaults, "output_dir": chosen["output_dir"], "text": "a.jsonl"}
    same["model"] |= {"path": chosen["model"]["path"]}
    same["optim"] |= {"learning_rate": 0.5}
    assert same == chosen


def test_settings_in_force_load_again(tmp_path: Path) -> None:
    words = ["--optim.betas", "[0.8,0.99]", "--text", "a.jsonl", "--parts.x.weight", "2"]
    config = load_config(Stage, [*NEEDED, *words])
    path = write(tmp_path, "config.yaml", yaml.safe_dump(settings_in_use(config)))
    assert load_config(Stage, ["--config", path]) == config


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("outptu_dir: x\n", "unknown setting outptu_dir; did you mean output_dir?"),
        (
            "optim:\n  learning_rat: 1\n",
            "unknown setting optim.learning_rat; did you mean optim.learning_rate?",
        ),
        ("optim.learning_rat: 1\n", "did you mean optim.learning_rate?"),
        ("parts: {x: {weigth: 2}}", "unknown setting parts.x.weigth; did you mean parts.x.weight?"),
        ("parts.x.weigth: 2", "unknown setting parts.x.weigth; did you mean parts.x.weight?"),
        ("part: {x: {weight: 2}}", "unknown setting part; did you mean parts?"),
        ("zzz: 1\n", "unknown setting zzz; --help lists all settings"),
        ("", "holds None"),
        ("- a\n", "holds ['a']"),
        ("a: [\n", "is not YAML"),
    ],
)
def test_wrong_file_is_named(tmp_path: Path, text: str, words: str) -> None:
    path = write(tmp_path, "wrong.yaml", text)
    for given in (["--config", path], [f"--config={path}"]):
        with pytest.raises(ConfigError) as error:
            load_config(Stage, [*NEEDED, *given])
        assert path in str(error.value)
        assert words in str(error.value)


def test_file_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    path = tmp_path / "latin.yaml"
    path.write_bytes("text: Müller\n".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"latin\.yaml is not UTF-8"):
        load_config(Stage, [*NEEDED, "--config", str(path)])


@pytest.mark.parametrize("form", ["--optim={}", "--optim {}", "--config {}", "--parts.x {}"])
def test_a_section_is_no_file(tmp_path: Path, form: str) -> None:
    """jsonargparse would read it in the locale's encoding, and accept aliases."""
    inner = write(tmp_path, "inner.yaml", "warmup_steps: 3")
    outer = write(tmp_path, "outer.yaml", f"optim: {inner}")
    words = form.format(outer if "config" in form else inner).split(" ")
    with pytest.raises(ConfigError, match=r"inner\.yaml, which is a file; .* by its keys, such as"):
        load_config(Stage, [*NEEDED, *words])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--learning_rate", "1"], "unknown setting learning_rate; did you mean"),
        (["--optim.learnin_rate=1"], "optim.learnin_rate; did you mean optim.learning_rate?"),
        (["--num_epoch", "2"], "unknown setting num_epoch; did you mean num_epochs?"),
        (["--num_epochs", "10.5"], '"num_epochs": Expected a int. Got value: 10.5'),
        (["--num_epochs", "true"], '"num_epochs": Expected a int. Got value: True'),
        (["--num_epochs", "null"], '"num_epochs": Expected a int. Got value: None'),
        (["--optim.schedule", "cosin"], "Expected a Literal['cosine', 'linear', 'constant']"),
        (["--optim.betas", "[0.9]"], '"optim.betas": Expected a tuple with 2 elements'),
        (["--optim", "3"], "optim"),
        (["--config", "absent.yaml"], "absent.yaml does not exist"),
        (["stray"], "'stray' is not an option"),
        (["--num_epochs", "2"], "num_epochs is 2 but text is null"),
        (["--optim.learning_rate", "-1"], "optim.learning_rate is -1.0; give a number: above 0"),
        (["--optim.learning_rate", ".inf"], "optim.learning_rate is inf"),
        (["--optim.betas", "[0.9,1.0]"], "optim.betas is [0.9, 1.0]"),
        (["--optim.min_lr_ratio", "1.5"], "optim.min_lr_ratio is 1.5"),
        (["--optim.warmup_steps", "-1"], "optim.warmup_steps is -1"),
        (["--optim.max_grad_norm", "0"], "optim.max_grad_norm is 0.0"),
        (["--model.path", ""], "model.path is empty"),
        (["--generation.batch_size", "0"], "generation.batch_size is 0; give a number: 1 or more"),
        (
            ["--generation.vllm_memory_share", "1"],
            "memory_share is 1.0; give a number: above",
        ),
        (["--parts.x.weight", "0"], "parts.x.weight is 0.0; give another"),
        (["--parts.x.weight", "much"], 'setting "parts.NAME.weight": Expected a float. Got value'),
        (["--parts.x.weigth", "2"], "parts.NAME.weigth; did you mean parts.NAME.weight?"),
        (["--parts.x", "3"], "parts takes a section for every name, with the keys weight"),
    ],
)
def test_wrong_setting_is_named(words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        load_config(Stage, [*NEEDED, *words])


def test_missing_setting_is_named() -> None:
    with pytest.raises(ConfigError, match=r"required: .*output_dir"):
        load_config(Stage, ["--model.path", "base"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optim: 3\n", "optim is 3; give a section with the keys learning_rate"),
        ("num_epochs: null\n", "num_epochs is null; give a value of type int"),
        ("optim: {eps: null}\n", "optim.eps is null; give a value of type float"),
        ("text: 5\n", '"text": Expected one of str, null. Got value: 5'),
        ("parts: {x: {weight: null}}", "parts.x.weight is null; give a value of type float"),
        ("parts: {x: {weight: 2}, y: 3}", "parts takes a section for every name"),
        ("parts: [1]", "parts takes a section for every name"),
        ("parts: null", "parts is null"),
    ],
)
def test_wrong_value_in_a_file_is_named(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path, "wrong.yaml", text)
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_config(Stage, [*NEEDED, "--config", path])


def test_keys_of_names_sections_with_dots() -> None:
    keys = keys_of(Stage)
    assert keys[:2] == ["output_dir", "model"]
    assert "optim.learning_rate" in keys
    assert "learning_rate" not in keys
    assert keys[-3:] == ["parts", "parts.NAME", "parts.NAME.weight"]


def test_sections_that_the_user_names(tmp_path: Path) -> None:
    path = write(tmp_path, "named.yaml", "parts: {x: {weight: 2}, y: {}}")
    config = load_config(Stage, [*NEEDED, "--config", path, "--parts.y.weight", "3"])
    assert config.parts == {"x": Part(weight=2.0), "y": Part(weight=3.0)}


@pytest.mark.slow
def test_program_ends_in_one_line_for_what_a_user_can_mend(tmp_path: Path) -> None:
    for words, code, stderr in (
        (
            [*NEEDED, "--num_epoch", "2"],
            2,
            "error: unknown setting num_epoch; did you mean num_epochs?",
        ),
        (
            [*NEEDED, "--text", "no/file"],
            2,
            "error: [Errno 2] No such file or directory: 'no/file'",
        ),
        ([*NEEDED, "--text", "interrupt"], 130, "interrupted"),
    ):
        run = run_program(tmp_path, *words)
        assert run.returncode == code
        assert run.stderr == stderr + "\n"


@pytest.mark.slow
def test_help_shows_attribute_docstrings(tmp_path: Path) -> None:
    run = run_program(tmp_path, "--help")
    assert run.returncode == 0
    for description in ("Passes over the data.", "Peak learning rate", "A stage for these tests."):
        assert description in run.stdout


@dataclass(frozen=True, kw_only=True)
class Paths(FolderSettings):
    """Paths of every shape."""

    model: ModelSettings
    """Model."""
    rankings: list[str]
    """Files."""
    models: tuple[str, ...] = ()
    """Folders."""
    policies: dict[str, str] = field(default_factory=dict)
    """Folders by name."""
    text: str | None = None
    """File."""


def test_home_is_known_in_every_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    path = write(
        tmp_path,
        "settings.yaml",
        "model: {path: ~/base}\nrankings: [~/a.jsonl, b.jsonl]\nmodels: ['~']\ntext: ~\n",
    )
    words = ["--policies.a", "~/a/", "--policies.b=../b~c", "--policies.hub", "owner/name"]
    config = load_config(Paths, ["--config=~/settings.yaml", *words])
    assert config == Paths(
        model=ModelSettings(path=f"{tmp_path}/base"),
        rankings=[f"{tmp_path}/a.jsonl", "b.jsonl"],
        models=(str(tmp_path),),
        policies={"a": f"{tmp_path}/a/", "b": "../b~c", "hub": "owner/name"},
    )
    config = load_config(Paths, ["--config", path, "--model.path", "~/x", "--rankings", "['~/y']"])
    assert (config.model.path, config.rankings) == (f"{tmp_path}/x", [f"{tmp_path}/y"])
    with pytest.raises(
        ConfigError, match=r"text is ~nobody_here/x, and there is no home folder ~nobody_here"
    ):
        load_config(Paths, ["--config", path, "--text", "~nobody_here/x"])
    with pytest.raises(ConfigError, match=r"policies\.a is ~nobody_here, and"):
        load_config(Paths, ["--config", path, "--policies.a", "~nobody_here"])


def test_a_switch_stands_alone_or_with_its_value(tmp_path: Path) -> None:
    needed = ["--model.path", "a", "--rankings", "[b]"]
    for words, expected in (
        ([], False),
        (["--overwrite"], True),
        (["--overwrite", "--text", "x"], True),
        (["--overwrite", "true"], True),
        (["--overwrite=false"], False),
        (["--overwrite", "--overwrite", "false"], False),
    ):
        assert load_config(Paths, [*words, *needed]).overwrite == expected
        assert load_config(Paths, [*needed, *words]).overwrite == expected
    words = [*needed, "--model.trust_remote_code"]
    assert load_config(Paths, words).model.trust_remote_code


@dataclass(frozen=True, kw_only=True)
class OfARun(StageSettings):
    """Settings of a stage."""

    model: ModelSettings
    """A section with a path."""
    rankings: list[str] = field(default_factory=list)
    """Paths."""
    policies: dict[str, str] = field(default_factory=dict)
    """Paths by name."""
    output_dir: str = "${run_dir}"
    """Folder to write."""


def test_settings_name_the_folder_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    path = tmp_path / "settings.yaml"
    path.write_text(
        "run_dir: runs/tiny\n"
        "model:\n  path: ${run_dir}/sft\n"
        'rankings: ["${run_dir}/a.jsonl", b.jsonl]\n'
        "policies:\n  sft: ${run_dir}/sft\n"
    )
    words = ["--config", str(path)]
    config = load_config(OfARun, words)
    assert (config.model.path, config.output_dir) == ("runs/tiny/sft", "runs/tiny")
    assert (config.rankings, config.policies) == (
        ["runs/tiny/a.jsonl", "b.jsonl"],
        {"sft": "runs/tiny/sft"},
    )
    config = load_config(OfARun, [*words, "--run_dir", "~/x", "--model.path=${run_dir}/y"])
    assert config.model.path == f"{tmp_path}/x/y"
    assert config.policies == {"sft": f"{tmp_path}/x/sft"}


def test_a_run_that_is_not_named_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"^output_dir is \$\{run_dir\}, and run_dir is not set; "
    ):
        load_config(OfARun, ["--model.path", "x"])
