"""`python -m hra_fx`: the command line, for systems on which the `hra-fx` script is not on the path."""

from hra_fx.cli import main

if __name__ == "__main__":
    main()
