"""python -m stages.together COMMAND ..."""

import sys

from stages.together.server import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
