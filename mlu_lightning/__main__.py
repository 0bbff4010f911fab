"""``python -m mlu_lightning`` is the command ``mlu-lightning``."""

from mlu_lightning.cli import main

if __name__ == "__main__":
    main()
