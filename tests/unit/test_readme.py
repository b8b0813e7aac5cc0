"""README's examples run as they are pasted, one after the other."""

import re
from pathlib import Path
from typing import Any

import pytest

README = Path(__file__).parents[2] / "README.md"


@pytest.mark.filterwarnings("ignore")
def test_code_blocks_run(capsys: pytest.CaptureFixture[str]):
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(blocks) >= 2
    names: dict[str, Any] = {}
    for block in blocks:
        exec(block, names)
    assert names["out"].shape == names["query"].shape
    assert names["dbias"].shape == names["bias"].shape
    assert "flash_attention on cuda" in capsys.readouterr().out
