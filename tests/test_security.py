"""Nothing that is read may run: checks our code, and tries hostile folders, settings and records.

The payload makes a folder, the canary; each test checks that it is not there.
"""

import ast
import gzip
import json
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf.inputs.chat import Chat
from rlhf.inputs.files import read_records
from rlhf.inputs.records import Demonstration, Text
from rlhf.models.loading import load_policy, load_scalar
from rlhf.models.saving import save_policy
from rlhf.models.settings import ModelSettings
from rlhf.models.tokenizers import load_chat
from rlhf.rewards.functions import load_function
from rlhf.rewards.models import REWARD_FILE, RewardCard
from rlhf.runs.settings import ConfigError, load_config
from stages.evaluate.config import Config as EvaluateConfig
from stages.ppo.config import Config as PPOConfig
from tests.rlhf.tiny_models import byte_tokenizer, tiny_policy_of, tiny_scalar_of

ROOT = Path(__file__).parents[1]
WALKED = "rlhf stages data tools experiments examples benchmarks".split()

UNSAFE_MODULES = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal"}
UNSAFE_MODULES |= {"shelve"}
UNSAFE_NAMES = {"eval", "exec", "compile", "__import__"}
UNSAFE_CALLS = {"torch.save", "yaml.unsafe_load", "yaml.full_load", "yaml.load_all", "os.system"}
UNSAFE_CALLS |= {"os.popen"}
UNSAFE_METHODS = {"register_for_checkpointing", "save_state", "load_state"}
"""Methods of accelerate, which pickle and load with weights_only=False."""
UNSAFE_ARGUMENTS = {"trust_remote_code", "shell", "allow_pickle"}
"""Arguments that are never True as a literal or a default; only a setting may be passed on."""

BREACHES = [
    "import pickle",
    "from pickle import loads",
    "import marshal as quick",
    "from shelve import open as shelf",
    "import dill",
    "import joblib.externals",
    "torch.load(path)",
    "torch.load(path, weights_only=False)",
    "torch.load(path, weights_only=flag)",
    "from torch import load",
    "from torch import nn, save",
    "torch.save(state, path)",
    "eval('1')",
    "exec(text)",
    "compile(text, 'x', 'exec')",
    "__import__(name)",
    "yaml.load(text)",
    "yaml.load(text, Loader=yaml.Loader)",
    "yaml.load(text, yaml.UnsafeLoader)",
    "yaml.unsafe_load(text)",
    "from yaml import load",
    "model = Auto.from_pretrained(path, trust_remote_code=True)",
    "class Settings:\n    trust_remote_code: bool = True",
    "def load(path, trust_remote_code=True): ...",
    "def load(path, *, trust_remote_code: bool = True): ...",
    "subprocess.run(command, shell=True)",
    "os.system(command)",
    "np.load(path, allow_pickle=True)",
    "accelerator.register_for_checkpointing(state)",
    "accelerator.save_state(folder)",
    "self.accelerator.load_state(folder)",
]
HARMLESS = [
    "model.eval()",
    "re.compile('x')",
    "torch.compile(model)",
    "torch.load(path, weights_only=True)",
    "yaml.load(text, Loader=yaml.SafeLoader)",
    "yaml.safe_load(text)",
    "json.load(file)",
    "load_file(path)",
    "Auto.from_pretrained(path, trust_remote_code=settings.trust_remote_code)",
    "class Settings:\n    trust_remote_code: bool = False",
    "def load(path, *, trust_remote_code: bool = False): ...",
    "subprocess.run(['git', 'status'])",
    "model.load_state_dict(state)",
]


def breaches(text: str) -> list[str]:
    """Return the lines of a Python file that could run what they read, as `line: code`."""
    tree = ast.parse(text)
    found = {
        node.lineno: ast.unparse(node)
        for node in ast.walk(tree)
        if isinstance(node, ast.stmt | ast.expr) and is_breach(node)
    }
    return [f"{line}: {code.splitlines()[0]}" for line, code in sorted(found.items())]


def is_breach(node: ast.AST) -> bool:
    match node:
        case ast.Import(names=names):
            return any(name.name.split(".")[0] in UNSAFE_MODULES for name in names)
        case ast.ImportFrom(module=module, names=names):
            words = {f"{module}.{name.name}" for name in names}
            unsafe = words & {"torch.load", "yaml.load", *UNSAFE_CALLS}
            return str(module).split(".")[0] in UNSAFE_MODULES or bool(unsafe)
        case ast.Call():
            return is_unsafe_call(node)
        case ast.AnnAssign(target=ast.Name(id=name), value=value):
            return name in UNSAFE_ARGUMENTS and is_true(value)
        case ast.FunctionDef(args=arguments):
            found = defaults(arguments)
            return any(name in UNSAFE_ARGUMENTS and is_true(value) for name, value in found)
    return False


