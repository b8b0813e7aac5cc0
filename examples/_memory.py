"""Memory of this process, for the examples: how much it has used, and how to allow it no more."""

import sys


def peak_memory_gib() -> float:
    """The most memory that this process has had resident, in GiB."""
    try:
        import resource
    except ImportError:  # Windows
        import psutil

        return psutil.Process().memory_info().peak_wset / 2**30  # pyright: ignore[reportAttributeAccessIssue]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 2**30


def limit_memory(gib: float) -> None:
    """Has the operating system refuse this process more memory. Only Linux counts what JAX allocates.

    Raises:
      NotImplementedError: this is not Linux.
    """
    if sys.platform != "linux":
        raise NotImplementedError(f"memory can be limited on Linux only, and this is {sys.platform}")
    import resource

    limit = int(gib * 2**30)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
