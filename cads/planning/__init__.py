"""What a selector would cost, before anything is spent."""
