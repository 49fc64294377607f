"""`python -m ullage.cli`."""

from ullage_cli import main

main()
