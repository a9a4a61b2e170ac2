"""How fast the cost-aware selectors are, beside the packages and recipes that people use instead.

    python -m experiments.selector_speed --model DIR --data FILE --out experiments/results/selector_speed.md

Everything is timed in one process, the ways of one table taking turns, batch by batch where gradients are taken; a rate
is that of the median turn, and a ratio the median of the ratios within a turn, which hold where times do not. A peer
that is not installed is skipped with a word. Peers may stand in a folder of their own, where they move no version of
anything:

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

from baselines.bm25 import Okapi, tokenize
from baselines.embedding import ENCODED_TOKENS
from baselines.gradients.adam_direction import AdamDirection
from baselines.gradients.per_example import PerExample
from baselines.gradients.projection import PROJECTED, Projection, make_projection
from baselines.kernels.autocast import Precision
from baselines.similarity.encoders import SentenceEncoder
from baselines.similarity.pool_losses import pool_losses
from cads.accounting.ledger import Ledger
from cads.data.batch import Batch
from cads.data.pool import Pool
from cads.data.token_batches import SCORED_TOKENS, scoring_batches
from cads.errors import CadsError
from cads.recipe import TrainConfig
from cads.task import Task
from cads.tasks.language.config import LanguageConfig
from cads.tasks.language.rows import TextSource

TOKENS = 128
"""Length of the examples that gradients are taken of."""
PUBLISHED_ROWS = 16
"""Gradients that LESS's code projects at once."""
PUBLISHED_BLOCK = 128
"""Columns of the projection that it makes at once."""
BERGSON_SIDE = 8
"""bergson projects each of 120 adapter matrices to 8 x 8: 7,680 dimensions."""
HALF_TOKENS = 1024
"""Padded tokens of a batch of losses in bf16, where larger batches pay: 1.1 times as fast as with 512."""
N_QUERIES = 100
"""BM25: questions that are asked."""
BF16 = 2.0
"""How many times as fast passes in bf16 are asked to be, on a CPU with tiles for them (AMX)."""
QUICK = 4
"""Turns of what takes seconds, for one of what takes half a minute."""


@dataclass
class Row:
    """One line of the table: what was timed, in units a second, and what it is compared with."""

    section: str
    what: str
    rate: float
    beside: str = ""
    ratio: float | None = None
    asked: float | None = None
    note: str = ""

    def line(self) -> str:
        """In Markdown."""
        ratio = "-" if self.ratio is None else f"{self.ratio:.2f} x {self.beside}"
        asked = "-" if self.asked is None else f">= {self.asked:g}"
        rate = "-" if math.isnan(self.rate) else f"{self.rate:,.4g}"
        return f"| {self.section} | {self.what} | {rate} | {ratio} | {asked} | {self.note} |"


class Turns:
    """Seconds of several ways to do a thing, which took turns; who is first goes round.

    Args:
        ways: by name; each is given a part of what there is to do.
        repeats: turns of each with each part, after one that does not count.
        parts: what there is to do.

    Attributes:
        seconds: by name, shape (turns, parts).
    """

    def __init__(self, ways: Mapping[str, Callable[[Any], object]], repeats: int, parts: Sequence[Any]) -> None:
        taken: dict[str, list[list[float]]] = {name: [] for name in ways}
        for turn in range(1 + repeats):
            for rows in taken.values():
                rows.append([])
            for place, part in enumerate(parts):
                first = (turn + place) % len(ways)
                for name in [*list(ways)[first:], *list(ways)[:first]]:
                    begin = time.perf_counter()
                    ways[name](part)
                    taken[name][turn].append(time.perf_counter() - begin)
        self.seconds = {name: np.array(rows[1:]) for name, rows in taken.items()}

    def rate(self, name: str, n: int) -> float:
        """Things a second, of n that all parts hold, where each took the median of its turns."""
        return n / float(np.median(self.seconds[name], axis=0).sum())

    def ratio(self, name: str, other: str) -> float:
        """How many times as fast as `other` it was: the median over turns and parts."""
        return float(np.median(self.seconds[other] / self.seconds[name]))


