"""`python -m elision.serving` is `elision serve`."""

from elision.serving.cli import main

main()
