"""Rankings file by file: what is done once, what for each file."""
