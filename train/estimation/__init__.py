"""Memory and FLOPs of a step, from a model's configuration alone."""
