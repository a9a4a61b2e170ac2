"""The inner loop: training within a budget."""
