"""`python -m fedgen_edge` is `fedgen`."""

from fedgen_edge.cli.main import main

if __name__ == "__main__":
    main()
