"""`python -m inferenceguard`: the command line where its script is not on the path."""

from inferenceguard.cli.app import main

if __name__ == "__main__":
    main()
