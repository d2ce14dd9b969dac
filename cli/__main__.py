"""`python -m wanvideo_infinitetalk.cli`: the command `infinitetalk`."""

import sys

from .parser import main

sys.exit(main())