def peer(name: str) -> Any:
    """A module of another package, or None if it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def load(model: Path, data: Path, n_pool: int, longest: int) -> Task:
    """Prompts and answers in the language task, cut at `longest` tokens, with adapters on query and value."""
    config = LanguageConfig(
        model=str(model),
        pool=[TextSource(path=str(data), columns={"prompt": "question", "response": "answer"})],
        n_pool=n_pool,
        n_target=20,
        n_test=20,
        max_tokens=longest,
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
    """The model with adapters as they are after some training: no longer zero."""
    model = task.model(0).eval()
    generator = torch.Generator().manual_seed(0)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.02, generator=generator)
    return model


class Features:
    """Gradient features of a model as LESS has them, with moments of Adam that are made up."""

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
            moved = self._direction(name, gradient)
            self._projection.add(name, moved, features[start : start + len(gradient)])

        self._gradients.each(batch, receive)
        return functional.normalize(features, dim=1).float()


def gradient_features(task: Task, n: int, tokens: int, repeats: int) -> list[Row]:
    """Projected per-example gradients against a plain forward and backward pass of the same model."""
    model, part = adapted(task), of_length(task.pool, n)
    batches = [part.batch(rows) for rows in scoring_batches(part, tokens=tokens)]
    exact, half = Features(task, model), Features(task, model, "bf16")

    def plain(batch: Batch) -> None:
        task.losses(model, batch).sum().backward()
        model.zero_grad(set_to_none=True)

    ways: dict[str, Callable[[Batch], object]] = {
        "plain forward and backward": plain,
        "cads": exact,
        "cads, bf16": half,
    }
    collect = bergson_features(task, model)
    if collect is not None:
        ways["bergson"] = collect
    cosine = min(float((exact(batch) * half(batch)).sum(dim=1).min()) for batch in batches)
    turns = Turns(ways, repeats, batches)
    section = f"gradients to {PROJECTED:,}, examples/s"
    limit, own = turns.rate("plain forward and backward", n), turns.rate("cads", n)
    tiled = torch.cpu._is_amx_tile_supported()
    of_limit, of_own = turns.ratio("cads", "plain forward and backward"), turns.ratio("cads, bf16", "cads")
    rows = [
        Row(section, "plain forward and backward", limit, note=f"batches of {tokens} tokens"),
        Row(section, "cads, float32", own, "plain", of_limit, 0.9, "Adam directions, sketched"),
        Row(section, "cads, bf16", turns.rate("cads, bf16", n), "float32", of_own, BF16 if tiled else None,
            f"smallest cosine to float32 {cosine:.5f} (asked: 0.999){'' if tiled else '; this CPU has no AMX'}"),
    ]  # fmt: skip
    if "bergson" in ways:
        note = f"plain gradients, each matrix to {BERGSON_SIDE} x {BERGSON_SIDE}"
        rows.append(Row(section, "bergson", turns.rate("bergson", n), "", None, None, note))
        rows.append(Row(section, "cads, float32", own, "bergson", turns.ratio("cads", "bergson"), 1.0))
    else:
        rows.append(Row(section, "bergson", math.nan, note="skipped: not installed"))
    return [*rows, *published_less(task, model, part, own, section)]


def bergson_features(task: Task, model: nn.Module) -> Callable[[Batch], None] | None:
    """bergson's per-module two-sided projection of a batch, or None if it is not installed."""
    collector, gradients = peer("bergson.collector.collector"), peer("bergson.gradients")
    if collector is None or gradients is None:
        return None

    # mypy knows nothing of a module that may not be there.
    class Collected(collector.HookCollectorBase):  # type: ignore[name-defined]
        """Keeps what the hooks compute."""

        def setup(self) -> None:
            """Nothing."""

        def teardown(self) -> None:
            """Nothing."""

        def backward_hook(self, module: nn.Module, g: Tensor) -> None:
            """Keep a module's gradients."""
            self.mod_grads[module._name] = self._compute_gradient(module, g)

        def process_batch(self, indices: list[int], **options: Any) -> None:
            """Nothing."""

    adapters = {n for n, m in model.named_modules() if isinstance(m, nn.Linear) and ".lora_" in n}
    processor = gradients.GradientProcessor(projection_dim=BERGSON_SIDE)
    kept = Collected(model, target_modules=adapters, processor=processor)

    def run(batch: Batch) -> None:
        with kept:
            task.losses(model, batch).sum().backward()
        torch.cat(list(kept.mod_grads.values()), dim=1)
        kept.mod_grads.clear()
        model.zero_grad(set_to_none=True)

    return run


