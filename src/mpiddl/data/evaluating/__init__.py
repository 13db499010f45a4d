"""Results of all ranks: predictions, metrics, ensembles."""
