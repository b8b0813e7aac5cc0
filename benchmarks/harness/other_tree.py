"""Another checkout of this package beside the installed one, to measure a change: implementation `flash=DIR`."""

import functools
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


@functools.cache
def flash_attention_of(folder: str) -> Callable[..., Any]:
    """`flash_attention` of the package in `folder`, the one that holds its `__init__.py`."""
    start = Path(folder) / "__init__.py"
    name = f"flash_attention_of_{abs(hash(start.resolve()))}"
    spec = importlib.util.spec_from_file_location(name, start, submodule_search_locations=[folder])
    if spec is None or spec.loader is None or not start.exists():
        raise ValueError(f"flash={folder} must name the folder of a package, got no {start}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # the package imports its modules relative to it
    spec.loader.exec_module(module)
    return module.flash_attention
