"""Run the command line from a checkout, without installing: `python cli.py --help`."""

from gemma_fold.cli import main

main()
