"""Other people's kernels on the inputs of ours: the LM head, one pair's DPO, statistics, a step."""