def is_unsafe_call(call: ast.Call) -> bool:
    name = ast.unparse(call.func)
    given = {word.arg: word.value for word in call.keywords}
    if any(key in UNSAFE_ARGUMENTS and is_true(value) for key, value in given.items()):
        return True
    if name == "torch.load":
        return not is_true(given.get("weights_only"))
    if name == "yaml.load":
        return not any("SafeLoader" in ast.unparse(word) for word in [*call.args, *given.values()])
    return name in UNSAFE_NAMES | UNSAFE_CALLS or name.split(".")[-1] in UNSAFE_METHODS


def defaults(node: ast.arguments) -> Iterator[tuple[str, ast.expr | None]]:
    positional = [*node.posonlyargs, *node.args]
    yield from zip(
        [one.arg for one in positional[len(positional) - len(node.defaults) :]],
        node.defaults,
        strict=True,
    )
    yield from zip([one.arg for one in node.kwonlyargs], node.kw_defaults, strict=True)


def is_true(node: ast.expr | None) -> bool:
    return isinstance(node, ast.Constant) and node.value is True


@pytest.mark.parametrize("snippet", BREACHES)
def test_the_walk_finds(snippet: str) -> None:
    assert breaches(f"import os\n{snippet}\n"), snippet


@pytest.mark.parametrize("snippet", HARMLESS)
def test_the_walk_lets_through(snippet: str) -> None:
    assert breaches(snippet) == []


def test_the_code_runs_nothing_that_it_reads() -> None:
    files = [path for name in WALKED for path in sorted((ROOT / name).rglob("*.py"))]
    assert len(files) > 80
    found = {
        str(path.relative_to(ROOT)): lines
        for path in files
        if (lines := breaches(path.read_text(encoding="utf-8")))
    }
    assert found == {}


class Bomb:
    """Makes the canary when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        import os

        return os.mkdir, (str(self.canary),)


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    return tmp_path / "canary"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a policy, and a reward model with its card."""
    folder = tmp_path_factory.mktemp("models")
    tokenizer = byte_tokenizer("<s>", "</s>", "<pad>", eos_token="</s>", pad_token="<pad>")
    Chat(tokenizer)
    save_policy(tiny_policy_of("llama", vocab_size=len(tokenizer)), tokenizer, folder / "policy")
    tiny_scalar_of("llama", vocab_size=len(tokenizer)).save(folder / "rm", tokenizer)
    return folder


@pytest.fixture
def policy(models: Path, tmp_path: Path) -> Path:
    """Copy the policy for a test to spoil."""
    return Path(shutil.copytree(models / "policy", tmp_path / "policy"))


def change(path: Path, **values: Any) -> None:
    found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    path.write_text(json.dumps(found | values), encoding="utf-8")


def module_that_makes(canary: Path) -> str:
    return f"import os\nos.mkdir({str(canary)!r})\nclass Evil: pass\nclass EvilConfig: pass\n"


def test_the_payloads_work(canary: Path) -> None:
    """Otherwise the tests below could not fail."""
    pickle.loads(pickle.dumps(Bomb(canary)))
    assert canary.exists()
    canary.rmdir()
    exec(module_that_makes(canary))
    assert canary.exists()


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("name", ["pytorch_model.bin", "adapter_model.bin"])
def test_pickled_weights_are_refused(policy: Path, canary: Path, name: str, zipped: bool) -> None:
    (policy / "model.safetensors").unlink()
    if zipped:
        torch.save({"w": Bomb(canary)}, policy / name)
    else:
        (policy / name).write_bytes(pickle.dumps({"w": Bomb(canary)}))
    for load in (load_policy, load_scalar):
        with pytest.raises(OSError, match=rf"(?s)policy.*{name} is pickled.*safetensors"):
            load(ModelSettings(path=str(policy)))
    assert not canary.exists()


def test_pickles_beside_the_weights_are_left_alone(policy: Path, canary: Path) -> None:
    bomb = pickle.dumps({"w": Bomb(canary)})
    for name in (
        "pytorch_model.bin optimizer.pt scheduler.pt rng_state.pth training_args.bin "
        "adapter_model.bin vocab.pkl tf_model.h5"
    ).split():
        (policy / name).write_bytes(bomb)
    load_policy(ModelSettings(path=str(policy)))
    load_chat(ModelSettings(path=str(policy)))
    assert not canary.exists()


