from __future__ import annotations

import os

os.environ.setdefault("KINETO_LOG_LEVEL", "99")
