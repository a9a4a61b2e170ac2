"""Fine-tuning causal language models."""
