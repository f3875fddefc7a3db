"""``python -m adapterkern``, which is also what ``torchrun -m adapterkern`` starts."""

import sys

from adapterkern.cli import main

sys.exit(main())
