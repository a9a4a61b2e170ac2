"""The matrix-product throughput of the machine: the limit against which training is measured."""

from __future__ import annotations

import time
from functools import cache

import torch

SECONDS = 0.2
"""Time for which the product is repeated. The fastest one counts, since other work slows the rest."""
SIZES = {"cpu": 1024, "cuda": 8192}
"""Rows of the square matrices by type of device: large enough that arithmetic limits the time."""
TYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Data type of each precision of `TrainConfig`."""


@cache
def matmul_flops_per_second(device: str, precision: str = "no") -> float:
    """FLOP/s of a matrix product, measured once for each device and precision."""
    n = SIZES.get(torch.device(device).type, SIZES["cuda"])
    a = torch.ones(n, n, dtype=TYPES[precision], device=device)
    out = torch.empty_like(a)
    fastest, started = float("inf"), time.perf_counter()
    while time.perf_counter() < started + SECONDS:
        product_started = time.perf_counter()
        torch.mm(a, a, out=out)
        if out.device.type != "cpu":
            torch.accelerator.synchronize(out.device)
        fastest = min(fastest, time.perf_counter() - product_started)
    return 2 * n**3 / fastest
