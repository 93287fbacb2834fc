"""`python -m elision.cli` is the console script."""

from elision.cli import main

if __name__ == "__main__":
    main()
