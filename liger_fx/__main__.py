"""python -m liger_fx: the same command as liger-fx."""

from liger_fx.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
