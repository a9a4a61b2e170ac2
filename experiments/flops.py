"""Measured FLOPs against analytic FLOPs, for transformers and convolutional networks, without weights.

    python -m experiments.flops --out experiments/results/flops.md

Measured: `FlopCounterMode` on the meta device, eager attention. Analytic: closed forms of
`cads.accounting.closed_form`.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torchvision
import transformers
from torch import nn
from transformers import BertConfig, GPT2Config, LlamaConfig, Qwen2Config, Qwen3Config

from cads.accounting.architectures import from_config, read_config
from cads.accounting.closed_form import (
    AllWeights,
    Checkpointing,
    Flops,
    Frozen,
    Lora,
    Trainable,
    lora_parameters,
    module_flops,
    transformer_flops,
)
from cads.accounting.measured import attention_self_test, count_flops, measure
from cads.accounting.nominal import CCDS_TOKENS, ccds_parameters, selection_flops, training_flops
from cads.errors import CadsError
from cads.tasks.vision.networks import Network

TOLERANCE = 0.01
"""Relative difference that is allowed between measured and analytic FLOPs."""
LENGTHS = (64, 256, 1024, 2048)
"""Sequence lengths T."""
LORA_RANK = 128
MODELS = Path(__file__).parent / "configs" / "models"
PUBLISHED = {"llama-2-7b": 4.593e18, "llama-2-13b": 8.638e18, "llama-2-70b": 4.926e19}
"""FLOPs of training on the whole pool (CCDS)."""
PUBLISHED_SELECTION = {"ppl": 1.531e18, "less": 8.269e18}
"""FLOPs of ranking the pool with the 7B model (CCDS)."""

ATTENTION = {
    "gpt2": ("attn.c_attn", "attn.c_proj"),
    "bert": ("query", "key", "value", "attention.output.dense"),
}
"""Projections of attention that LoRA adapts, by model type, where they are not called as in `QKVO`."""
QKVO = ("q_proj", "k_proj", "v_proj", "o_proj")
MODES: dict[str, tuple[str, Checkpointing | None]] = {
    "forward": ("frozen", None),
    "full": ("full", None),
    "full, checkpointing": ("full", "non-reentrant"),
    "full, reentrant checkpointing": ("full", "reentrant"),
    "LoRA": ("lora", None),
    "LoRA, checkpointing": ("lora", "non-reentrant"),
    "LoRA, reentrant checkpointing": ("lora", "reentrant"),
    "LoRA on all linears": ("lora-all", None),
}
"""What is trained, and the kind of activation checkpointing, by the name of the mode in the table."""


@dataclass
class Row:
    """One comparison of measured and analytic FLOPs."""

    model: str
    mode: str
    shape: str
    measured: Flops
    analytic: Flops

    @property
    def difference(self) -> float:
        """The larger of the relative differences of the forward and of the whole FLOPs."""
        pairs = zip(self.analytic, self.measured, strict=True)
        return max(abs(a - m) / m for a, m in pairs)


def small_configs() -> dict[str, Any]:
    """Shapes of small published models, and Llama-2-7B."""
    return {
        "Llama (SmolLM2-135M)": LlamaConfig(
            hidden_size=576,
            num_hidden_layers=30,
            num_attention_heads=9,
            num_key_value_heads=3,
            intermediate_size=1536,
            vocab_size=49152,
            tie_word_embeddings=True,
        ),
        "GPT-2": GPT2Config(n_positions=max(LENGTHS)),
        "Qwen2 (0.5B)": Qwen2Config(
            hidden_size=896,
            num_hidden_layers=24,
            num_attention_heads=14,
            num_key_value_heads=2,
            intermediate_size=4864,
            vocab_size=151936,
            tie_word_embeddings=True,
        ),
        "Qwen3 (0.6B)": Qwen3Config(
            hidden_size=1024,
            num_hidden_layers=28,
            num_attention_heads=16,
            num_key_value_heads=8,
            head_dim=128,
            intermediate_size=3072,
            vocab_size=151936,
            tie_word_embeddings=True,
        ),
        "BERT": BertConfig(max_position_embeddings=max(LENGTHS)),
    }


def transformer_rows(lengths: tuple[int, ...], large: bool) -> Iterator[Row]:
    """Every mode at every length; if `large`, Llama-2-7B too, which takes longer, at the first and the last length."""
    for name, config in small_configs().items():
        for mode in MODES:
            for length in lengths:
                yield _transformer_row(name, config, mode, length)
    if large:
        config = read_config(MODELS / "llama-2-7b.json")
        for mode in MODES:
            for length in (lengths[0], lengths[-1]):
                yield _transformer_row("Llama-2-7B", config, mode, length)


def _transformer_row(name: str, config: Any, mode: str, length: int) -> Row:
    trained, checkpointing = MODES[mode]
    trainables: dict[str, Trainable] = {
        "frozen": Frozen(),
        "full": AllWeights(),
        "lora": Lora(LORA_RANK, ATTENTION.get(config.model_type, QKVO)),
        "lora-all": Lora(LORA_RANK, "all-linear"),
    }
    trainable = trainables[trained]
    measured = measure(config, (1, length), trainable=trainable, checkpointing=checkpointing)
    analytic = transformer_flops(from_config(config), length, trainable=trainable, checkpointing=checkpointing)
    return Row(name, mode, f"T = {length}", measured, analytic)


def image_rows() -> Iterator[Row]:
    """Convolutional networks and an MLP: forward pass only, all layers trained, only the last layer trained."""
    networks = {
        "ResNet-18": ("resnet18", (3, 224, 224)),
        "EfficientNet-B0": ("efficientnet_b0", (3, 224, 224)),
        "MLP": ("mlp", (1, 28, 28)),
        "CNN": ("cnn", (1, 28, 28)),
    }
    for name, (key, shape) in networks.items():
        network = Network(key)
        for mode, prepare in (("forward", _freeze_all), ("full", _train_all), ("last layer", _train_last)):

            def build(network: Network = network, prepare: Any = prepare, shape: Any = shape) -> nn.Module:
                return prepare(network.build(shape, 10))

            analytic = module_flops(build(), torch.zeros(2, *shape))
            yield Row(name, mode, f"2 images {shape}", measure(build, (2, *shape)), analytic)


def _train_all(model: nn.Module) -> nn.Module:
    return model


def _freeze_all(model: nn.Module) -> nn.Module:
    return model.requires_grad_(False)


def _train_last(model: nn.Module) -> nn.Module:
    linears = [m for m in model.requires_grad_(False).modules() if isinstance(m, nn.Linear)]
    linears[-1].requires_grad_(True)
    return model


def kernels() -> list[str]:
    """FLOPs counted for a small Llama trained on the CPU and on the meta device, with both attention kernels."""
    config = LlamaConfig(
        hidden_size=96,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        intermediate_size=200,
        vocab_size=500,
    )
    lines = ["| attention | device | FLOPs of forward+backward | closed form |", "|---|---|---:|---:|"]
    for attention in ("eager", "sdpa"):
        for device in ("cpu", "meta"):
            with torch.device(device):
                model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention)
                tokens = torch.zeros(2, 64, dtype=torch.long)
                mask = torch.ones(2, 1, 64, 64, dtype=torch.bool)

            def step(model: Any = model, tokens: Any = tokens, mask: Any = mask) -> None:
                model(input_ids=tokens, attention_mask=mask).logits.sum().backward()

            fused_kernel = (attention, device) == ("sdpa", "cpu")
            closed_form = transformer_flops(from_config(config), 64, batch=2, fused_attention=fused_kernel)
            lines.append(f"| {attention} | {device} | {count_flops(step):,} | {closed_form.usage:,} |")
    return lines


def paper_table() -> list[str]:
    """The FLOPs that CCDS published beside ours."""
    lines = ["| figure | N of 6ND | ours | published | difference |", "|---|---:|---:|---:|---:|"]
    for name, published in PUBLISHED.items():
        n = ccds_parameters(from_config(read_config(MODELS / f"{name}.json")))
        ours = training_flops(n, CCDS_TOKENS)
        lines.append(f"| training {name} | {n:.4e} | {ours:.4e} | {published:.4e} | {ours / published - 1:+.3%} |")
    n = ccds_parameters(from_config(read_config(MODELS / "llama-2-7b.json")))
    for method, published in PUBLISHED_SELECTION.items():
        ours = selection_flops(method, n, CCDS_TOKENS)
        lines.append(f"| {method}, 7B scorer | {n:.4e} | {ours:.4e} | {published:.4e} | {ours / published - 1:+.3%} |")
    return lines


def pool_table() -> list[str]:
    """FLOPs of one example of Llama-2 in closed form, beside the rules of thumb 6ND and 4ND."""
    lora = Lora(LORA_RANK, QKVO)
    lines = [
        "| model | parameters | LoRA parameters | full | 6ND | LoRA | 4ND |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name in PUBLISHED:
        architecture = from_config(read_config(MODELS / f"{name}.json"))
        n, length = sum(architecture.n_parameters.values()), 2048
        full = transformer_flops(architecture, length).usage
        adapted = transformer_flops(architecture, length, trainable=lora).usage
        lines.append(
            f"| {name} | {n:,} | {lora_parameters(architecture, lora):,} | {full:.4e} | {6 * n * length:.4e} "
            f"| {adapted:.4e} | {4 * n * length:.4e} |"
        )
    return lines


def report(rows: list[Row], command: str) -> str:
    """The text of the results file."""
    worst = max(rows, key=lambda row: row.difference)
    deviations = attention_self_test()
    lines = [
        "# FLOPs: measured against analytic",
        "",
        f"    {command}",
        "",
        f"torch {torch.__version__}, torchvision {torchvision.__version__}, transformers "
        f"{transformers.__version__}. Batch of one sequence; LoRA of rank {LORA_RANK} on query, key, value "
        "and output projections. Measured: `FlopCounterMode` on the meta device, eager attention, with the "
        "formula of `cads.accounting.measured` for the backward of grouped convolutions, which PyTorch overcounts.",
        "",
        f"{len(rows)} comparisons; the largest relative difference is {worst.difference:.2e} "
        f"({worst.model}, {worst.mode}, {worst.shape}); {TOLERANCE:.0%} is allowed.",
        "Self-test of attention on the CPU: " + ("; ".join(deviations) or "as expected") + ".",
        "",
        "| model | mode | shape | forward, measured | forward, analytic | forward+backward, measured "
        "| forward+backward, analytic | difference |",
        "|---|---|---|---:|---:|---:|---:|---:|",
        *(
            f"| {r.model} | {r.mode} | {r.shape} | {r.measured.forward:.6e} | {r.analytic.forward:.6e} "
            f"| {r.measured.usage:.6e} | {r.analytic.usage:.6e} | {r.difference:.2e} |"
            for r in rows
        ),
        "",
        "## Kernels",
        "",
        "Two sequences of 64 tokens. On meta `sdpa` is decomposed into the products of eager attention; the "
        "fused CPU kernel recomputes the scores.",
        "",
        *kernels(),
        "",
        "## CCDS",
        "",
        f"`paper` accounting with D = {CCDS_TOKENS:.4g} tokens (`cads/accounting/nominal.py` says how they are "
        "implied).",
        "",
        *paper_table(),
        "",
        "One example of 2,048 tokens in closed form:",
        "",
        *pool_table(),
    ]
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None, show: Callable[[str], None] = print) -> int:
    """Write the table; returns 1 if a difference is beyond the tolerance."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="Markdown file to write")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, help="sequence lengths T")
    parser.add_argument("--no-large", action="store_true", help="leave out Llama-2-7B")
    options = parser.parse_args(arguments)
    transformers.logging.set_verbosity_error()
    try:
        rows = [*transformer_rows(tuple(options.lengths), not options.no_large), *image_rows()]
        command = shlex.join(["python", "-m", "experiments.flops", *(arguments or sys.argv[1:])])
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(report(rows, command))
    except (CadsError, OSError) as error:
        show(f"error: {error}")
        return 1
    worst = max(rows, key=lambda row: row.difference)
    show(f"{len(rows)} comparisons, largest difference {worst.difference:.2e}: {options.out}")
    return int(worst.difference > TOLERANCE)


if __name__ == "__main__":
    sys.exit(main())
