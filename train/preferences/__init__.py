"""From prompts to preference pairs: sample, judge, rank; every stage before training."""
