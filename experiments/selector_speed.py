"""Speed of the cost-aware selectors, compared with the packages and recipes in common use.

    python -m experiments.selector_speed --model DIR --data FILE --out experiments/results/selector_speed.md

Everything is timed in one process. The implementations of one section take turns, batch by batch where gradients are
computed. A rate is that of the median turn. A ratio is the median of the ratios within a turn, which other jobs on the
machine disturb less than times. A package that is not installed is skipped, and the table says so. The packages may be
installed into a folder of their own, so that they change no version of another package:

    pip install --target PEERS --no-deps bergson traker rank-bm25 jaxtyping wadler-lindig simple-parsing \\
        docstring-parser ml-dtypes petname
    PYTHONPATH=PEERS python -m experiments.selector_speed ...
"""

from __future__ import annotations

import argparse
import importlib
import math
import os
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from baselines.embedding import ENCODED_TOKENS
from baselines.gradients.adam_direction import AdamDirection
from baselines.gradients.per_example import PerExample
from baselines.gradients.projection import PROJECTED, Projection, make_projection
from baselines.kernels.autocast import Precision
from baselines.similarity.encoders import SentenceEncoder
from baselines.similarity.okapi import Okapi
from baselines.similarity.pool_losses import pool_losses
from baselines.similarity.words import tokenize
from cads.accounting.ledger import Ledger
from cads.data.batch import Batch
from cads.data.pool import Pool
from cads.data.token_batches import SCORED_TOKENS, scoring_batches
from cads.errors import CadsError
from cads.recipe import TrainConfig
from cads.scoring.stages import ReadPool
from cads.task import Task
from cads.tasks.language.config import LanguageConfig
from cads.tasks.language.rows import TextSource

TOKENS = 128
"""Length in tokens of the examples whose gradients are computed."""
PUBLISHED_ROWS = 16
"""Gradients that the published code of LESS projects at once."""
PUBLISHED_BLOCK = 128
"""Columns of the projection that the published code of LESS generates at once."""
BERGSON_SIDE = 8
"""bergson projects each of 120 adapter matrices to 8 x 8: 7,680 dimensions."""
HALF_TOKENS = 1024
"""Padded tokens of a batch of losses in bf16: larger batches pay there, 1.1 times as fast as with 512."""
N_QUERIES = 100
"""Queries of BM25."""
BF16_SPEEDUP = 2.0
"""Required speed-up of passes in bf16 over float32, on a CPU with tile instructions for them (AMX)."""
QUICK = 4
"""Turns of sections that take seconds, for each turn of those that take half a minute."""


@dataclass
class Row:
    """One line of the table.

    Attributes:
        section: what is computed, with the unit of the rate. implementation: that was timed. rate: units per second.
        reference: the implementation that it is compared with. ratio: its rate over that of `reference`.
        required: the smallest acceptable ratio.
    """

    section: str
    implementation: str
    rate: float
    reference: str = ""
    ratio: float | None = None
    required: float | None = None
    note: str = ""

    def line(self) -> str:
        """The line in Markdown."""
        ratio = "-" if self.ratio is None else f"{self.ratio:.2f} x {self.reference}"
        required = "-" if self.required is None else f">= {self.required:g}"
        rate = "-" if math.isnan(self.rate) else f"{self.rate:,.4g}"
        return f"| {self.section} | {self.implementation} | {rate} | {ratio} | {required} | {self.note} |"


class Turns:
    """Times of several implementations that take turns, in an order that rotates.

    Args:
        implementations: the implementations by name; each is called with one part of the work.
        repeats: timed turns of each implementation with each part, after one that does not count.
        parts: of the work.

    Attributes:
        seconds: of each implementation, shape (turns, parts).
    """

    def __init__(
        self, implementations: Mapping[str, Callable[[Any], object]], repeats: int, parts: Sequence[Any]
    ) -> None:
        times: dict[str, list[list[float]]] = {name: [] for name in implementations}
        for turn in range(1 + repeats):
            for rows in times.values():
                rows.append([])
            for position, part in enumerate(parts):
                first = (turn + position) % len(implementations)
                for name in [*list(implementations)[first:], *list(implementations)[:first]]:
                    started = time.perf_counter()
                    implementations[name](part)
                    times[name][turn].append(time.perf_counter() - started)
        self.seconds = {name: np.array(rows[1:]) for name, rows in times.items()}

    def rate(self, name: str, n: int) -> float:
        """Units per second, if all parts together have n units and each part takes the median of its turns."""
        return n / float(np.median(self.seconds[name], axis=0).sum())

    def ratio(self, name: str, other: str) -> float:
        """Speed of `name` in units of that of `other`: the median over turns and parts."""
        return float(np.median(self.seconds[other] / self.seconds[name]))


