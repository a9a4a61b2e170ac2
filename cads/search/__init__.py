"""What searches share: allowance, fidelities, inner runs, search spaces."""
