"""What searches over sources share."""
