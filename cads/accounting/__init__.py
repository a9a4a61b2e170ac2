"""Costs in FLOPs, budgets, and the ledger of what is spent."""
