"""The common model loader: tokenizer, policy (causal LM), and scalar models (reward and value)."""

import importlib.util
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from rlhf.inputs.chat import Chat
from rlhf.inputs.packing import PackedRow, Packer, PromptTree
from rlhf.inputs.template import add_missing_parts
from rlhf.maths.logprobs import Head, TokenMoments, chunked_logprobs, chunked_moments
from rlhf.models.adapters import (
    CONFIG_FILE,
    HEAD,
    WEIGHTS_FILE,
    Adapter,
    adapter_of,
    check_same,
    empty_adapter,
    find_adapter,
    load_adapter,
    merge_adapter,
    new_adapter,
    read_adapter,
    save_adapter,
)
from rlhf.models.architectures import (
    accepted,
    accepts,
    body_of,
    check_causal,
    check_is_known,
    check_is_policy,
    features_of,
    find_body,
    from_config,
    hidden_states,
    num_embeddings,
    scalar_class,
    with_attention,
)
from rlhf.models.interop import name_as_before
from rlhf.models.packed_attention import segmented_sdpa
from rlhf.runs.folder import SAVED_WEIGHTS
from rlhf.runs.run import BASE_FILE
from rlhf.runs.settings import LoraSettings, ModelSettings
from rlhf.training.offloading import is_of_the_device

if TYPE_CHECKING:
    from rlhf.models.shared_bases import SharedBases

ALL_WEIGHTS = LoraSettings()
"""No adapter: one that a folder holds is merged into its base."""

PACKING_TOLERANCE = 1e-3
"""Largest difference of a logit between packed and plain passes that the probe accepts."""

AttentionInterface.register("sdpa", segmented_sdpa)

_plain_heads: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()
"""What `has_plain_head` found."""


