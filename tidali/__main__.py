"""``python -m tidali``, as torchrun starts it."""

from tidali.cli.main import main

if __name__ == "__main__":
    main()
