"""Cost-aware studies: grids of runs at equal total FLOPs, and the analysis of which method pays where."""
