"""What the benchmarks share. A script beside this folder says what it measures, and leaves the rest to:

- `shapes`, `suites`: one call's shape; the named shapes, their goals, and a grid of random ones.
- `inputs`: random arrays of a shape.
- `implementations`: ours, `jax.nn`, tokamax, PyTorch or another checkout, by name, compiled for a shape.
- `timing`: interleaved samples, and ratios with an interval.
- `oracle`, `errors`: the tests' float64 attention, and errors against it.
- `memory`, `programs`: what a call reserves or touches; compiled programs and profiles.
- `measure`: all of that for one shape and mode, as a `Case`.
- `options`: command lines. `report`: tables, JSON and plots.
- `processes`: children that compile at the same time and measure in turn.
"""
