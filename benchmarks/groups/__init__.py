"""One module per benchmark group; each defines GROUP."""
