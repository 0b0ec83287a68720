"""Preference losses on segment scores, and their BVPO mixture."""
