"""Causal language models: loaded once, adapters on one shared frozen base, saved in the formats of their libraries."""

from __future__ import annotations

import copy
import hashlib
import inspect
import json
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from cads.errors import ConfigError, DataError

log = logging.getLogger(__name__)

Dtype = Literal["float32", "bfloat16", "float16"]
WEIGHTS = ("*.safetensors", "*.bin", "*.index.json")
"""Files that hold weights; a folder without any describes a model that begins with random ones."""
PROBES, PROBE_BYTES = 64, 2**16
"""Pieces of each file of weights that its digest reads, the first and the last among them, and their length."""
BASE_SEED = 0
"""Of a frozen base with random weights: all adapters stand on the same one."""


def load_tokenizer(
    name: str,
    *,
    trust_remote_code: bool,
    pad_token: str | None = None,
    spare_pad: str | None = None,
    field: str = "pad_token",
) -> Any:
    """A tokenizer that can mark answers and fill up batches.

    Args:
        pad_token: to fill up with; None: what the tokenizer names, or else `spare_pad`, if it is one of its tokens.
        field: what `pad_token` is called where it is set.

    Raises:
        ConfigError: if it cannot be loaded, says no offsets, or has no token to pad with.
    """
    from transformers import AutoTokenizer

    with _loading("tokenizer", name):
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    if not tokenizer.is_fast:
        raise ConfigError(
            f"the tokenizer {name!r} is a slow one, which cannot say where its tokens stand: use a fast one"
        )
    if pad_token is not None and not _has_token(tokenizer, pad_token):
        raise ConfigError(f"{field} = {pad_token!r} is no token of {name!r}: name one that is, such as its end token")
    if pad_token is None and tokenizer.pad_token_id is None and spare_pad and _has_token(tokenizer, spare_pad):
        pad_token = spare_pad
    if pad_token is not None:
        tokenizer.pad_token = pad_token
    if tokenizer.pad_token_id is None:
        raise ConfigError(
            f"the tokenizer {name!r} has no pad token: set {field} to one of its tokens, such as "
            f"{tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)!r}; it is masked, and never learned"
        )
    return tokenizer


def _has_token(tokenizer: Any, token: str) -> bool:
    # What is no token stands for the unknown one, which itself is one.
    found = tokenizer.convert_tokens_to_ids(token)
    return found is not None and (found != tokenizer.unk_token_id or token == tokenizer.unk_token)


