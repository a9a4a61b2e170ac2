"""Causal language models: loaded once, adapters on one shared frozen base, saved in the formats of their libraries."""

from __future__ import annotations

import copy
import hashlib
import inspect
import json
import logging
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from cads.accounting.hollow import computed_tensors
from cads.errors import CheckpointError, ConfigError
from cads.runtime.atomic_files import files_into
from cads.tasks.language.loading import loading, without_progress_bar
from cads.tasks.language.output_head import restrict_head
from cads.tasks.language.tied_weights import embeddings_tied, tie_equal, untie

log = logging.getLogger(__name__)

Dtype = Literal["float32", "bfloat16", "float16"]
WEIGHTS = ("*.safetensors", "*.bin", "*.index.json")
"""Files that hold weights. A folder without any describes a model with random initial weights."""
PROBES, PROBE_BYTES = 64, 2**16
"""Number and bytes of the pieces of each weight file that its digest reads; they include the first and last bytes."""
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
"""The files of an adapter in PEFT's format."""
ADAPTER_FILES, MODEL_FILES = ("adapter_*",), ("model*.safetensors", "model.safetensors.index.json")
"""Files that tell an adapter or a whole model from the other: a folder with both would be loaded as neither."""
WRITTEN = "model"
"""Name of what is written, from which a run knows what a killed process has left of it, and removes that."""
MERGE_TOLERANCE = {"float32": 2e-3, "float16": 2e-2, "bfloat16": 5e-2}
"""Largest mean difference between the losses under a merged model and under the trained one, by the type of the
weights: nats, or share of the loss where that is above 1 nat. It leaves room for rounding of merged weights."""
CORRECTED = "fan_in_fan_out is set to"
"""How a warning of PEFT begins about an option that it sets right by itself."""
MERGE_ERRORS = (ValueError, TypeError, AttributeError, KeyError, RuntimeError, NotImplementedError)
"""What PEFT raises where adapters cannot be merged."""
BASE_SEED = 0
"""Seed of a frozen base with random weights; all adapters share this base."""


