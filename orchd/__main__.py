"""`python -m orchd` is `orchd`."""

from orchd.cli import main

if __name__ == "__main__":
    main()
