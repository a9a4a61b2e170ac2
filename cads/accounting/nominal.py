"""The accounting of Compute-Constrained Data Selection: 6ND for training, 2ND for a forward pass.

Source: Yin and Rush, "Compute-Constrained Data Selection" (CCDS), ICLR 2025, arXiv 2410.16208. N is a number
of parameters, D a number of tokens. Perplexity is one forward pass over the pool, LESS costs 1.8 full
trainings of its scorer, BM25 and embeddings are free; the scorer's own fine-tuning is not charged.

What CCDS published for its pool, 4.593e18 (7B), 8.638e18 (13B) and 4.926e19 (70B), is not 6ND of the models'
own parameter counts with any one D: 6.738e9, 13.016e9 and 68.977e9 parameters imply 113.6, 110.6 and 119.0
million tokens. All three follow within 0.05 % from D = 98.0 million and `6N + 12 L h T` a token, which adds
attention (Chowdhery et al. 2022, PaLM, arXiv 2204.02311, appendix B), with T = 4096, Llama-2's context, and
with keys and values of full width, so that N is 6.738e9, 13.016e9 and 78.372e9. CCDS does not say so: this is
what fits its figures. `ccds_parameters` folds it into an N.
"""

from __future__ import annotations

from cads.accounting.architectures import Architecture
from cads.errors import ConfigError

CCDS_TOKENS = 98.0e6
"""D: what the published FLOPs of the pool imply, 362 tokens for each of its 270,679 examples."""
CCDS_CONTEXT = 4096
"""T: the positions to which each token is taken to attend."""

TRAINING, FORWARD = 6, 2
"""FLOPs a parameter and token."""
SELECTION = {
    "random": 0.0,
    "full": 0.0,
    "bm25": 0.0,
    "embedding": 0.0,
    "ppl": FORWARD / TRAINING,
    "less": 1.8,
}
"""What choosing from the whole pool costs, in full trainings of the scorer on it (CCDS's figures)."""


def training_flops(n_parameters: float, n_tokens: float) -> float:
    """C = 6ND: forward and backward over D tokens."""
    return TRAINING * _positive(n_parameters, "n_parameters") * _positive(n_tokens, "n_tokens")


def forward_flops(n_parameters: float, n_tokens: float) -> float:
    """C = 2ND: forward over D tokens."""
    return FORWARD * _positive(n_parameters, "n_parameters") * _positive(n_tokens, "n_tokens")


def selection_flops(method: str, n_parameters: float, n_tokens: float) -> float:
    """What `method` spends to rank a pool of D tokens with a scorer of N parameters.

    Raises:
        ConfigError: for a method that CCDS has no figure for.
    """
    if method not in SELECTION:
        raise ConfigError(
            f"`paper` accounting has no cost for the method {method!r} (it has {', '.join(SELECTION)}): "
            "use `analytic` or `measured`"
        )
    return SELECTION[method] * training_flops(n_parameters, n_tokens)


def ccds_parameters(architecture: Architecture, context: int = CCDS_CONTEXT) -> float:
    """The N with which 6ND gives CCDS's figures: `N + 2 L h T`, with keys and values as wide as queries.

    7.812e9, 14.694e9 and 83.741e9 for Llama-2 7B, 13B and 70B.
    """
    missing_heads = 2 * (architecture.heads - architecture.kv_heads)
    widened = architecture.layers * architecture.hidden * missing_heads * architecture.head_dim
    attention = 2 * architecture.layers * architecture.hidden * _positive(context, "context")
    return sum(architecture.n_parameters.values()) + widened + attention


def _positive(value: float, name: str) -> float:
    if not value > 0:
        raise ConfigError(f"{name} = {value}: it must be positive")
    return value
