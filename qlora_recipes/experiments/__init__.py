"""Programs of many runs: the benchmark of precisions, and the throughput of training."""
