"""The study: does a* help, and does it minimise what it says? `python -m train study [--quick]`.

A small reasoning model is trained from scratch on a task with verifiable answers, preference pairs
are sampled from it, and the ways of mixing trace and empty-trace gradients are compared on them.
"""
