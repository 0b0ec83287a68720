"""`python -m train evaluate`: a model's answers as the field's benchmarks read them, and scores."""
