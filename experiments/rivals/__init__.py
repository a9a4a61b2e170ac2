"""Methods of other packages and papers as selectors: every FLOP of their models comes out of the one budget."""
