"""`python -m nixbox`."""

from nixbox.cli import main

main()
