"""A connection that is measured before it is trusted."""

import logging
from collections.abc import Sequence

from paceline.errors import TransportError
from paceline.kv_transfer.transport import Connection, ReadHandle, ReadOutcome, ReadState

logger = logging.getLogger(__name__)

# Enough for a steady rate: 2 ms over shared memory, 20 ms over 800 MB/s.
PROBE_BYTES = 16 << 20
