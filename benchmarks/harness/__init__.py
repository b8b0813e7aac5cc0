"""What the benchmarks share: shapes, inputs, implementations, timing, errors, memory, command lines and reports."""