def peer(name: str) -> Any:
    """A module of another package, or None if it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def load(model: Path, data: Path, n_pool: int, max_tokens: int) -> Task:
    """A language task of prompts and answers, cut at `max_tokens` tokens, with LoRA adapters on query and value."""
    config = LanguageConfig(
        model=str(model),
        pool=[TextSource(path=str(data), columns={"prompt": "question", "response": "answer"})],
        n_pool=n_pool,
        n_target=20,
        n_test=20,
        max_tokens=max_tokens,
        drop=True,
        peft={"type": "lora", "r": 8, "target_modules": ["q_proj", "v_proj"]},
    )
    return config.build(TrainConfig())


def of_length(pool: Pool, n: int) -> Pool:
    """The n examples whose lengths are closest to `TOKENS`."""
    lengths: Any = pool.examples
    order = np.argsort(np.abs(lengths.lengths() - TOKENS), kind="stable")
    return pool.subset(np.sort(order[:n]), f"examples of about {TOKENS} tokens")


def adapted(task: Task) -> nn.Module:
    """The model in evaluation mode, with adapters that are not zero, as after some training."""
    model = task.model(0).eval()
    generator = torch.Generator().manual_seed(0)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.02, generator=generator)
    return model


class Features:
    """Gradient features of a model as in LESS, with random moments of Adam."""

    def __init__(self, task: Task, model: nn.Module, precision: Precision = "no") -> None:
        self._gradients = PerExample(task, model, precision=precision)
        generator = torch.Generator().manual_seed(1)
        first = {n: 1e-3 * torch.randn(size, generator=generator) for n, size in self._gradients.sizes.items()}
        second = {n: x.square() + 1e-8 for n, x in first.items()}
        self._direction = AdamDirection("paper", first, second, 100)
        self._projection: Projection = make_projection(self._gradients.sizes, "auto", 0)

    def __call__(self, batch: Batch) -> Tensor:
        """Directions, projected and normalised, shape (B, d)."""
        features = self._projection.empty(len(batch))

        def receive(name: str, start: int, gradient: Tensor) -> None:
            direction = self._direction(name, gradient)
            self._projection.add(name, direction, features[start : start + len(gradient)])

        self._gradients.each(batch, receive)
        return functional.normalize(features, dim=1).float()


def gradient_features(task: Task, n: int, tokens: int, repeats: int) -> list[Row]:
    """Projected per-example gradients against a plain forward and backward pass of the same model."""
    model, pool = adapted(task), of_length(task.pool, n)
    batches = [pool.batch(rows) for rows in scoring_batches(pool, tokens=tokens)]
    exact, half = Features(task, model), Features(task, model, "bf16")

    def plain(batch: Batch) -> None:
        task.losses(model, batch).sum().backward()
        model.zero_grad(set_to_none=True)

    implementations: dict[str, Callable[[Batch], object]] = {
        "plain forward and backward": plain,
        "cads": exact,
        "cads, bf16": half,
    }
    collect = bergson_features(task, model)
    if collect is not None:
        implementations["bergson"] = collect
    cosine = min(float((exact(batch) * half(batch)).sum(dim=1).min()) for batch in batches)
    turns = Turns(implementations, repeats, batches)
    section = f"gradients to {PROJECTED:,}, examples/s"
    plain_rate, cads_rate = turns.rate("plain forward and backward", n), turns.rate("cads", n)
    has_amx = torch.cpu._is_amx_tile_supported()
    to_plain, to_float32 = turns.ratio("cads", "plain forward and backward"), turns.ratio("cads, bf16", "cads")
    rows = [
        Row(section, "plain forward and backward", plain_rate, note=f"batches of {tokens} tokens"),
        Row(section, "cads, float32", cads_rate, "plain", to_plain, 0.9, "Adam directions, sketched"),
        Row(section, "cads, bf16", turns.rate("cads, bf16", n), "float32", to_float32,
            BF16_SPEEDUP if has_amx else None,
            f"smallest cosine to float32 {cosine:.5f} (asked: 0.999){'' if has_amx else '; this CPU has no AMX'}"),
    ]  # fmt: skip
    if "bergson" in implementations:
        note = f"plain gradients, each matrix to {BERGSON_SIDE} x {BERGSON_SIDE}"
        rows.append(Row(section, "bergson", turns.rate("bergson", n), "", None, None, note))
        rows.append(Row(section, "cads, float32", cads_rate, "bergson", turns.ratio("cads", "bergson"), 1.0))
    else:
        rows.append(Row(section, "bergson", math.nan, note="skipped: not installed"))
    return [*rows, *published_less(task, model, pool, cads_rate, section)]


def bergson_features(task: Task, model: nn.Module) -> Callable[[Batch], None] | None:
    """bergson's per-module two-sided projection of a batch, or None if it is not installed."""
    collector, gradients = peer("bergson.collector.collector"), peer("bergson.gradients")
    if collector is None or gradients is None:
        return None

    # mypy cannot check a module that may not be installed.
    class Collected(collector.HookCollectorBase):  # type: ignore[name-defined]
        """Keeps the gradients that the hooks compute."""

        def setup(self) -> None:
            """Nothing."""

        def teardown(self) -> None:
            """Nothing."""

        def backward_hook(self, module: nn.Module, g: Tensor) -> None:
            """Keep the gradients of a module."""
            self.mod_grads[module._name] = self._compute_gradient(module, g)

        def process_batch(self, indices: list[int], **options: Any) -> None:
            """Nothing."""

    adapters = {n for n, m in model.named_modules() if isinstance(m, nn.Linear) and ".lora_" in n}
    processor = gradients.GradientProcessor(projection_dim=BERGSON_SIDE)
    collected = Collected(model, target_modules=adapters, processor=processor)

    def run(batch: Batch) -> None:
        with collected:
            task.losses(model, batch).sum().backward()
        torch.cat(list(collected.mod_grads.values()), dim=1)
        collected.mod_grads.clear()
        model.zero_grad(set_to_none=True)

    return run


