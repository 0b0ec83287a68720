"""Naive, readable, any-dtype implementations: the oracles that every backend is compared with."""