def load_tokenizer(path: str, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder, hub id or GGUF file, with chat template and pad token."""
    if path.endswith(".gguf"):
        file = Path(path)
        return add_missing_parts(
            AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
        )
    _check_folder(path)
    with _naming(path):
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
        return add_missing_parts(tokenizer, _declared_ends(path, tokenizer))


def load_chat(settings: ModelSettings) -> Chat:
    """The rendering of a model folder, hub id or GGUF file, with all ends that it declares."""
    tokenizer = load_tokenizer(settings.path, trust_remote_code=settings.trust_remote_code)
    return Chat(tokenizer, _declared_ends(settings.path, tokenizer))


def load_policy(
    settings: ModelSettings, lora: LoraSettings = ALL_WEIGHTS, bases: "SharedBases | None" = None
) -> PreTrainedModel:
    """A causal LM in evaluation mode with dropout off, every weight of it from the file.

    Args:
        lora: with a rank, the model has an adapter to be trained over frozen weights: the one that
            the folder holds, or a new one where it holds a full model. Without, all weights can be
            trained: an adapter is merged into its base.
        bases: holds the frozen weights for several models; without a rank in `lora` the model is
            frozen, and its adapter stays beside its base.

    Raises:
        ValueError: weights are missing or do not fit the architecture; an adapter's base is not
            the one it was trained over, or `lora` asks for another adapter.
        OSError: the folder or the hub id cannot be read.
    """
    if settings.path.endswith(".gguf"):
        from rlhf.models.gguf import load_gguf

        if lora.rank:
            _refuse_gguf_base(settings.path)
        model, _ = load_gguf(settings.path, dtype=_dtype(settings))
        return disable_dropout(model)
    adapter = find_adapter(settings.path)
    if adapter is not None and adapter.has_head:
        raise ValueError(
            f"{settings.path} is the adapter of a reward model; give the folder of a policy"
        )
    model = _load_base(AutoModelForCausalLM, settings, adapter, lora, bases)
    _adapt(model, settings.path, adapter, lora, is_shared=bases is not None)
    if lora.quantize == "none":  # 4 bits may need a GPU, where the model is not yet
        check_causal(model, settings.path)
    return model


def new_policy(architecture: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """A causal LM from scratch, random weights from torch's generator.

    Args:
        architecture: what transformers' config takes, with `model_type`, for example
            {"model_type": "llama", "hidden_size": 128, ...}; the vocabulary and the special tokens
            come from the tokenizer.
    """
    settings = dict(architecture)
    model_type = settings.pop("model_type")
    config = AutoConfig.for_model(
        model_type,
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **settings,
    )
    return disable_dropout(AutoModelForCausalLM.from_config(config))


class ScalarModel(nn.Module):
    """One number a token, from a sequence classifier with one label: a reward or a value model.

        output = scale * (head(hidden state) - bias)

    The head reads in fp32, also under autocast. Saved as the plain classifier; bias and scale live
    in reward.json.
    """

    def __init__(self, classifier: PreTrainedModel, bias: float = 0.0, scale: float = 1.0) -> None:
        super().__init__()
        self.classifier = classifier
        self.bias = bias
        self.scale = scale

    @property
    def head(self) -> nn.Linear:
        head = self.classifier.score
        assert isinstance(head, nn.Linear)
        return head

    def forward(self, positions: Tensor, **model_inputs: Tensor | None) -> Tensor:
        """Numbers (n,) at these positions (n,) of the one row in `model_inputs` (see PackedRow)."""
        hidden = hidden_states(self.classifier, **model_inputs)
        # A sum of products, since autocast would make a linear layer's operands bf16.
        raw = (hidden[0, positions].float() * self.head.weight[0].float()).sum(-1)
        return self.scale * (raw - self.bias)

    def save(self, folder: str | Path, tokenizer: PreTrainedTokenizerBase) -> None:
        """Writes a folder that load_scalar reads, and AutoModelForSequenceClassification where
        transformers has a classifier for the architecture."""
        _save(self.classifier, tokenizer, folder)


def load_scalar(
    settings: ModelSettings,
    *,
    new_head: bool = False,
    lora: LoraSettings = ALL_WEIGHTS,
    bases: "SharedBases | None" = None,
) -> ScalarModel:
    """A scalar model in evaluation mode with dropout off.

    Args:
        new_head: True puts a new head N(0, 1/(d+1)) on the body of any causal LM (Stiennon et al.
            2020, B.1; the variance 1/(d+1) keeps first scores of order 1), from torch's generator.
            False needs the head in the folder: a random one would score at random in silence.
        lora: as in load_policy; with a rank, the head is trained beside the adapter.
        bases: as in load_policy.

    Raises:
        ValueError: weights are missing, the head included unless it is to be new; or as in
            load_policy.
    """
    path = settings.path
    if path.endswith(".gguf"):
        raise ValueError(
            f"{path}: a scalar model starts from a model folder; convert the GGUF file first with "
            "rlhf.models.loading.save_policy, as data/smollm2.py does"
        )
    adapter = find_adapter(path)
    if adapter is not None and not (adapter.has_head or new_head):
        _refuse_no_head(path)
    classifier = _load_base(
        AutoModelForSequenceClassification, settings, adapter, lora, bases, new_head=new_head
    )
    tokenizer = load_tokenizer(path, trust_remote_code=settings.trust_remote_code)
    classifier.config.pad_token_id = tokenizer.pad_token_id
    _adapt(classifier, path, adapter, lora, is_shared=bases is not None, new_head=new_head)
    if lora.quantize == "none":
        check_causal(classifier, path)
    model = ScalarModel(classifier)
    if new_head:
        nn.init.normal_(model.head.weight, std=(model.head.in_features + 1) ** -0.5)
    return model


def empty_policy(
    settings: ModelSettings, lora: LoraSettings = ALL_WEIGHTS, *, is_shared: bool = False
) -> PreTrainedModel:
    """The causal LM that load_policy gives, from its config alone: no weights are read. Under
    torch's FakeTensorMode it takes no memory.

    Args:
        is_shared: as with `bases` in load_policy.

    Raises:
        ValueError, OSError: the config cannot be read, or `lora` asks for another adapter.
    """
    model = _empty(AutoModelForCausalLM, settings, lora, is_shared)
    _plain_heads[model] = _passes_logits_on(model)
    return model


def empty_scalar(
    settings: ModelSettings, lora: LoraSettings = ALL_WEIGHTS, *, is_shared: bool = False
) -> ScalarModel:
    """The scalar model that load_scalar gives, as `empty_policy`."""
    auto_class = AutoModelForSequenceClassification
    return ScalarModel(_empty(auto_class, settings, lora, is_shared, num_labels=1))


def save_policy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    weights: dict[str, Tensor] | None = None,
) -> None:
    """Writes a folder that AutoModelForCausalLM and AutoTokenizer load as it is.

    Generation stops at the end-of-response token by the saved generation_config, and at all ends
    that the base model declared; the sampling settings that it brought along go: they would distort
    later rollouts.

    Args:
        weights: what to write where the model holds a shard of each only; None: the model's own.
    """
    chat = Chat(tokenizer, _ends_of(model.generation_config, tokenizer))
    generation = type(model.generation_config)(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=sorted({chat.end_id, *chat.other_ends}),
        pad_token_id=tokenizer.pad_token_id,
    )
    model.generation_config = generation
    _save(model, tokenizer, folder, weights)
    generation.save_pretrained(folder)  # an adapter's save does not write it


def disable_dropout(model: PreTrainedModel) -> PreTrainedModel:
    """Evaluation mode, and every dropout rate 0 also in training mode.

    With dropout the ratio of PPO's first step is not 1 and the KL is noise (recipe: checklist 19).
    The saved config keeps the architecture's own rates.
    """
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if ("dropout" in name or name == "layerdrop") and isinstance(value, float):
                setattr(module, name, 0.0)
    model.eval()
    return model


def checkpoint_activations(model: PreTrainedModel) -> None:
    """In training mode each layer's activations are computed again in the backward pass: memory
    for one layer instead of all, about a third more time, the same gradients."""
    with warnings.catch_warnings():
        # transformers 5.23's new name for it is not there in 5.19
        warnings.filterwarnings("ignore", message="`gradient_checkpointing_enable` is deprecated")
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def response_logprobs(policy: nn.Module, row: PackedRow, temperature: float = 1.0) -> Tensor:
    """Log-probability (tokens,) in nats of every response token of a packed row."""
    features, head = _features_and_head(policy, row)
    return chunked_logprobs(features, row.targets, head, temperature)


def response_moments(policy: nn.Module, row: PackedRow, temperature: float = 1.0) -> TokenMoments:
    """`response_logprobs`, and each token's entropy and variance, all (tokens,); no gradient."""
    features, head = _features_and_head(policy, row)
    return chunked_moments(features, row.targets, head, temperature)


@torch.no_grad()
def has_plain_head(policy: nn.Module) -> bool:
    """Whether logits are the unembedding of the last hidden states and nothing more.

    Some architectures scale or cap them afterwards (Gemma 2, Granite, Cohere); tried on three
    tokens, bit for bit, once a model.
    """
    if policy not in _plain_heads:
        plain = False
        head = policy.get_output_embeddings() if isinstance(policy, PreTrainedModel) else None
        if (
            isinstance(policy, PreTrainedModel)
            and isinstance(head, nn.Linear)
            and find_body(policy) is not None
        ):
            ids = torch.tensor([[1, 2, 3]], device=policy.device)
            hidden, logits = hidden_states(policy, input_ids=ids), _logits(policy, input_ids=ids)
            plain = hidden.shape[-1] == head.in_features and torch.equal(head(hidden), logits)
        _plain_heads[policy] = plain
    return _plain_heads[policy]


@contextmanager
def quiet() -> Iterator[None]:
    """Silences transformers' bars and its loading report, which this module reads itself."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        logging.enable_progress_bar()


def check_vocabulary(model: PreTrainedModel, chat: Chat, path: str) -> None:
    """Refuses a tokenizer that can give ids for which the model has no embedding."""
    rows = num_embeddings(model)
    numbers = chat.tokenizer.get_vocab()
    beyond = sorted((number, token) for token, number in numbers.items() if number >= rows)
    if not beyond:
        return
    number, token = beyond[0]
    if len(chat.tokenizer) > rows:
        raise ValueError(
            f"the tokenizer has {len(chat.tokenizer)} tokens, the model at {path} embeds {rows}: "
            f"this is the tokenizer of another model, or tokens such as {token!r} (id {number}) "
            "were added to it alone; use the one saved beside the weights"
        )
    raise ValueError(
        f"the tokenizer's token {token!r} has id {number}, but the model at {path} embeds the ids "
        f"0 to {rows - 1} only (so {len(beyond)} tokens have no embedding); use the tokenizer "
        "saved beside the weights, or resize the embeddings (resize_token_embeddings)"
    )


def check_context(model: PreTrainedModel, path: str, limits: Mapping[str, int]) -> None:
    """Refuses limits (setting -> tokens) that add up to more positions than the model knows."""
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if context is not None and sum(limits.values()) > context:
        names = " + ".join(f"{name} {tokens}" for name, tokens in limits.items())
        raise ValueError(
            f"{names} is more than the {context} tokens that the model at {path} can read; lower it"
        )


def packer_for(model: PreTrainedModel, micro_batch_tokens: int) -> Packer:
    """How trees are laid out for this model: the first way that a probe finds to agree with
    separate passes, which are themselves the last, one response a row.

    Models without an attention mask over positions (state space, ALiBi), with flash attention, or
    with a window shorter than the probe's tree come to that.
    """
    attention = model.config._attn_implementation
    eager = model.dtype if attention == "eager" else None  # adds its mask: True would count as one
    masks = Packer(micro_batch_tokens, mask_dtype=eager)
    ways = [replace(masks, use_segments=True), masks] if attention == "sdpa" else [masks]
    packer = next((packer for packer in ways if _agrees(model, packer)), None)
    if packer is None:
        warnings.warn(
            f"{type(model).__name__} with {attention} attention cannot take the packing mask; "
            "every response goes through it alone, which is slow",
            stacklevel=2,
        )
        packer = replace(masks, share_prompts=False)
    config = model.config.get_text_config()
    windows = (getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size"))
    return replace(packer, max_depth=min((window for window in windows if window), default=None))


@torch.no_grad()
def _agrees(model: PreTrainedModel, packer: Packer) -> bool:
    """Whether passes laid this way and separate passes agree, tried on two trees of 26 tokens.

    What stops the separate passes too, and errors of memory or device, are no refusal of the mask.
    """
    if "local" in getattr(model.config, "attention_layers", ()):
        return False  # GPT-Neo cuts its window by places in the row, beyond the probe's tokens
    top = num_embeddings(model) - 1
    ids = tuple(1 + (7 * i) % top for i in range(26))
    trees = [PromptTree(ids[:6], (ids[6:12], ids[12:20])), PromptTree(ids[20:23], (ids[23:],))]
    device = next(model.parameters()).device
    alone = Packer(len(ids), share_prompts=False)
    plain = [_features(model, row.to(device)) for row in alone.rows(trees)]
    together = replace(packer, micro_batch_tokens=len(ids))
    try:
        packed = [_features(model, row.to(device)) for row in together.rows(trees)]
    except (ValueError, TypeError, RuntimeError, NotImplementedError, IndexError) as error:
        if is_of_the_device(error):
            raise
        return False
    difference = (torch.cat(packed) - torch.cat(plain)).abs().max().item()
    tolerance = PACKING_TOLERANCE if model.dtype == torch.float32 else 0.25
    return difference < tolerance


def _empty(
    auto_class: Any, settings: ModelSettings, lora: LoraSettings, is_shared: bool, **arguments: Any
) -> Any:
    path, source, adapter = settings.path, {}, None
    if path.endswith(".gguf"):
        if lora.rank:
            _refuse_gguf_base(path)
        path, source = str(Path(path).parent), {"gguf_file": Path(path).name}
    elif (Path(path) / CONFIG_FILE).is_file():
        adapter = read_adapter(path)
        path = adapter.base
    else:
        _check_folder(path)
    with _naming(settings.path):
        config = AutoConfig.from_pretrained(
            path, trust_remote_code=settings.trust_remote_code, **source, **arguments
        )
        auto_class = _class_for(auto_class, config, settings.path)
        model = with_attention(
            lambda attention: from_config(
                auto_class,
                config,
                dtype=_dtype(settings),
                attn_implementation=attention,
                trust_remote_code=settings.trust_remote_code,
            ),
            settings.attention,
        )
    if adapter is not None and lora.rank:
        check_same(settings.path, adapter, lora)
    if lora.rank or (adapter is not None and is_shared):
        empty_adapter(model, path, lora, adapter)
    if is_shared and not lora.rank:
        model.requires_grad_(False)
    return disable_dropout(model)


@torch.no_grad()
def _passes_logits_on(policy: PreTrainedModel) -> bool:
    """What `has_plain_head` asks, of a model without data: is what the head gives what comes out,
    and what the body gives what the head gets?"""
    seen: list[Tensor] = []
    head = policy.get_output_embeddings()
    hooks = [
        body_of(policy).register_forward_hook(lambda module, _, output: seen.append(output[0])),
        head.register_forward_hook(lambda module, inputs, output: seen.extend([*inputs, output])),
    ]
    logits = _logits(policy, input_ids=torch.tensor([[1, 2, 3]]))
    for hook in hooks:
        hook.remove()
    *hidden, read, given = (tensor.untyped_storage()._cdata for tensor in seen)
    # OPT goes round its own body's forward, so that there is no hidden to compare.
    return all(one == read for one in hidden) and given == logits.untyped_storage()._cdata


def _features_and_head(policy: nn.Module, row: PackedRow) -> tuple[Tensor, Head]:
    """What predicts each response token (tokens, ...), and what makes logits of it."""
    if has_plain_head(policy):
        assert isinstance(policy, PreTrainedModel)
        hidden = hidden_states(policy, **row.model_inputs)
        return hidden[0, row.predictors], policy.get_output_embeddings()
    if accepts(policy, "logits_to_keep"):
        return _logits(policy, **row.model_inputs, logits_to_keep=row.predictors)[0], nn.Identity()
    return _logits(policy, **row.model_inputs)[0, row.predictors], nn.Identity()


def _logits(policy: nn.Module, **inputs: Any) -> Tensor:
    """Logits without a cache, and without the loss over its experts that a mixture may add."""
    return policy(**inputs, **accepted(policy, use_cache=False, output_router_logits=False)).logits


def _features(model: PreTrainedModel, row: PackedRow) -> Tensor:
    """What a row's tokens see: hidden states (tokens, model) at the predicting positions."""
    return features_of(model, **row.model_inputs)[0, row.predictors].float()


def _save(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    weights: dict[str, Tensor] | None = None,
) -> None:
    with quiet():
        save_weights(model, folder, weights)
        save_tokenizer(tokenizer, folder)


def save_weights(
    model: PreTrainedModel, folder: str | Path, state: dict[str, Tensor] | None = None
) -> None:
    """Writes the adapter of a model that has one, else all weights with their config.json.

    Args:
        state: the model's state dict, where it had to be gathered; None: its own.
    """
    folder = Path(folder)
    if adapter_of(model) is not None:
        save_adapter(model, folder, state)
        old = [
            folder / "config.json",
            *(one for name in SAVED_WEIGHTS for one in folder.glob(name)),
        ]
    else:
        model.save_pretrained(folder, state_dict=state)
        old = [folder / name for name in (CONFIG_FILE, WEIGHTS_FILE, BASE_FILE)]
    for path in old:  # what an earlier run of the other kind left would be taken for this one
        path.unlink(missing_ok=True)
    name_as_before(folder)


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: str | Path) -> None:
    """Writes it with its chat template, so that older versions of transformers know it too."""
    tokenizer.save_pretrained(folder)
    name_as_before(folder)


