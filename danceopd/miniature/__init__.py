"""A small FLUX.2 klein pipeline that is really trained, and the world of pictures that it shows."""
