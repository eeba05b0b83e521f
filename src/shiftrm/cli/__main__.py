"""`python -m shiftrm.cli`"""

import sys

from shiftrm.cli import main

sys.exit(main())
