"""`python -m ullage_cli`."""

from ullage_cli import main

main()