def published_less(task: Task, model: nn.Module, pool: Pool, cads_rate: float, section: str) -> list[Row]:
    """LESS as released: one example at a time, all logits, `BasicProjector` on 16 gradients at a time."""
    trak = peer("trak.projectors")
    implementation = "LESS as published"
    if trak is None:
        return [Row(section, implementation, math.nan, note="skipped: traker is not installed")]
    parameters = [p for p in model.parameters() if p.requires_grad]
    size = sum(p.numel() for p in parameters)
    projector = trak.BasicProjector(
        size, PROJECTED, 0, trak.ProjectionType.rademacher, torch.device("cpu"), block_size=PUBLISHED_BLOCK
    )
    moments = torch.full((size,), 1e-3), torch.full((size,), 1e-6)
    rows: list[Tensor] = []
    started = time.perf_counter()
    count = min(PUBLISHED_ROWS, len(pool))
    for i in range(count):
        batch = pool.batch([i])
        logits = model(input_ids=batch.inputs["input_ids"], attention_mask=batch.inputs["attention_mask"]).logits
        functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch.labels[:, 1:].flatten()).backward()
        g = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
        m, v = 0.9 * moments[0] + 0.1 * g, 0.999 * moments[1] + 0.001 * g.square()
        rows.append(m / (v + 1e-8).sqrt())
        model.zero_grad(set_to_none=True)
    projector.project(torch.stack(rows), model_id=0)
    rate = count / (time.perf_counter() - started)
    note = f"{count} examples, trak's BasicProjector"
    return [
        Row(section, implementation, rate, note=note),
        Row(section, "cads, float32", cads_rate, implementation, cads_rate / rate, 5.0),
    ]


