"""`python -m gemma_fold`."""

from gemma_fold.cli import main

if __name__ == "__main__":
    main()
