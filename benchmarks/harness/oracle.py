"""The tests' float64 attention, which errors are measured against; the one place that knows where it is."""

import sys
from pathlib import Path

# A script's path begins at benchmarks/.
sys.path.append(str(Path(__file__).parents[2]))

from tests.support.environment import enable_x64
from tests.support.oracle import Masking, allowed_pairs, dense_numpy, float64_oracle

__all__ = ["Masking", "allowed_pairs", "dense_numpy", "enable_x64", "float64_oracle"]
