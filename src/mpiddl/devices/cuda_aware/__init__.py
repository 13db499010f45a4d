"""Whether this job's MPI can read GPU memory, which a process that may crash finds out."""
