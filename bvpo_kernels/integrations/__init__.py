"""The kernels inside other people's models and trainers; each module imports what it serves."""
