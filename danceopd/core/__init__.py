"""The paper's update: route, roll out, query, match; it imports torch and the kernels alone."""
