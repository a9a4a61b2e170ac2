"""The rows or images that a Selection chose, written to a file."""
