"""The accounting of Compute-Constrained Data Selection: 6ND for training, 2ND for a forward pass.

Source: Yin and Rush, "Compute-Constrained Data Selection" (CCDS), ICLR 2025, arXiv 2410.16208. N is a number
of parameters, D a number of tokens. Perplexity is one forward pass over the pool. LESS costs 1.8 full trainings of its
scorer. BM25 and embeddings are free. The fine-tuning of the scorer is not charged.

CCDS published 4.593e18 (7B), 8.638e18 (13B) and 4.926e19 (70B) FLOPs for its pool. No single D gives these as 6ND of
the parameter counts of the models: 6.738e9, 13.016e9 and 68.977e9 parameters imply 113.6, 110.6 and 119.0 million
tokens. All three follow within 0.05 % from D = 98.0 million and `6N + 12 L h T` a token. That adds attention (Chowdhery
et al. 2022, PaLM, arXiv 2204.02311, appendix B) with T = 4096, the context of Llama-2. It also takes keys and values of
full width, so that N is 6.738e9, 13.016e9 and 78.372e9. CCDS does not state this: it is the formula that fits its
figures. `ccds_parameters` gives the N with which 6ND equals it.
"""

from __future__ import annotations

from cads.accounting.architectures import Architecture
from cads.errors import ConfigError

CCDS_TOKENS = 98.0e6
"""D that the published FLOPs of the pool imply: 362 tokens for each of its 270,679 examples."""
CCDS_CONTEXT = 4096
"""T: the number of positions that each token is assumed to attend to."""

TRAINING, FORWARD = 6, 2
"""FLOPs per parameter and token."""
SELECTION = {
    "random": 0.0,
    "full": 0.0,
    "bm25": 0.0,
    "embedding": 0.0,
    "ppl": FORWARD / TRAINING,
    "less": 1.8,
}
"""Cost of selection from the full pool by method, in full trainings of the scorer on that pool (figures of CCDS)."""


def training_flops(n_parameters: float, n_tokens: float) -> float:
    """C = 6ND: forward and backward over D tokens."""
    return TRAINING * _positive(n_parameters, "n_parameters") * _positive(n_tokens, "n_tokens")


def forward_flops(n_parameters: float, n_tokens: float) -> float:
    """C = 2ND: forward over D tokens."""
    return FORWARD * _positive(n_parameters, "n_parameters") * _positive(n_tokens, "n_tokens")


def selection_flops(method: str, n_parameters: float, n_tokens: float) -> float:
    """FLOPs of `method` to rank a pool of D tokens with a scorer of N parameters.

    Raises:
        ConfigError: if CCDS has no figure for the method.
    """
    if method not in SELECTION:
        raise ConfigError(
            f"`paper` accounting has no cost for the method {method!r} (it has {', '.join(SELECTION)}): "
            "use `analytic` or `measured`"
        )
    return SELECTION[method] * training_flops(n_parameters, n_tokens)


def ccds_parameters(architecture: Architecture, context: int = CCDS_CONTEXT) -> float:
    """The N with which 6ND gives the figures of CCDS: `N + 2 L h T`, with keys and values as wide as queries.

    It is 7.812e9, 14.694e9 and 83.741e9 for Llama-2 7B, 13B and 70B.
    """
    missing_heads = 2 * (architecture.heads - architecture.kv_heads)
    widened = architecture.layers * architecture.hidden * missing_heads * architecture.head_dim
    attention = 2 * architecture.layers * architecture.hidden * _positive(context, "context")
    return sum(architecture.n_parameters.values()) + widened + attention


def _positive(value: float, name: str) -> float:
    """The value, if it is positive.

    Raises:
        ConfigError: if it is not.
    """
    if not value > 0:
        raise ConfigError(f"{name} = {value}: it must be positive")
    return value
