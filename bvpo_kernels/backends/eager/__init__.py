"""Tiled schedules in plain torch: no compiler needed, any device, bounded workspace."""