def load_full(
    auto_class: Any,
    settings: ModelSettings,
    *,
    new_weights: Sequence[str] = (),
    quantize: str = "none",
) -> Any:
    """A full model with every weight from its folder, but for those that are to be new."""
    _check_folder(settings.path)
    arguments: dict[str, Any] = {}
    if auto_class is AutoModelForSequenceClassification:
        arguments["num_labels"] = 1
    if quantize == "4bit":
        arguments["quantization_config"] = _four_bits(settings)
    with quiet(), _naming(settings.path):
        config = AutoConfig.from_pretrained(
            settings.path, trust_remote_code=settings.trust_remote_code
        )
    auto_class = _class_for(auto_class, config, settings.path)

    def load(attention: str) -> Any:
        return auto_class.from_pretrained(
            settings.path,
            dtype=_dtype(settings),
            attn_implementation=attention,
            trust_remote_code=settings.trust_remote_code,
            use_safetensors=True,  # a .bin is a pickle, which runs code of its own
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused below, each by its name
            **arguments,
        )

    with quiet(), _naming(settings.path):
        model, report = with_attention(load, settings.attention)
    _refuse_missing(settings.path, report, allowed=new_weights)
    return disable_dropout(model)


def _class_for(auto_class: Any, config: Any, path: str) -> Any:
    """The class that loads, once it is known that the folder can be what it is to be."""
    if auto_class is AutoModelForSequenceClassification:
        check_is_known(config, path)
        with quiet(), _naming(path):
            return scalar_class(config)
    check_is_policy(config, path)
    return auto_class


