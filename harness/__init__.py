"""The engine between oracles, kernels and strategies. It knows contracts and subjects, and names no transform."""
