"""``python -m llmrec``: the same as the console command ``llmrec``."""

from llmrec.cli import console

if __name__ == "__main__":
    console()
