"""Generated calls, every argument at once, against the float64 oracle.

`python -m tests.run_generated` runs many more of them.
"""

import pytest
from hypothesis import given, settings

from tests.cases import DTYPES, Case, cases, check_case


@pytest.mark.parametrize("dtype", DTYPES)
def test_generated_calls_are_as_accurate_as_dense_attention(dtype: str):
    @settings(max_examples=6)
    @given(cases((dtype,)))
    def check(case: Case):
        check_case(case)

    check()
