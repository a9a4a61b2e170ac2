"""Dense transformers whose cost has a closed form: the name and shape of each linear layer, read from a config."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from cads.errors import ConfigError

Head = Literal["lm", "masked-lm", "classifier", "none"]
Positions = Literal["all", "answer", "first"]


@dataclass(frozen=True)
class Linear:
    """A matrix product with a weight of shape (n_out, n_in).

    Attributes:
        name: its path in the model, as PEFT matches it; `{i}` stands for the index of the layer.
        n_in, n_out: input and output width.
        bias: whether a bias is added.
        positions: where it is applied: "all" T positions; "answer" positions, if the caller restricts the head to
            them, otherwise all; or the "first" position of the sequence.
        in_loss: whether the loss depends on it.
    """

    name: str
    n_in: int
    n_out: int
    bias: bool = False
    positions: Positions = "all"
    in_loss: bool = True

    @property
    def n_parameters(self) -> int:
        """Number of entries of weight and bias."""
        return self.n_out * (self.n_in + self.bias)

    def of(self, layer: int) -> Linear:
        """This linear with the index of a given layer in its name."""
        return replace(self, name=self.name.format(i=layer))


@dataclass(frozen=True)
class Architecture:
    """A dense transformer: L layers of width h, H query heads and H_kv key and value heads of width d.

    Attributes:
        family: the `model_type` of the config.
        hidden, layers, heads, kv_heads, head_dim, intermediate: h, L, H, H_kv, d and the width I of the MLP.
        gated: whether the MLP multiplies two projections.
        vocabulary: V, its size.
        tied: whether the head shares its weight with the token embedding.
        head: "lm" or "masked-lm" (V logits), "classifier", or "none" (hidden states).
        attention_in: one linear for query, key and value together, or one each, in this order.
        attention_out, mlp_in, mlp_out, head_linears: the other linears, in the order of execution.
        embedding_names: paths of the embedding tables.
        n_embedding, n_norm: number of parameters of the embedding tables, and of all normalisations.
        max_positions: length of the learned position table; None for rotary positions.
        tail_saves: whether an operation after `mlp_out` in its layer (dropout, a norm) saves a tensor for the backward
            pass, so that recomputation has to run to the end of the layer.
    """

    family: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    gated: bool
    vocabulary: int
    tied: bool
    head: Head
    attention_in: tuple[Linear, ...]
    attention_out: Linear
    mlp_in: tuple[Linear, ...]
    mlp_out: Linear
    head_linears: tuple[Linear, ...]
    embedding_names: tuple[str, ...]
    n_embedding: int
    n_norm: int
    max_positions: int | None
    tail_saves: bool

    @property
    def n_parameters(self) -> dict[str, int]:
        """Number of parameters by part: embedding, attention, mlp, norm, head (without a tied weight)."""
        head = sum(x.n_parameters for x in self.head_linears)
        if self.tied and self.head in ("lm", "masked-lm"):
            head -= self.hidden * self.vocabulary
        attention = sum(x.n_parameters for x in (*self.attention_in, self.attention_out))
        mlp = sum(x.n_parameters for x in (*self.mlp_in, self.mlp_out))
        return {
            "embedding": self.n_embedding,
            "attention": self.layers * attention,
            "mlp": self.layers * mlp,
            "norm": self.n_norm,
            "head": head,
        }

    @property
    def linears(self) -> tuple[Linear, ...]:
        """Every linear of the model, by its full path."""
        block = (*self.attention_in, self.attention_out, *self.mlp_in, self.mlp_out)
        return tuple(x.of(i) for i in range(self.layers) for x in block) + self.head_linears


def head_kind(config: Any) -> Head:
    """The head that `config.architectures` names; by default a language-model head, of BERT a masked one."""
    name = (getattr(config, "architectures", None) or [""])[0]
    if "SequenceClassification" in name:
        return "classifier"
    if name.endswith("Model") and not name.endswith("LMHeadModel"):
        return "none"
    return "masked-lm" if "MaskedLM" in name or (not name and config.model_type == "bert") else "lm"


def from_config(config: Any, head: Head | None = None) -> Architecture:
    """Read a transformers config.

    Args:
        config: a `PretrainedConfig` of Llama, Qwen2, Qwen3, GPT-2 or BERT.
        head: the head on top of the model; by default the one that `config.architectures` names.

    Raises:
        ConfigError: if the model has no closed form; `measured` accounting runs any model.
    """
    head = head or head_kind(config)
    family = getattr(config, "model_type", None)
    if family not in READERS:
        raise ConfigError(
            f"no closed form for the architecture {family!r} (known: {', '.join(READERS)}): "
            "its cost falls back to `measured` accounting"
        )
    allowed = ("masked-lm", "classifier", "none") if family == "bert" else ("lm", "classifier", "none")
    if head not in allowed:
        raise ConfigError(f"head = {head!r}: {family} has one of {allowed}, choose from {get_args(Head)}")
    if getattr(config, "add_cross_attention", False):
        raise ConfigError(f"{family} with cross-attention has no closed form: it falls back to `measured`")
    if config.hidden_size < 1 or config.num_hidden_layers < 1 or config.num_attention_heads < 1:
        raise ConfigError(f"a {family} needs at least one layer, head and hidden unit: {config}")
    return READERS[family](config, head)


def read_config(path: Path | str) -> Any:
    """A transformers config from a JSON file that names its `model_type`.

    Raises:
        ConfigError: if the file is missing, is no JSON object, or its `model_type` is unknown to transformers.
    """
    from transformers import AutoConfig

    try:
        fields = json.loads(Path(path).read_text())
        return AutoConfig.for_model(fields.pop("model_type"), **fields)
    except OSError as error:
        raise ConfigError(f"model config {path} cannot be read: {error}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"model config {path} must be a JSON object with a model_type of transformers: {error!r}"
        ) from error


def _gated_decoder(config: Any, head: Head) -> Architecture:
    """Llama, Qwen2 or Qwen3. They differ in biases, and Qwen3 normalises query and key."""
    h, heads, intermediate = config.hidden_size, config.num_attention_heads, config.intermediate_size
    kv = getattr(config, "num_key_value_heads", None) or heads
    d = getattr(config, "head_dim", None) or h // heads
    bias = getattr(config, "attention_bias", False)
    input_bias = True if config.model_type == "qwen2" else bias
    mlp_bias = getattr(config, "mlp_bias", False)
    layer = "model.layers.{i}."
    qk_norm = 2 * d if config.model_type == "qwen3" else 0
    heads_by_kind: dict[str, tuple[Linear, ...]] = {
        "lm": (Linear("lm_head", h, config.vocab_size, positions="answer"),),
        "classifier": (Linear("score", h, config.num_labels),),
    }
    return Architecture(
        family=config.model_type,
        hidden=h,
        layers=config.num_hidden_layers,
        heads=heads,
        kv_heads=kv,
        head_dim=d,
        intermediate=intermediate,
        gated=True,
        vocabulary=config.vocab_size,
        tied=bool(config.tie_word_embeddings),
        head=head,
        attention_in=(
            Linear(layer + "self_attn.q_proj", h, heads * d, input_bias),
            Linear(layer + "self_attn.k_proj", h, kv * d, input_bias),
            Linear(layer + "self_attn.v_proj", h, kv * d, input_bias),
        ),
        attention_out=Linear(layer + "self_attn.o_proj", heads * d, h, bias),
        mlp_in=(
            Linear(layer + "mlp.gate_proj", h, intermediate, mlp_bias),
            Linear(layer + "mlp.up_proj", h, intermediate, mlp_bias),
        ),
        mlp_out=Linear(layer + "mlp.down_proj", intermediate, h, mlp_bias),
        head_linears=heads_by_kind.get(head, ()),
        embedding_names=("model.embed_tokens",),
        n_embedding=config.vocab_size * h,
        n_norm=config.num_hidden_layers * (2 * h + qk_norm) + h,
        max_positions=None,
        tail_saves=False,
    )


def _gpt2(config: Any, head: Head) -> Architecture:
    h, layers = config.hidden_size, config.num_hidden_layers
    intermediate = config.n_inner or 4 * h
    layer = "transformer.h.{i}."
    heads_by_kind: dict[str, tuple[Linear, ...]] = {
        "lm": (Linear("lm_head", h, config.vocab_size, positions="answer"),),
        "classifier": (Linear("score", h, config.num_labels),),
    }
    return Architecture(
        family="gpt2",
        hidden=h,
        layers=layers,
        heads=config.num_attention_heads,
        kv_heads=config.num_attention_heads,
        head_dim=h // config.num_attention_heads,
        intermediate=intermediate,
        gated=False,
        vocabulary=config.vocab_size,
        tied=bool(config.tie_word_embeddings),
        head=head,
        attention_in=(Linear(layer + "attn.c_attn", h, 3 * h, bias=True),),
        attention_out=Linear(layer + "attn.c_proj", h, h, bias=True),
        mlp_in=(Linear(layer + "mlp.c_fc", h, intermediate, bias=True),),
        mlp_out=Linear(layer + "mlp.c_proj", intermediate, h, bias=True),
        head_linears=heads_by_kind.get(head, ()),
        embedding_names=("transformer.wte", "transformer.wpe"),
        n_embedding=(config.vocab_size + config.n_positions) * h,
        n_norm=layers * 4 * h + 2 * h,
        max_positions=config.n_positions,
        tail_saves=config.resid_pdrop > 0,
    )


def _bert(config: Any, head: Head) -> Architecture:
    h, layers, intermediate = config.hidden_size, config.num_hidden_layers, config.intermediate_size
    layer = "bert.encoder.layer.{i}."
    pooler = Linear("bert.pooler.dense", h, h, bias=True, positions="first")
    heads_by_kind: dict[str, tuple[Linear, ...]] = {
        "masked-lm": (
            Linear("cls.predictions.transform.dense", h, h, bias=True),
            Linear("cls.predictions.decoder", h, config.vocab_size, bias=True),
        ),
        "classifier": (pooler, Linear("classifier", h, config.num_labels, bias=True, positions="first")),
        "none": (replace(pooler, in_loss=False),),
    }
    tables = config.vocab_size + config.max_position_embeddings + config.type_vocab_size
    return Architecture(
        family="bert",
        hidden=h,
        layers=layers,
        heads=config.num_attention_heads,
        kv_heads=config.num_attention_heads,
        head_dim=h // config.num_attention_heads,
        intermediate=intermediate,
        gated=False,
        vocabulary=config.vocab_size,
        tied=bool(config.tie_word_embeddings),
        head=head,
        attention_in=tuple(
            Linear(f"{layer}attention.self.{name}", h, h, bias=True) for name in ("query", "key", "value")
        ),
        attention_out=Linear(layer + "attention.output.dense", h, h, bias=True),
        mlp_in=(Linear(layer + "intermediate.dense", h, intermediate, bias=True),),
        mlp_out=Linear(layer + "output.dense", intermediate, h, bias=True),
        head_linears=heads_by_kind[head],
        embedding_names=tuple(f"bert.embeddings.{x}_embeddings" for x in ("word", "position", "token_type")),
        n_embedding=tables * h,
        n_norm=(4 * layers + 2) * h + (2 * h if head == "masked-lm" else 0),
        max_positions=config.max_position_embeddings,
        tail_saves=True,
    )


READERS: dict[str, Callable[[Any, Head], Architecture]] = {
    "llama": _gated_decoder,
    "qwen2": _gated_decoder,
    "qwen3": _gated_decoder,
    "gpt2": _gpt2,
    "bert": _bert,
}