def published_less(task: Task, model: nn.Module, part: Pool, own: float, section: str) -> list[Row]:
    """LESS as released: one example at a time, all logits, `BasicProjector` on 16 gradients at a time."""
    trak = peer("trak.projectors")
    what = "LESS as published"
    if trak is None:
        return [Row(section, what, math.nan, note="skipped: traker is not installed")]
    parameters = [p for p in model.parameters() if p.requires_grad]
    size = sum(p.numel() for p in parameters)
    projector = trak.BasicProjector(
        size, PROJECTED, 0, trak.ProjectionType.rademacher, torch.device("cpu"), block_size=PUBLISHED_BLOCK
    )
    moments = torch.full((size,), 1e-3), torch.full((size,), 1e-6)
    rows: list[Tensor] = []
    begin = time.perf_counter()
    count = min(PUBLISHED_ROWS, len(part))
    for i in range(count):
        batch = part.batch([i])
        logits = model(input_ids=batch.inputs["input_ids"], attention_mask=batch.inputs["attention_mask"]).logits
        functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch.labels[:, 1:].flatten()).backward()
        g = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
        m, v = 0.9 * moments[0] + 0.1 * g, 0.999 * moments[1] + 0.001 * g.square()
        rows.append(m / (v + 1e-8).sqrt())
        model.zero_grad(set_to_none=True)
    projector.project(torch.stack(rows), model_id=0)
    rate = count / (time.perf_counter() - begin)
    note = f"{count} examples, trak's BasicProjector"
    return [Row(section, what, rate, note=note), Row(section, "cads, float32", own, what, own / rate, 5.0)]


def perplexity(task: Task, n: int, repeats: int) -> list[Row]:
    """The loss of examples: batches by token budget against one at a time, with and without the whole head."""
    model, part = adapted(task), of_length(task.pool, n)
    found: dict[str, np.ndarray] = {}

    def way(name: str, tokens: int, *, autocast: bool = False) -> Callable[[Pool], None]:
        def run(part: Pool) -> None:
            found[name] = pool_losses(
                task, model, ledger=Ledger(), stage="scores", tokens=tokens, pool=part, autocast=autocast
            )

        return run

    def usual(part: Pool) -> None:
        found["usual"] = np.array([usual_loss(model, part.batch(np.array([i]))) for i in range(n)])

    task.costs.forward_pool(part)  # shapes are counted before the clock is read
    ways: dict[str, Callable[[Pool], object]] = {
        "usual": usual,
        "one": way("one", 1),
        "budget": way("budget", SCORED_TOKENS),
        "half": way("half", HALF_TOKENS, autocast=True),
    }
    turns = Turns(ways, repeats, [part])
    off = {name: float(np.abs(x / found["usual"] - 1).max()) for name, x in found.items()}
    section, beside = "perplexity, examples/s", "one, whole head"
    budget, half = (f"cads, batches of {tokens} tokens" for tokens in (SCORED_TOKENS, HALF_TOKENS))
    return [
        Row(section, beside, turns.rate("usual", n), note="`model(input_ids, labels=...)`, as is usual"),
        Row(section, "one, head on answers only", turns.rate("one", n), beside, turns.ratio("one", "usual")),
        Row(section, budget, turns.rate("budget", n), beside, turns.ratio("budget", "usual"), 1.2,
            f"largest difference {off['budget']:.1e} (asked: 1e-4)"),
        Row(section, f"{half}, bf16", turns.rate("half", n), beside, turns.ratio("half", "usual"), 2.5,
            f"largest difference {off['half']:.1e}"),
    ]  # fmt: skip


def usual_loss(model: Any, batch: Batch) -> float:
    """The loss a token of one example, in nats, as transformers computes it, with logits at every position."""
    with torch.inference_mode():
        return float(model(input_ids=batch.inputs["input_ids"], labels=batch.labels).loss)


def bm25(task: Task, repeats: int) -> list[Row]:
    """All questions of the pool against `N_QUERIES` of them."""
    texts = task.texts(task.pool)
    documents = tokenize(texts)
    queries = documents[:N_QUERIES]
    asked = queries.to_pylist()
    okapi = Okapi([documents])
    found: dict[str, np.ndarray] = {}

    def ours(queries: Any) -> None:
        found["ours"] = okapi.scores(np.asarray(okapi.count(queries).mean(axis=0)))

    own = float(np.median(Turns({"ours": ours}, 10 * repeats, [queries]).seconds["ours"]))
    section, note = "BM25, queries/s", f"{len(texts):,} texts, {N_QUERIES} queries"
    rank_bm25 = peer("rank_bm25")
    if rank_bm25 is None:
        return [
            Row(section, "cads", N_QUERIES / own, note=note),
            Row(section, "rank_bm25", math.nan, note="skipped: not installed"),
        ]
    index = rank_bm25.BM25Okapi(documents.to_pylist())

    def theirs(asked: list[list[str]]) -> None:
        found["theirs"] = np.mean([index.get_scores(query) for query in asked], axis=0)

    seconds = float(np.median(Turns({"theirs": theirs}, 1, [asked]).seconds["theirs"]))
    off = float(np.abs(found["ours"] - found["theirs"]).max())
    return [
        Row(section, "rank_bm25", N_QUERIES / seconds, note=note),
        Row(section, "cads", N_QUERIES / own, "rank_bm25", seconds / own, 150, f"largest difference {off:.1e}"),
    ]


