"""The optimizer steps, parameter by parameter, while the next forward runs."""