def _load_base(
    auto_class: Any,
    settings: ModelSettings,
    adapter: Adapter | None,
    lora: LoraSettings,
    bases: "SharedBases | None",
    *,
    new_head: bool = False,
) -> Any:
    """The full model that a folder's adapter, or a new one, belongs over; else the folder's own."""
    if adapter is not None:
        settings = replace(settings, path=adapter.base)
    has_own_head = new_head or (adapter is not None and adapter.has_head)
    is_classifier = auto_class is AutoModelForSequenceClassification
    new_weights = (HEAD,) if is_classifier and has_own_head else ()
    if bases is not None:
        is_base = adapter is not None or lora.rank > 0
        return bases.share(auto_class, settings, new_weights=new_weights, is_base=is_base)
    return load_full(auto_class, settings, new_weights=new_weights, quantize=lora.quantize)


def _adapt(
    model: PreTrainedModel,
    path: str,
    adapter: Adapter | None,
    lora: LoraSettings,
    *,
    is_shared: bool,
    new_head: bool = False,
) -> None:
    """Puts the adapter that `load_policy` promises on its base."""
    if adapter is None and lora.rank:
        new_adapter(model, path, lora)
    elif adapter is not None:
        if lora.rank:
            check_same(path, adapter, lora)
        with _naming(path):
            load_adapter(model, path, adapter, new_head=new_head)
        if not (lora.rank or is_shared):
            merge_adapter(model)
    if is_shared and not lora.rank:
        model.requires_grad_(False)