def test_a_pickle_named_safetensors_is_refused(policy: Path, canary: Path) -> None:
    (policy / "model.safetensors").write_bytes(pickle.dumps({"w": Bomb(canary)}))
    with pytest.raises(ValueError, match=r"cannot load .*policy.*SafetensorError"):
        load_policy(ModelSettings(path=str(policy)))
    assert not canary.exists()


AUTO_MAP = {"AutoConfig": "evil.EvilConfig", "AutoModelForCausalLM": "evil.Evil"}
AUTO_MAP |= {"AutoModelForSequenceClassification": "evil.Evil"}


def test_code_in_the_model_folder_is_not_run(policy: Path, canary: Path) -> None:
    for path in ("evil.py", "modeling_llama.py", "custom_generate/generate.py", "__init__.py"):
        (policy / path).parent.mkdir(exist_ok=True)
        (policy / path).write_text(module_that_makes(canary))
    change(policy / "config.json", auto_map=AUTO_MAP)
    load_policy(ModelSettings(path=str(policy)))  # transformers' own Llama
    load_scalar(ModelSettings(path=str(policy)), new_head=True)
    change(policy / "config.json", model_type="evil", architectures=["Evil"])
    load_chat(ModelSettings(path=str(policy)))  # reads no class of the model
    for load in (load_policy, load_scalar):
        with pytest.raises(ValueError, match=r"(?s)cannot load .*policy.*trust_remote_code"):
            load(ModelSettings(path=str(policy)))
    assert not canary.exists()


@pytest.mark.parametrize("own_class", ["EvilTokenizer", "TokenizersBackend"])
def test_code_of_the_tokenizer_is_not_run(policy: Path, canary: Path, own_class: str) -> None:
    (policy / "evil.py").write_text(module_that_makes(canary))
    change(
        policy / "tokenizer_config.json",
        auto_map={"AutoTokenizer": ["evil.Evil", "evil.Evil"]},
        tokenizer_class=own_class,
    )
    try:
        load_chat(ModelSettings(path=str(policy)))
    except ValueError as error:
        assert "policy" in str(error)
    assert not canary.exists()


@pytest.mark.parametrize(
    "escape",
    [
        "cycler.__init__.__globals__.os.mkdir",
        "self.__init__.__globals__.__builtins__.__import__('os').mkdir",
        "''.__class__.__mro__[1].__subclasses__()[-1].__init__.__globals__['os'].mkdir",
        "('%s' | attr('__class__')).mkdir",
        "raise_exception.__globals__['os'].mkdir",
        "lipsum['__glo' ~ 'bals__'].os.mkdir",
    ],
)
def test_templates_stay_in_their_sandbox(policy: Path, canary: Path, escape: str) -> None:
    template = f"{{{{ {escape}({str(canary)!r}) }}}}{{% for m in messages %}}{{{{ m.content }}}}"
    (policy / "chat_template.jinja").write_text(template + "{% endfor %}")
    with pytest.raises(ValueError, match="the chat template refuses a prompt"):
        load_chat(ModelSettings(path=str(policy)))
    assert not canary.exists()


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ messages + 1 }}", "TypeError"),
        ("{% if %}", "Expected an expression"),
        ("{% include '/etc/passwd' %}", "the chat template refuses"),
        ("nothing of the message", "leaves out what the assistant said"),
    ],
)
def test_templates_that_fail_are_refused(policy: Path, template: str, message: str) -> None:
    (policy / "chat_template.jinja").write_text(template)
    with pytest.raises(ValueError, match=message):
        load_chat(ModelSettings(path=str(policy)))


def test_only_the_default_of_several_templates_is_kept(policy: Path, tmp_path: Path) -> None:
    """Saving would write the others to files of their names, which may lead anywhere."""
    plain = (policy / "chat_template.jinja").read_text()
    (policy / "chat_template.jinja").unlink()
    named = [{"name": "default", "template": plain}, {"name": "../../out", "template": "x"}]
    change(policy / "tokenizer_config.json", chat_template=named)
    chat = load_chat(ModelSettings(path=str(policy)))
    saved = tmp_path / "a" / "b"
    chat.tokenizer.save_pretrained(saved)
    assert (saved / "chat_template.jinja").read_text() == plain
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["b"]
    assert not (tmp_path / "out.jinja").exists()
    change(policy / "tokenizer_config.json", chat_template=named[1:])
    with pytest.raises(
        ValueError, match=r"several chat templates .*\.\./\.\./out.* none .*default"
    ):
        load_chat(ModelSettings(path=str(policy)))


