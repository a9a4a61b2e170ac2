"""CADS as it trains: one run, one budget, and probabilities that move while the model trains."""