def perplexity(task: Task, n: int, repeats: int) -> list[Row]:
    """The loss of examples: batches by token budget against one at a time, with and without the whole head."""
    model, pool = adapted(task), of_length(task.pool, n)
    losses: dict[str, np.ndarray] = {}

    def batched_losses(name: str, tokens: int, *, autocast: bool = False) -> Callable[[Pool], None]:
        def run(pool: Pool) -> None:
            reading = ReadPool("scores", tokens, pool=pool)
            losses[name] = pool_losses(task, model, reading, ledger=Ledger(), autocast=autocast)

        return run

    def usual(pool: Pool) -> None:
        losses["usual"] = np.array([usual_loss(model, pool.batch(np.array([i]))) for i in range(n)])

    task.costs.forward_pool(pool)  # counts the FLOPs of all shapes, which must not be timed
    implementations: dict[str, Callable[[Pool], object]] = {
        "usual": usual,
        "one": batched_losses("one", 1),
        "budget": batched_losses("budget", SCORED_TOKENS),
        "half": batched_losses("half", HALF_TOKENS, autocast=True),
    }
    turns = Turns(implementations, repeats, [pool])
    differences = {name: float(np.abs(x / losses["usual"] - 1).max()) for name, x in losses.items()}
    section, reference = "perplexity, examples/s", "one, whole head"
    batched, bf16 = (f"cads, batches of {tokens} tokens" for tokens in (SCORED_TOKENS, HALF_TOKENS))
    return [
        Row(section, reference, turns.rate("usual", n), note="`model(input_ids, labels=...)`, as is usual"),
        Row(section, "one, head on answers only", turns.rate("one", n), reference, turns.ratio("one", "usual")),
        Row(section, batched, turns.rate("budget", n), reference, turns.ratio("budget", "usual"), 1.2,
            f"largest difference {differences['budget']:.1e} (asked: 1e-4)"),
        Row(section, f"{bf16}, bf16", turns.rate("half", n), reference, turns.ratio("half", "usual"), 2.5,
            f"largest difference {differences['half']:.1e}"),
    ]  # fmt: skip


def usual_loss(model: Any, batch: Batch) -> float:
    """The loss per token of one example, in nats, as transformers computes it, with logits at every position."""
    with torch.inference_mode():
        return float(model(input_ids=batch.inputs["input_ids"], labels=batch.labels).loss)


def bm25(task: Task, repeats: int) -> list[Row]:
    """BM25 scores of all questions of the pool for `N_QUERIES` of them as queries."""
    texts = task.texts(task.pool)
    documents = tokenize(texts)
    queries = documents[:N_QUERIES]
    query_words = queries.to_pylist()
    okapi = Okapi([documents])
    scores: dict[str, np.ndarray] = {}

    def ours(queries: Any) -> None:
        scores["ours"] = okapi.scores(np.asarray(okapi.count(queries).mean(axis=0)))

    cads_seconds = float(np.median(Turns({"ours": ours}, 10 * repeats, [queries]).seconds["ours"]))
    section, note = "BM25, queries/s", f"{len(texts):,} texts, {N_QUERIES} queries"
    rank_bm25 = peer("rank_bm25")
    if rank_bm25 is None:
        return [
            Row(section, "cads", N_QUERIES / cads_seconds, note=note),
            Row(section, "rank_bm25", math.nan, note="skipped: not installed"),
        ]
    index = rank_bm25.BM25Okapi(documents.to_pylist())

    def theirs(query_words: list[list[str]]) -> None:
        scores["theirs"] = np.mean([index.get_scores(query) for query in query_words], axis=0)

    peer_seconds = float(np.median(Turns({"theirs": theirs}, 1, [query_words]).seconds["theirs"]))
    difference = float(np.abs(scores["ours"] - scores["theirs"]).max())
    return [
        Row(section, "rank_bm25", N_QUERIES / peer_seconds, note=note),
        Row(
            section,
            "cads",
            N_QUERIES / cads_seconds,
            "rank_bm25",
            peer_seconds / cads_seconds,
            150,
            f"largest difference {difference:.1e}",
        ),
    ]


