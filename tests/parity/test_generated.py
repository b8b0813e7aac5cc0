"""Generated calls, every argument at once, against the float64 oracle.

`python -m tests.parity.run_generated` runs many more of them.
"""

import pytest
from hypothesis import given, settings

from tests.support.cases import DTYPES, FAST_COMPILATION, Case, cases, check_case
from tests.support.environment import full_optimization


@pytest.mark.parametrize("dtype", DTYPES)
def test_generated_calls_are_as_accurate_as_dense_attention(dtype: str):
    @settings(max_examples=2 if dtype == "float32" else 3)
    @given(cases((dtype,)))
    def check(case: Case):
        # float32 as XLA compiles for users; the others in half the time.
        check_case(case, compiler_options=full_optimization() if dtype == "float32" else FAST_COMPILATION)

    check()
