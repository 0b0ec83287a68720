"""Pairs of token ids -> one packed row, and back."""