@dataclass
class LanguageModels:
    """Every model of a task: the same architecture, and weights by seed.

    With adapters, all models share the parameters of one frozen base: the same objects, in memory once.

    Attributes:
        name: of the model on the hub, or its folder. A folder with a config and no weights begins with random ones.
        trust_remote_code: whether code of the model's repository may run.
        dtype: of the weights. attention: transformers' `attn_implementation`; None: its default.
        checkpointing: whether layers are recomputed in the backward pass.
        peft: the fields of a PEFT configuration, `type` among them; None: all weights are trained.
        peft_field: what `peft` is called where it is set.

    Raises:
        ConfigError: if there is no such model, it needs code that may not run, or adapters do not fit it.
    """

    name: str
    trust_remote_code: bool = False
    dtype: Dtype = "float32"
    attention: str | None = None
    checkpointing: bool = False
    peft: Mapping[str, Any] | None = None
    peft_field: str = "peft"
    config: Any = field(init=False, repr=False)

    def __post_init__(self) -> None:
        from transformers import AutoConfig

        with _loading("model", self.name):
            self.config = AutoConfig.from_pretrained(self.name, trust_remote_code=self.trust_remote_code)
        self.config.use_cache = False
        self._check_adapters()

    @property
    def context(self) -> int | None:
        """Longest sequence the model can read, if its config says so."""
        for name in ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"):
            if isinstance(value := getattr(self.config, name, None), int):
                return value
        return None

    @property
    def random(self) -> bool:
        """Whether there are no weights to begin with."""
        folder = Path(self.name)
        return folder.is_dir() and not any(True for pattern in WEIGHTS for _ in folder.glob(pattern))

    @cached_property
    def digest(self) -> str:
        """What the models begin with: a hash of the configuration and of the weights in a folder, or the hub's commit.

        Of large files pieces at even distances are read: other weights of the same architecture differ everywhere.
        """
        about = self.config.to_diff_dict()
        for elsewhere in ("transformers_version", "_name_or_path"):
            about.pop(elsewhere, None)
        digest = hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode())
        folder = Path(self.name)
        for file in sorted(f for pattern in WEIGHTS for f in folder.glob(pattern)) if folder.is_dir() else ():
            size = file.stat().st_size
            digest.update(f"{file.name}\0{size}\0".encode())
            with file.open("rb") as opened:
                for i in range(PROBES):
                    opened.seek(max(0, size - PROBE_BYTES) * i // (PROBES - 1))
                    digest.update(opened.read(PROBE_BYTES))
        digest.update(str(getattr(self.config, "_commit_hash", None)).encode())
        return digest.hexdigest()

    def build(self, seed: int) -> nn.Module:
        """A fresh model on the CPU; the seed is that of everything that begins at random."""
        with torch.random.fork_rng(devices=[]):
            if self.peft is not None:
                model = self._adapted(_sharing(self.base), seed)
            elif self.random:
                torch.default_generator.manual_seed(seed)
                model = self._from_config(self.attention)
            else:
                model = copy.deepcopy(self.base)
        return self._finished(model)

    def on_meta(self) -> nn.Module:
        """The model without weights, with eager attention, whose masks can be given."""
        with torch.device("meta"), torch.random.fork_rng(devices=[]):
            model = self._from_config("eager")
            if self.peft is not None:
                model = self._adapted(model.requires_grad_(False), 0)
        return self._finished(model)

    @cached_property
    def base(self) -> nn.Module:
        """The weights that every model begins with; frozen if there are adapters."""
        from transformers import AutoModelForCausalLM

        if self.random:
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(BASE_SEED)
                model = self._from_config(self.attention)
        else:
            options = {} if self.attention is None else {"attn_implementation": self.attention}
            with _loading("model", self.name):
                model = AutoModelForCausalLM.from_pretrained(
                    self.name,
                    config=copy.deepcopy(self.config),
                    dtype=getattr(torch, self.dtype),
                    trust_remote_code=self.trust_remote_code,
                    **options,
                )
        return model.requires_grad_(self.peft is None)

    @cached_property
    def base_size(self) -> int:
        """Parameters without adapters."""
        with torch.device("meta"):
            return sum(p.numel() for p in self._from_config("eager").parameters())

    def save(self, model: nn.Module, folder: Path, tokenizer: Any, *, merge: bool = False) -> None:
        """Write a trained model: an adapter in PEFT's format, or a folder for `from_pretrained`; safetensors.

        Args:
            merge: write the adapter into the base's weights, as one model.

        Raises:
            ConfigError: if there is nothing to merge.
        """
        saved: Any = model
        if merge:
            if not hasattr(model, "merge_and_unload"):
                raise ConfigError("merge = true: this model has no adapter that can be merged into its base")
            # Merging writes into the base, which other models share.
            saved = copy.deepcopy(saved).merge_and_unload()
        saved.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    def _from_config(self, attention: str | None) -> Any:
        from transformers import AutoModelForCausalLM

        options: dict[str, Any] = {} if attention is None else {"attn_implementation": attention}
        with _loading("model", self.name):
            return AutoModelForCausalLM.from_config(
                copy.deepcopy(self.config),
                dtype=getattr(torch, self.dtype),
                trust_remote_code=self.trust_remote_code,
                **options,
            )

    def _finished(self, model: Any) -> nn.Module:
        if self.checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        head = model.get_output_embeddings()
        if head is not None:
            head.register_forward_pre_hook(_keep_answers)
        return model

    def _adapted(self, base: nn.Module, seed: int) -> nn.Module:
        import peft

        before = [(p.data_ptr(), p._version) for p in base.parameters()]
        frozen = list(base.parameters())
        torch.default_generator.manual_seed(seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on what adapters are good for, and on names that will change
            try:
                model = peft.get_peft_model(base, self._peft_config())
            except (ValueError, TypeError, AttributeError, KeyError) as error:
                raise ConfigError(
                    f"the adapters {dict(self.peft or {})} do not fit {self.name}: {error}; change "
                    f"{self.peft_field}: its linear layers are called {_linear_names(base)}"
                ) from error
        if [(p.data_ptr(), p._version) for p in frozen] != before:
            raise ConfigError(
                f"the adapters {dict(self.peft or {})} change the weights they stand on, which all models share: "
                "choose an initialisation that leaves them alone"
            )
        return model

    def _peft_config(self) -> Any:
        import peft

        options = dict(self.peft or {})
        kind = str(options.pop("type", "")).upper()
        found = getattr(peft, "PEFT_TYPE_TO_CONFIG_MAPPING", None) or peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING
        if kind not in {str(k.value) for k in found}:
            raise ConfigError(
                f"{self.peft_field} type = {kind.lower()!r}: choose from {sorted(str(k.value).lower() for k in found)}"
            )
        chosen = found[peft.PeftType(kind)]
        unknown = sorted(set(options) - set(inspect.signature(chosen).parameters))
        if unknown:
            raise ConfigError(f"{self.peft_field} has no options {unknown} for type {kind.lower()!r}")
        return chosen(task_type="CAUSAL_LM", **{k: v for k, v in options.items() if k != "task_type"})

    def _check_adapters(self) -> None:
        """Try the adapters on the meta device, before weights are loaded."""
        if self.peft is None:
            return
        with torch.device("meta"), torch.random.fork_rng(devices=[]):
            model = self._adapted(self._from_config("eager").requires_grad_(False), 0)
        if not any(p.requires_grad for p in model.parameters()):
            raise ConfigError(f"the adapters {dict(self.peft)} train nothing: choose target_modules")


def embedding_rows(config: Any) -> int | None:
    """Tokens that the embedding of a model has a vector for."""
    return getattr(config, "vocab_size", None)


def _sharing(base: nn.Module) -> nn.Module:
    """A copy whose modules are its own and whose parameters and buffers are those of `base`, not copies of them."""
    shared = {id(x): x for x in (*base.parameters(), *base.buffers())}
    return copy.deepcopy(base, shared)


def _linear_names(model: nn.Module) -> list[str]:
    kinds = {type(m).__name__ for m in model.modules()} & {"Linear", "Conv1D"}
    return sorted({name.rsplit(".", 1)[-1] for name, m in model.named_modules() if type(m).__name__ in kinds})


@contextmanager
def _loading(what: str, name: str) -> Iterator[None]:
    from transformers.utils import logging as reports

    # A folder is read in seconds: a bar for it would stand in the middle of what the command says.
    shown = Path(name).is_dir() and reports.is_progress_bar_enabled()
    if shown:
        reports.disable_progress_bar()
    try:
        yield
    except (OSError, ValueError, KeyError, ImportError, json.JSONDecodeError) as error:
        if "trust_remote_code" in str(error):
            raise ConfigError(
                f"the {what} {name!r} comes with code of its own, which is not run: set trust_remote_code: true if you "
                "trust it, or use another model"
            ) from error
        raise ConfigError(f"the {what} {name!r} cannot be loaded: {error}") from error
    finally:
        if shown:
            reports.enable_progress_bar()


class Kept:
    """Where the output head computes during one call of a model.

    Attributes:
        places: into the flattened positions of the call, shape (B, A).
        shape: rows and positions of the call.
        used: whether the head was reached in a form where it could be restricted.
    """

    def __init__(self, places: Tensor, shape: tuple[int, int]) -> None:
        self.places, self.shape, self.used = places, shape, False


_kept: ContextVar[Kept | None] = ContextVar("kept", default=None)


def _keep_answers(head: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """Forward pre-hook of an output head: of the hidden states (R, T, D), those that are asked for, (B, A, D)."""
    kept = _kept.get()
    if kept is None or not args or args[0].dim() != 3 or tuple(args[0].shape[:2]) != kept.shape:
        return None
    kept.used = True
    return (args[0].flatten(0, 1)[kept.places], *args[1:])


def answer_logits(model: Any, inputs: Mapping[str, Tensor], places: Tensor) -> Tensor:
    """Logits of a causal language model at `places` alone (B, A), into the flattened positions; (B, A, V).

    The head computes nothing else. Whatever a model does to its logits it still does; where its head is
    not found, all logits are computed and the others dropped: the same numbers at a higher cost.
    """
    rows, length = inputs["input_ids"].shape
    kept = Kept(places, (rows, length))
    token = _kept.set(kept)
    try:
        logits: Tensor = model(**inputs).logits
    finally:
        _kept.reset(token)
    if kept.used:
        return logits
    if logits.dim() != 3 or logits.shape[1] < length:
        raise DataError(f"the model gives logits of shape {tuple(logits.shape)} for {rows} x {length} tokens")
    # Prompt tuning puts virtual tokens in front.
    return logits[:, -length:].flatten(0, 1)[places]


def last_hidden(model: Any, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """What the head of a causal language model reads, (B, T, D); logits are computed at one position, and dropped."""
    rows, length = input_ids.shape
    token = _kept.set(Kept(torch.zeros(rows, 1, dtype=torch.int64, device=input_ids.device), (rows, length)))
    try:
        output = model(input_ids=input_ids, attention_mask=attention_mask, output_hidden_states=True)
    finally:
        _kept.reset(token)
    # Prompt tuning puts virtual tokens in front.
    hidden: Tensor = output.hidden_states[-1][:, -length:]
    return hidden
