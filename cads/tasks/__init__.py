"""Ready-made tasks, found through the entry-point group `cads.tasks`."""
