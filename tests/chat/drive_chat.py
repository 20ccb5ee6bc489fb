"""``llmrec chat`` in a process that a test may kill: the command line as given."""

import sys

from llmrec.chat.command import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
