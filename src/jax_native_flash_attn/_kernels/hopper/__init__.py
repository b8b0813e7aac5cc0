"""Kernels for Hopper GPUs, on Pallas' Mosaic GPU backend. A module may import those of the rows above its own.

| module | what |
|---|---|
| `pallas.py` | the import of Pallas, and what differs between its versions; layouts of shared memory |
| `formula*.py` | functions of scores and indices as lists of operations; no Pallas |
| `operands.py` | what kernels read, by name, as arrays and as references |
| `blocks.py`, `scheduler.py` | block shapes; which block of threads computes what |
| `host/operands.py`, `intervals.py`, `mods.py`, `tile_classes.py`, `backward.py` | what XLA computes before a kernel |
| `host/*_plan.py` | of each kernel: results, shared memory, choices |
| `device/transfers.py`, `masks.py`, `mods.py`, `logits.py`, `changes.py`, `backward.py` | what kernels share inside |
| `device/forward*.py`, `dquery*.py`, `dkey_dvalue*.py`, `dbias.py` | one kernel each; `*_context.py` is its state |
| `forward.py`, `backward.py` | launches |
| `family.py`, `cotangent.py` | from the operands of a call to a launch |
"""