def embedding(task: Task, encoder: str | None, n: int, repeats: int) -> list[Row]:
    """Sentence embeddings of questions."""
    section = "embedding, texts/s"
    sentences = peer("sentence_transformers")
    if sentences is None or encoder is None:
        why = "sentence-transformers is not installed" if sentences is None else "no --encoder was given"
        return [Row(section, "SentenceTransformer.encode", math.nan, note=f"skipped: {why}")]
    part = task.pool.subset(np.arange(n), "questions")
    texts = task.texts(part)
    reader = sentences.SentenceTransformer(encoder, device="cpu")
    space = SentenceEncoder(task, encoder, ENCODED_TOKENS)
    found: dict[str, Tensor] = {}

    def theirs(texts: list[str]) -> None:
        found["theirs"] = torch.as_tensor(reader.encode(texts))

    def ours(texts: list[str]) -> None:
        # A pool of its own each time, so that its texts are cut into batches each time.
        fresh = task.pool.subset(np.arange(n), "questions")
        vectors = torch.empty(n, space.dimension)
        for rows in space.batches(fresh):
            vectors[rows] = space.encode(fresh, rows).vectors.float()
        found["ours"] = vectors

    turns = Turns({"theirs": theirs, "ours": ours}, QUICK * repeats, [texts])
    cosine = float(functional.cosine_similarity(found["ours"], found["theirs"]).min())
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
    """The results file."""
    lines = [
        "# Speed of the cost-aware selectors",
        "",
        f"    {command}",
        "",
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, {os.cpu_count()} cores, load of the machine at "
        f"the start {load_average:.1f}. LoRA of rank 8 on query and value; the head computes on answer positions only. "
        "The ways of each part took turns in one process, batch by batch where gradients are taken: rates are those of "
        "the median turn, ratios medians over turns. `asked` is what a ratio should be.",
        "",
        "| what is computed | by | rate | ratio | asked | |",
        "|---|---|---:|---:|---:|---|",
        *(row.line() for row in rows),
    ]
    missed = [r for r in rows if r.ratio is not None and r.asked is not None and r.ratio < r.asked]
    below = [f"{r.section.rsplit(', ', 1)[0]}, {r.what} ({r.ratio:.2f} x {r.beside})" for r in missed]
    lines += ["", f"Below what is asked: {'; '.join(below)}." if below else "Every ratio is as asked."]
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None, show: Callable[[str], None] = print) -> int:
    """Write the table; returns 1 if something cannot be run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of a causal language model")
    parser.add_argument("--data", type=Path, required=True, help="JSON lines with question and answer")
    parser.add_argument("--encoder", help="a sentence-transformers model, by name or folder")
    parser.add_argument("--out", type=Path, required=True, help="Markdown file to write")
    parser.add_argument("--examples", type=int, default=64, help="whose gradients and losses are computed")
    parser.add_argument("--tokens", type=int, default=1024, help="padded tokens of a batch of gradients")
    parser.add_argument("--repeats", type=int, default=5, help="turns of each way")
    parser.add_argument("--texts", type=int, default=5000, help="of the pool, for BM25 (and a tenth for embeddings)")
    parser.add_argument("--longest", type=int, default=512, help="tokens at which texts are cut")
    sections = ["gradients", "perplexity", "bm25", "embedding"]
    parser.add_argument("--sections", nargs="+", choices=sections, default=sections, help="what is timed")
    o = parser.parse_args(arguments)
    busy = os.getloadavg()[0]
    try:
        task = load(o.model, o.data, o.texts, o.longest)
        ways: dict[str, Callable[[], list[Row]]] = {
            "gradients": lambda: gradient_features(task, o.examples, o.tokens, o.repeats),
            "perplexity": lambda: perplexity(task, o.examples, o.repeats),
            "bm25": lambda: bm25(task, o.repeats),
            "embedding": lambda: embedding(task, o.encoder, max(1, o.texts // 10), o.repeats),
        }
        rows = []
        for name in o.sections:
            rows += ways[name]()
            show(f"{name}: done")
        command = shlex.join(["python", "-m", "experiments.selector_speed", *(arguments or sys.argv[1:])])
        o.out.parent.mkdir(parents=True, exist_ok=True)
        o.out.write_text(report(rows, command, busy))
    except (CadsError, OSError) as error:
        show(f"error: {error}")
        return 1
    show(o.out.read_text())
    return 0


if __name__ == "__main__":
    sys.exit(main())
