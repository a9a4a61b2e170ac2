"""What things cost, in FLOPs, and the ledger that charges for them."""
