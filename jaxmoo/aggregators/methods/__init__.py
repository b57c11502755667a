"""The methods, one a file: each holds its mathematics and nothing else."""