def test_a_pickled_reward_card_is_refused(models: Path, tmp_path: Path, canary: Path) -> None:
    folder = Path(shutil.copytree(models / "rm", tmp_path / "rm"))
    (folder / REWARD_FILE).write_bytes(pickle.dumps(Bomb(canary)))
    with pytest.raises(ValueError, match=r"reward\.json is not a reward card"):
        RewardCard.load(folder)
    assert not canary.exists()


@pytest.mark.parametrize("key", ["output_dir", "optim", "reward"])
@pytest.mark.parametrize(
    "value",
    [
        "!!python/object/apply:os.mkdir [{canary!r}]",
        "!!python/object/new:os.mkdir [{canary!r}]",
        "!!python/name:os.mkdir",
        "!!python/module:os",
        "{{class_path: os.mkdir, init_args: {{path: {canary!r}}}}}",
    ],
)
@pytest.mark.slow
def test_settings_run_nothing(tmp_path: Path, canary: Path, key: str, value: str) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text(f"{key}: {value.format(canary=str(canary))}\n")
    with pytest.raises(ConfigError):
        load_config(PPOConfig, ["--config", str(path)])
    with pytest.raises((ConfigError, ValueError)):
        load_config(PPOConfig, [f"--{key}", value.format(canary=str(canary))])
    assert not canary.exists()


@pytest.mark.parametrize("bomb", ["[*a, *a]", "{x: *a}", "*a"])
def test_settings_do_not_grow_by_aliases(tmp_path: Path, bomb: str) -> None:
    """Nine levels of nine are 387 million entries for code that walks or prints them."""
    path = tmp_path / "settings.yaml"
    path.write_text(f"seed: &a 1\nreward: {bomb}\n")
    with pytest.raises(ConfigError, match=r"settings\.yaml.*alias.*write the value out"):
        load_config(PPOConfig, ["--config", str(path)])


@pytest.mark.parametrize("name", ["os:system", "subprocess:run", "builtins:exec", "os.path:join"])
def test_settings_name_no_function_of_python_itself(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}.*Python's own library"):
        load_function(name)


def test_only_json_lines_of_a_data_folder_are_read(tmp_path: Path, canary: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "data.py").write_text(module_that_makes(canary))
    (folder / "dataset.pt").write_bytes(pickle.dumps(Bomb(canary)))
    with pytest.raises(ValueError, match=r"no \.jsonl or \.jsonl\.gz file in the folder"):
        read_records(folder, Demonstration)
    (folder / "train.jsonl").write_text('{"prompt": "q", "response": "a"}\n')
    assert read_records(folder, Demonstration) == [Demonstration("q", "a")]
    for name in ("pickle.jsonl", "pickle.jsonl.gz"):
        packed = pickle.dumps(Bomb(canary))
        data = gzip.compress(packed) if name.endswith(".gz") else packed
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=f"{name}, row 1"):
            read_records(tmp_path / name, Demonstration)
    assert not canary.exists()


@pytest.mark.parametrize("name", ["./data", "/data", "../data", "a/../b", "owner/name:../x.jsonl"])
def test_a_hub_name_is_no_path(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "data.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(ValueError, match="expected hub:owner/name"):
        read_records(f"hub:{name}", Text)


@pytest.mark.parametrize(
    "row",
    [
        b"[" * 100_000,
        b'{"prompt": ' + b'{"a": ' * 100_000,
        b'{"prompt": "q", "response": ' + b"9" * 100_000 + b"}",
        b'{"prompt": "q", "response": "a", "__class__": {"py/object": "os.mkdir"}}',
        b'{"prompt": [' + b'{"role": "user", "content": "q"},' * 20_000 + b"1]}",
    ],
    ids=["nested", "nested-object", "long-number", "class", "many-turns"],
)
def test_huge_and_nested_rows_are_named(tmp_path: Path, row: bytes) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(row + b"\n")
    with pytest.raises(ValueError, match=r"rows\.jsonl, row 1: field") as refused:
        read_records(path, Demonstration)
    assert len(str(refused.value)) < 1000


@pytest.mark.parametrize(
    "name", ["../../x", "/tmp/x", "a/b", "..", ".", "", "a\x00", "a\nb", "con."]
)
@pytest.mark.parametrize("section", ["policies", "reports"])
def test_names_in_settings_are_no_paths(name: str, section: str) -> None:
    names: dict[str, Any] = {"policies": {"sft": "runs/sft"}}
    names[section] = {**names.get(section, {}), name: "runs/sft"}
    with pytest.raises(ValueError, match=f"{section} has the name"):
        EvaluateConfig(prompts="p.jsonl", output_dir="runs/evaluate", **names)
