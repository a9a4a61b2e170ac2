"""What is trained on: pools, batches, streams of positions, and the order in which they are read."""
