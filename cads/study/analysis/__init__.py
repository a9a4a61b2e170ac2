"""Pure functions of the tables: points, frontiers, fits."""
