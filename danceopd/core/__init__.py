"""The paper's update: route, roll out, query, match. It knows torch and the kernels, nothing else."""
