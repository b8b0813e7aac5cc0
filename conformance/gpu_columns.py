"""What the tables for a GPU show: libraries and their implementations, in bfloat16. `gpu.py` runs this file.

    PYTHONPATH=conformance python3 conformance/gpu_columns.py torch_flash causal bias

prints a line of JSON for the library, then one for each meaning. It ends with `BROKEN` where a call left the GPU
unusable to this process. Without a GPU, what runs on a CPU runs there.
"""

import contextlib
import importlib.metadata
import importlib.util
import itertools
import json
import logging
import re
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from probes import Adapter, cell

sys.path.insert(0, str(Path(__file__).parent / "libraries"))

BROKEN = 3
CUDNN = "nvidia-cudnn-cu13"


@dataclass(frozen=True)
class Column:
    name: str
    make: Callable[[], type[Adapter]]  # imports the library
    packages: tuple[str, ...]
    settings: dict[str, Any]
    parts: int = 4  # processes that share the meanings


def ours() -> type[Adapter]:
    from ours import Ours

    return Ours


def jax_nn() -> type[Adapter]:
    from jax_nn import JaxNN

    return JaxNN


def tokamax() -> type[Adapter]:
    if importlib.util.find_spec("xprof") is None:  # imported by tokamax for its benchmarks, which are not run
        stubs = {name: types.ModuleType(name) for name in ("xprof", "xprof.cli", "xprof.cli.tools")}
        vars(stubs["xprof.cli.tools"])["get_kernel_stats_tool"] = None
        sys.modules.update(stubs)
    logging.getLogger("absl").setLevel(logging.ERROR)  # it warns of every call that nobody has tuned
    from tokamax_api import Tokamax

    return Tokamax


def torch_sdpa() -> type[Adapter]:
    """One kernel alone: no other may take the call."""
    import torch
    from frameworks import TorchAdapter, array, tensors
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch_sdpa import SDPA

    TorchAdapter.device = "cuda" if torch.cuda.is_available() else "cpu"

    class OneKernel(SDPA):
        backend: str
        jvp = TorchAdapter.jvp
        second = TorchAdapter.second

        def native(self, *arrays):
            with self.forced():
                return super().native(*arrays)

        def apply(self, *arrays, **options):
            with self.forced():
                return super().apply(*arrays, **options)

        def gradient(self, query, key, value, bias, weights):
            try:
                return super().gradient(query, key, value, bias, weights)
            except RuntimeError as error:  # some kernels keep what it needs only for a gradient of query, key or value
                b, w, *arrays = tensors(bias, weights, query, key, value)
                for x in (b, *arrays):
                    x.requires_grad_()
                (self.apply(*arrays, bias=b) * w).sum().backward()
                note = f"beside gradients of the others; {type(error).__name__} without"
                self.by = dict(self.by) | {"bias_gradient": note}
                return array(b.grad)

        @contextlib.contextmanager
        def forced(self) -> Iterator[None]:
            """PyTorch warns why it does not take a kernel, and its error does not say so: this one does."""
            with warnings.catch_warnings(record=True) as caught, sdpa_kernel(getattr(SDPBackend, self.backend)):
                warnings.simplefilter("always")
                try:
                    yield
                except RuntimeError as error:
                    texts = [re.sub(r"\s*\(Triggered internally.*", "", str(x.message)) for x in caught]
                    start = {"EFFICIENT_ATTENTION": "memory efficient"}.get(self.backend, self.backend.split("_")[0])
                    for head, reason in reversed([*itertools.pairwise(texts)]):
                        if re.match(start + ".* not used because", head, re.IGNORECASE):
                            raise RuntimeError(reason) from error
                    raise

    return OneKernel


def torch_flex() -> type[Adapter]:
    import torch
    from frameworks import TorchAdapter
    from torch.nn.attention.flex_attention import flex_attention
    from torch_flex import Flex

    TorchAdapter.device = "cuda" if torch.cuda.is_available() else "cpu"

    class Compiled(Flex):
        def function(self, *arrays, **options):
            torch._dynamo.reset()  # else it stops to compile after some calls
            return torch.compile(flex_attention, fullgraph=True, dynamic=False)(*arrays, **options)

    return Compiled


def _jax(prefix: str, make: Callable[[], type[Adapter]], packages: tuple[str, ...], *names: str) -> dict[str, Column]:
    columns = {}
    for name in names:
        found = (*packages, "jax", *([CUDNN] if name.startswith("cudnn") else []))
        settings = {"implementation": name}
        columns[f"{prefix}_{name}"] = Column(f"{prefix.replace('_', '.')} ({name})", make, found, settings)
    return columns


COLUMNS = {
    "torch_flex": Column("FlexAttention (compiled)", torch_flex, ("torch", "triton"), {}, parts=6),
    **_jax("here", ours, (), "mosaic_gpu", "pure_jax", "cudnn_gpu"),
    **_jax("jax_nn", jax_nn, (), "cudnn", "xla"),
    **_jax("tokamax", tokamax, ("tokamax",), "mosaic_gpu", "triton", "cudnn"),
    **{
        f"torch_{kernel.lower()}": Column(
            f"torch SDPA ({kernel})",
            torch_sdpa,
            ("torch", *([CUDNN] if kernel.startswith("CUDNN") else [])),
            {"backend": kernel},
            parts=1,
        )
        for kernel in ("FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION", "MATH")
    },
}


def adapter(column: Column) -> Adapter:
    """With lengths and a head dimension that all kernels take."""
    import ml_dtypes

    settings = {"dtype": ml_dtypes.bfloat16, "lengths": (16, 32), "head_dim": 64, "name": column.name}
    return type(column.name, (column.make(),), settings | column.settings)()


def check(a: Adapter) -> None:
    """Raises where the GPU is of no use to this process any more."""
    from frameworks import JaxAdapter, tensors

    if isinstance(a, JaxAdapter):
        import jax

        jax.block_until_ready(jax.numpy.ones(8) + 1)
    else:
        tensors(np.ones(8))[0].sum().item()


def say(**line: Any) -> None:
    print("\n" + json.dumps(line), flush=True)


def main() -> int:
    column = COLUMNS[sys.argv[1]]
    a = adapter(column)
    say(name=column.name, versions={name: importlib.metadata.version(name) for name in column.packages})
    for key in sys.argv[2:]:
        text, message = cell(a, key)
        say(key=key, cell=text, message=message)
        try:
            check(a)
        except Exception:
            return BROKEN
    return 0


if __name__ == "__main__":
    sys.exit(main())
