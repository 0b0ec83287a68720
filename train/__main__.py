"""`python -m train`."""

import sys

try:
    from train.cli import main

    code = main()
except KeyboardInterrupt:  # before `main` could tell what is kept: while modules are imported
    code = 130
sys.exit(code)