def embedding(task: Task, encoder: str | None, n: int, repeats: int) -> list[Row]:
    """Embeddings of the first n questions by a sentence encoder."""
    section = "embedding, texts/s"
    sentences = peer("sentence_transformers")
    if sentences is None or encoder is None:
        reason = "sentence-transformers is not installed" if sentences is None else "no --encoder was given"
        return [Row(section, "SentenceTransformer.encode", math.nan, note=f"skipped: {reason}")]
    questions = task.pool.subset(np.arange(n), "questions")
    texts = task.texts(questions)
    peer_encoder = sentences.SentenceTransformer(encoder, device="cpu")
    cads_encoder = SentenceEncoder(task, encoder, ENCODED_TOKENS)
    vectors_by: dict[str, Tensor] = {}

    def theirs(texts: list[str]) -> None:
        vectors_by["theirs"] = torch.as_tensor(peer_encoder.encode(texts))

    def ours(texts: list[str]) -> None:
        # A new pool each time, so that its texts are cut into batches within the measured time.
        pool = task.pool.subset(np.arange(n), "questions")
        vectors = torch.empty(n, cads_encoder.dimension)
        for rows in cads_encoder.batches(pool):
            vectors[rows] = cads_encoder.encode(pool, rows).vectors.float()
        vectors_by["ours"] = vectors

    turns = Turns({"theirs": theirs, "ours": ours}, QUICK * repeats, [texts])
    cosine = float(functional.cosine_similarity(vectors_by["ours"], vectors_by["theirs"]).min())
    return [
        Row(section, "SentenceTransformer.encode", turns.rate("theirs", n), note=f"{n} questions"),
        Row(
            section,
            "cads",
            turns.rate("ours", n),
            "encode",
            turns.ratio("ours", "theirs"),
            1.0,
            f"smallest cosine {cosine:.6f}",
        ),
    ]


def report(rows: Sequence[Row], command: str, load_average: float) -> str:
    """The text of the results file."""
    lines = [
        "# Speed of the cost-aware selectors",
        "",
        f"    {command}",
        "",
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, {os.cpu_count()} cores, load of the machine at "
        f"the start {load_average:.1f}. LoRA of rank 8 on query and value; the head computes on answer positions only. "
        "The implementations of each part took turns in one process, batch by batch where gradients are taken: rates "
        "are those of the median turn, ratios medians over turns. `asked` is what a ratio should be.",
        "",
        "| what is computed | by | rate | ratio | asked | |",
        "|---|---|---:|---:|---:|---|",
        *(row.line() for row in rows),
    ]
    missed = [r for r in rows if r.ratio is not None and r.required is not None and r.ratio < r.required]
    below = [f"{r.section.rsplit(', ', 1)[0]}, {r.implementation} ({r.ratio:.2f} x {r.reference})" for r in missed]
    lines += ["", f"Below what is asked: {'; '.join(below)}." if below else "Every ratio is as asked."]
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None, show: Callable[[str], None] = print) -> int:
    """Write the table; returns 1 if an input cannot be used."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of a causal language model")
    parser.add_argument("--data", type=Path, required=True, help="JSON lines with question and answer")
    parser.add_argument("--encoder", help="a sentence-transformers model, by name or folder")
    parser.add_argument("--out", type=Path, required=True, help="Markdown file to write")
    parser.add_argument("--examples", type=int, default=64, help="whose gradients and losses are computed")
    parser.add_argument("--tokens", type=int, default=1024, help="padded tokens of a batch of gradients")
    parser.add_argument("--repeats", type=int, default=5, help="turns of each implementation")
    parser.add_argument("--texts", type=int, default=5000, help="of the pool, for BM25 (and a tenth for embeddings)")
    parser.add_argument("--longest", type=int, default=512, help="tokens at which texts are cut")
    sections = ["gradients", "perplexity", "bm25", "embedding"]
    parser.add_argument("--sections", nargs="+", choices=sections, default=sections, help="what is timed")
    options = parser.parse_args(arguments)
    load_average = os.getloadavg()[0]
    try:
        task = load(options.model, options.data, options.texts, options.longest)
        measurements: dict[str, Callable[[], list[Row]]] = {
            "gradients": lambda: gradient_features(task, options.examples, options.tokens, options.repeats),
            "perplexity": lambda: perplexity(task, options.examples, options.repeats),
            "bm25": lambda: bm25(task, options.repeats),
            "embedding": lambda: embedding(task, options.encoder, max(1, options.texts // 10), options.repeats),
        }
        rows = []
        for name in options.sections:
            rows += measurements[name]()
            show(f"{name}: done")
        command = shlex.join(["python", "-m", "experiments.selector_speed", *(arguments or sys.argv[1:])])
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(report(rows, command, load_average))
    except (CadsError, OSError) as error:
        show(f"error: {error}")
        return 1
    show(options.out.read_text())
    return 0


if __name__ == "__main__":
    sys.exit(main())
