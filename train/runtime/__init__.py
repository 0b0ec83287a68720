"""What a run runs in: ranks, signals, files, profiles, the report."""
