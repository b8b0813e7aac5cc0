"""Kernels for TPUs, on Pallas' Mosaic TPU backend. A module may import those of the rows above its own.

| module | what |
|---|---|
| `pallas.py` | the import of Pallas; a launch; products, and vectors in registers |
| `blocks.py` | tile shapes, one table per chip generation |
| `host/ranges.py` | which tiles are visited, and which of these need no mask: XLA finds it before a kernel |
| `host/operands.py` | arrays as kernels read them, by name, and the block of each that a step gets |
| `device/visits.py` | the loop over tiles of one step |
| `device/logits.py` | logits of a tile, mask and dropout |
| `device/forward.py`, `dquery.py`, `dkey_dvalue.py`, `dbias.py` | one kernel each |
| `family.py`, `cotangent.py` | from a call to the forward, and to the backward kernels |
| `support.py` | the family itself: what it supports, and where. It does not import Pallas |

Code in `host/` runs before a kernel, under XLA. Code in `device/` runs inside it.
"""
