"""`python -m shiftrm`"""

import sys

from shiftrm.cli import main

sys.exit(main())
