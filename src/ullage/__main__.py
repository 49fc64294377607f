"""`python -m ullage` is the command `ullage`."""

from ullage_cli import main

if __name__ == "__main__":
    main()