@dataclass
class LanguageModels:
    """Builds the models of a task: all of one architecture, with weights by seed.

    With adapters, all models share the parameters of one frozen base, which is in memory once.

    Attributes:
        name: of the model on the hub, or its folder. A folder with a config and no weights gives random weights.
        trust_remote_code: whether code of the model's repository may run.
        dtype: of the weights. attention: transformers' `attn_implementation`; None: its default.
        checkpointing: whether layers are recomputed in the backward pass.
        peft: the fields of a PEFT configuration, `type` among them; None: all weights are trained.
        peft_field: name of the setting of `peft`, for messages.

    Raises:
        ConfigError: if there is no such model, it needs code that may not run, or the adapters do not fit it.
    """

    name: str
    trust_remote_code: bool = False
    dtype: Dtype = "float32"
    attention: str | None = None
    checkpointing: bool = False
    peft: Mapping[str, Any] | None = None
    peft_field: str = "peft"
    config: Any = field(init=False, repr=False)
    _said: set[str] = field(init=False, repr=False, default_factory=set)

    def __post_init__(self) -> None:
        from transformers import AutoConfig

        with loading("model", self.name):
            self.config = AutoConfig.from_pretrained(self.name, trust_remote_code=self.trust_remote_code)
        self.config.use_cache = False
        self._check_adapters()

    @property
    def context(self) -> int | None:
        """Longest sequence that the model can read, or None if its config does not tell."""
        for name in ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"):
            if isinstance(value := getattr(self.config, name, None), int):
                return value
        return None

    @cached_property
    def needs_mask(self) -> bool:
        """Whether padding at the end must be masked: attention looks ahead, or adapters put tokens in front."""
        looks_ahead = not getattr(self.config, "is_causal", True) or getattr(
            self.config, "use_bidirectional_attention", False
        )
        return bool(looks_ahead) or (self.peft is not None and bool(self._peft_config().is_prompt_learning))

    @property
    def random(self) -> bool:
        """Whether the initial weights are random."""
        folder = Path(self.name)
        return folder.is_dir() and not any(True for pattern in WEIGHTS for _ in folder.glob(pattern))

    @cached_property
    def digest(self) -> str:
        """Hash of the model before training: of its config, and of the weights in a folder or the hub's commit.

        Of large files only pieces at even distances are read: other weights of the same architecture differ in every
        piece.
        """
        config = self.config.to_diff_dict()
        for key in ("transformers_version", "_name_or_path"):
            config.pop(key, None)
        digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
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
        """A fresh model on the CPU; the seed is that of all random initial weights."""
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
        """The model without weights, with eager attention, which accepts a given mask."""
        with torch.device("meta"), torch.random.fork_rng(devices=[]):
            model = self._from_config("eager")
            if self.peft is not None:
                model = self._adapted(model.requires_grad_(False), 0)
        return self._finished(model)

    @cached_property
    def base(self) -> nn.Module:
        """The model with the initial weights of all models; frozen if there are adapters."""
        from transformers import AutoModelForCausalLM

        if self.random:
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(BASE_SEED)
                model = self._from_config(self.attention)
        else:
            options = {} if self.attention is None else {"attn_implementation": self.attention}
            with loading("model", self.name):
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

    def save(self, model: nn.Module, folder: Path, tokenizer: Any) -> None:
        """Write a trained model: an adapter in PEFT's format, or a folder for `from_pretrained`; safetensors."""
        stale = MODEL_FILES if self.peft is not None else ADAPTER_FILES
        written: Any = model
        with files_into(folder, WRITTEN, replaced=stale) as partial:
            with warnings.catch_warnings(), without_progress_bar():
                # PEFT says that it writes the embedding beside adapters that stand on it.
                warnings.filterwarnings("ignore", message=".*save_embedding_layers.*")
                written.save_pretrained(partial)
            tokenizer.save_pretrained(partial)

    def save_merged(
        self, model: nn.Module, folder: Path, tokenizer: Any, losses: Callable[[nn.Module], np.ndarray]
    ) -> None:
        """Merge the adapter into its base, and write one model, if that is the trained one.

        Embeddings that are tied in the base are written untied where adapters have made them differ.

        Args:
            losses: of some examples under a model, nats, shape (N,): those under the written model, which is loaded
                for it, must equal those under `model`.

        Raises:
            CheckpointError: if the adapter cannot be merged, or the losses differ; then nothing is written.
        """
        expected = losses(model)
        with files_into(folder, WRITTEN, replaced=ADAPTER_FILES) as partial:
            merged = self._merged(model)
            if embeddings_tied(self.base) and not embeddings_tied(merged):
                log.info(
                    "the adapters have made the embedding of %s and its output head differ: they are written untied, "
                    "each with its own weights",
                    self.name,
                )
            with without_progress_bar():
                merged.save_pretrained(partial)
            del merged
            tokenizer.save_pretrained(partial)
            device = next(model.parameters()).device
            self._check_written(losses(self._finished(self._from_folder(partial)).to(device)), expected)

    def load(self, folder: Path) -> nn.Module:
        """The trained model that `save` or `save_merged` wrote, on the CPU.

        Raises:
            CheckpointError: if there is none, or it is of another model.
        """
        try:
            if not (folder / ADAPTER_CONFIG).exists():
                return self._finished(self._from_folder(folder))
            if self.peft is None:
                raise CheckpointError("it holds an adapter, and the task has none")
            return self._with_adapter(load_file(folder / ADAPTER_WEIGHTS))
        except (CheckpointError, ConfigError, OSError, SafetensorError, RuntimeError, KeyError) as error:
            raise CheckpointError(
                f"the model in {folder} cannot be loaded ({error}): train it anew with --overwrite true"
            ) from error

    def check_mergeable(self) -> None:
        """Refuse adapters that cannot be merged, before anything is trained; tried on the meta device.

        Raises:
            ConfigError: with the reason.
        """
        model: Any = self.on_meta()
        if not hasattr(model, "merge_and_unload"):
            raise ConfigError(
                f"merge = true: adapters of {self.peft_field} type = {self._adapter_type!r} are no change of weights, "
                "and cannot be merged: leave merge out"
            )
        try:
            with torch.device("meta"):
                self._merged(model)
        except CheckpointError as error:
            # Some adapters read their weights in order to merge, and the meta device has none: then it cannot tell.
            if "meta" not in str(error.__cause__):
                raise ConfigError(f"merge = true: {error}") from error

    @property
    def _adapter_type(self) -> str:
        return str((self.peft or {}).get("type", "")).lower()

    def _merged(self, model: nn.Module) -> Any:
        """A copy of the base with the adapters of `model` merged into it.

        Raises:
            CheckpointError: if PEFT cannot merge them.
        """
        # Merging changes the base, which other models share, so it is done on a copy.
        adapted: Any = copy.deepcopy(model, computed_tensors(model))
        tied = untie(adapted)
        try:
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                merged = adapted.merge_and_unload()
        except MERGE_ERRORS as error:
            raise CheckpointError(
                f"the adapters {dict(self.peft or {})} cannot be merged: {error}; give merge = false, which writes "
                "the adapter"
            ) from error
        for text in _texts(said):
            # Tied embeddings are untied here.
            if not re.search(r"\btied?\b|tie_word_embeddings", text):
                log.warning("PEFT, on merging %s: %s", self._adapter_type, text)
        tie_equal(tied, merged)
        for config in (merged.config, merged.config.get_text_config()):
            config.tie_word_embeddings = embeddings_tied(merged)
        merged.all_tied_weights_keys = merged.get_expanded_tied_weights_keys(all_submodels=True)
        return merged

    def _check_written(self, losses: np.ndarray, expected: np.ndarray) -> None:
        difference, size = float(np.abs(losses - expected).mean()), max(1.0, float(np.abs(expected).mean()))
        # NaN is no equality either.
        if not difference <= MERGE_TOLERANCE[self.dtype] * size:
            remedy = "" if self.dtype == "float32" else f"; or dtype = float32: {self.dtype} may round the change away"
            raise CheckpointError(
                f"the merged model has loss {losses.mean():.4g} on {len(losses)} test examples, and the trained one "
                f"{expected.mean():.4g} (mean difference {difference:.2g}): it is not written; give merge = false, "
                f"which writes the adapter of this training{remedy}"
            )

    def _from_folder(self, folder: Path) -> Any:
        from transformers import AutoModelForCausalLM

        options = {} if self.attention is None else {"attn_implementation": self.attention}
        with loading("model", str(folder)):
            model = AutoModelForCausalLM.from_pretrained(
                folder, dtype=getattr(torch, self.dtype), trust_remote_code=self.trust_remote_code, **options
            )
        model.config.use_cache = False
        return model

    def _with_adapter(self, weights: dict[str, Tensor]) -> nn.Module:
        """A model with the `weights` of an adapter that was written."""
        import peft

        model: nn.Module = self.build(BASE_SEED)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*save_embedding_layers.*")
            names = set(peft.get_peft_model_state_dict(model))
        if other := sorted(names ^ set(weights)):
            raise CheckpointError(f"its adapter and that of the task differ in {other[:3]}")
        peft.set_peft_model_state_dict(model, weights)
        return model

    def _from_config(self, attention: str | None) -> Any:
        from transformers import AutoModelForCausalLM

        options: dict[str, Any] = {} if attention is None else {"attn_implementation": attention}
        with loading("model", self.name):
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
            head.register_forward_pre_hook(restrict_head)
        return model

    def _adapted(self, base: nn.Module, seed: int) -> nn.Module:
        import peft

        versions_before = [(p.data_ptr(), p._version) for p in base.parameters()]
        frozen = list(base.parameters())
        torch.default_generator.manual_seed(seed)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            try:
                model = peft.get_peft_model(base, self._peft_config())
            except (ValueError, TypeError, AttributeError, KeyError) as error:
                raise ConfigError(
                    f"the adapters {dict(self.peft or {})} do not fit {self.name}: {error}; change "
                    f"{self.peft_field}: its linear layers are called {_linear_names(base)}"
                ) from error
        self._say_once(_texts(said))
        if [(p.data_ptr(), p._version) for p in frozen] != versions_before:
            raise ConfigError(
                f"the adapters {dict(self.peft or {})} change the weights they stand on, which all models share: "
                "choose an initialisation that leaves them alone"
            )
        return model

    def _say_once(self, texts: list[str]) -> None:
        """Log what PEFT has said of the adapters; all models of this object have the same ones."""
        for text in texts:
            if text not in self._said:
                self._said.add(text)
                log.warning("PEFT, on the adapters of %s: %s", self.name, text)

    def _peft_config(self) -> Any:
        import peft

        options = dict(self.peft or {})
        kind = str(options.pop("type", "")).upper()
        config_classes = getattr(peft, "PEFT_TYPE_TO_CONFIG_MAPPING", None) or peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING
        if kind not in {str(k.value) for k in config_classes}:
            raise ConfigError(
                f"{self.peft_field} type = {kind.lower()!r}: choose from "
                f"{sorted(str(k.value).lower() for k in config_classes)}"
            )
        config_class = config_classes[peft.PeftType(kind)]
        unknown = sorted(set(options) - set(inspect.signature(config_class).parameters))
        if unknown:
            raise ConfigError(f"{self.peft_field} has no options {unknown} for type {kind.lower()!r}")
        return config_class(task_type="CAUSAL_LM", **{k: v for k, v in options.items() if k != "task_type"})

    def _check_adapters(self) -> None:
        """Try the adapters on the meta device, before weights are loaded."""
        if self.peft is None:
            return
        with torch.device("meta"), torch.random.fork_rng(devices=[]):
            model = self._adapted(self._from_config("eager").requires_grad_(False), 0)
        if not any(p.requires_grad for p in model.parameters()):
            raise ConfigError(f"the adapters {dict(self.peft)} train nothing: choose target_modules")


def embedding_rows(config: Any) -> int | None:
    """Rows of the embedding of a model, or None if its config does not tell."""
    return getattr(config, "vocab_size", None)


def _sharing(base: nn.Module) -> nn.Module:
    """A copy of the modules of `base` that shares its parameters and buffers."""
    shared = {id(x): x for x in (*base.parameters(), *base.buffers())}
    return copy.deepcopy(base, shared)


def _linear_names(model: nn.Module) -> list[str]:
    kinds = {type(m).__name__ for m in model.modules()} & {"Linear", "Conv1D"}
    return sorted({name.rsplit(".", 1)[-1] for name, m in model.named_modules() if type(m).__name__ in kinds})


def _texts(said: list[warnings.WarningMessage]) -> list[str]:
    """The texts of warnings that a user can act on, each once, on one line."""
    kinds = (DeprecationWarning, PendingDeprecationWarning, FutureWarning)
    texts = [" ".join(str(w.message).split()) for w in said if not issubclass(w.category, kinds)]
    return [text for text in dict.fromkeys(texts) if not text.startswith(CORRECTED)]
