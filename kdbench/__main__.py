"""`python -m kdbench`, which is also what `accelerate launch -m kdbench` starts."""

from kdbench.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