def _four_bits(settings: ModelSettings) -> Any:
    """NF4 with double quantisation (Dettmers et al. 2023)."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError(
            "lora.quantize is 4bit, which needs bitsandbytes: pip install bitsandbytes; or give "
            "none"
        )
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=_dtype(settings),
    )


def _declared_ends(path: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ends of a model's generation_config.json; none where there is no such file."""
    if path.endswith(".gguf"):
        return []
    adapter = find_adapter(path)
    for place in [path] if adapter is None else [path, adapter.base]:
        try:
            return _ends_of(GenerationConfig.from_pretrained(place), tokenizer)
        except (OSError, ValueError):  # there is none, or none that can be read
            continue
    return []


def _ends_of(generation: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ends that a generation config declares; of those that are an architecture's default only
    what can be one by the tokenizer: an added token without another role."""
    ends = generation.eos_token_id
    declared = [ends] if isinstance(ends, int) else list(ends or ())
    known: Iterable[int] = range(len(tokenizer))
    if getattr(generation, "_from_model_config", False):
        others = {tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.unk_token_id}
        known = {*tokenizer.added_tokens_decoder} - others | {tokenizer.eos_token_id}
    return [end for end in declared if end in known]


@contextmanager
def _naming(path: str) -> Iterator[None]:
    """Says which model was meant in whatever transformers makes of files that it cannot use."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        kind = OSError if isinstance(error, OSError) else ValueError
        place = "" if Path(path).exists() else " (no folder here, so taken for a hub id)"
        name = "" if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: "
        raise kind(f"cannot load {path}{place}: {name}{error}") from error


def _dtype(settings: ModelSettings) -> torch.dtype:
    return getattr(torch, settings.dtype)


def _check_folder(path: str) -> None:
    """A local path that is not there would else be taken for a hub id, with a puzzling message."""
    folder = Path(path)
    if folder.exists() and not any(
        (folder / name).exists() for name in ("config.json", CONFIG_FILE)
    ):
        raise ValueError(
            f"{path} holds no config.json, so it is no model folder; run the stage that makes it, "
            "or give the folder that save_pretrained wrote"
        )
    looks_local = path.startswith((".", "/", "~")) or path.count("/") > 1
    if looks_local and not folder.exists():
        raise ValueError(
            f"the model folder {path} does not exist; run the stage that makes it first, or give "
            "a hub id (owner/name)"
        )
    _refuse_pickles(folder)


def _refuse_pickles(folder: Path) -> None:
    pickles = sorted(folder.glob("*.bin"))
    if pickles and not any(folder.glob("*.safetensors")):
        raise OSError(
            f"{folder}: {pickles[0].name} is pickled and could run any code, so it is not read; if "
            "you trust whoever made it, convert it: load the model with from_pretrained, then "
            "save_pretrained writes safetensors"
        )


def _refuse_gguf_base(path: str) -> NoReturn:
    raise ValueError(
        f"{path}: an adapter's base is a model folder; convert the GGUF file first with "
        "rlhf.models.loading.save_policy, as data/smollm2.py does, or give lora.rank 0"
    )


def _refuse_no_head(path: str) -> NoReturn:
    raise ValueError(
        f"{path} has no reward head ({HEAD}), so its scores would be random; give the folder that "
        "the rm stage wrote"
    )


def _refuse_missing(path: str, report: dict[str, Any], allowed: Sequence[str]) -> None:
    missing = sorted(set(report["missing_keys"]) - set(allowed))
    mismatched = sorted({entry[0] for entry in report["mismatched_keys"]} - set(allowed))
    if HEAD in missing:
        _refuse_no_head(path)
    if missing or mismatched:
        raise ValueError(
            f"{path} does not hold these weights in the right shape: "
            f"{', '.join(sorted({*missing, *mismatched})[:5])}; the folder is incomplete or of "
            "another model"
        )
