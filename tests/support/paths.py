"""Where the tests find what is not theirs."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "experiments" / "configs"
MODELS = CONFIGS / "models"
EXCERPT = Path(__file__).parent / "ccds_points.csv"
"""Some of the published points."""
SHARED = ROOT.parent / "shared" / "data"
"""Real data, which most machines do not have."""
