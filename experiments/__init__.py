"""Scripts and configurations of the benchmarks; results and the commands that made them in results/."""
