"""`python -m sparsectrl_lcm`: the command line."""

from .cli import main

main()
