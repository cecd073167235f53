"""What autocast does on CUDA: which operations it runs in the narrow dtype, and which in float32."""

import torch
from pretend_trees import tree_leaves, tree_map

# By torch's documentation of autocast ("CUDA Ops that can autocast to float16", "... to float32", "... promote to the
# widest input type"), those that a transformer's forward may meet.
NARROW = {
    *("__matmul__", "__rmatmul__", "addbmm", "addmm", "addmv", "addr", "baddbmm", "bmm", "chain_matmul", "einsum"),
    *("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "linear", "matmul"),
    *("mm", "mv", "prelu", "scaled_dot_product_attention"),
}
WIDE = {
    *("__pow__", "__rpow__", "acos", "asin", "cosh", "cosine_similarity", "cross_entropy", "cumprod", "cumsum", "dist"),
    *("erfinv", "exp", "expm1", "group_norm", "kl_div", "l1_loss", "layer_norm", "log", "log10", "log1p", "log2"),
    *("log_softmax", "mse_loss", "norm", "normalize", "pow", "prod", "reciprocal", "rsqrt", "sinh", "smooth_l1_loss"),
    *("softmax", "softplus", "sum", "tan"),
}
WIDEST = {"addcdiv", "addcmul", "atan2", "cross", "dot", "grid_sample", "index_put", "scatter_add", "tensordot"}
HALVES = (torch.float16, torch.bfloat16)


def cast_inputs(func, args, kwargs, narrow: torch.dtype):
    """Casts the floating inputs of an operation as autocast on CUDA does.

    Args:
        func: The function of torch that is called.
        args, kwargs: What it is called with.
        narrow: The dtype of autocast.

    Returns:
        args and kwargs.
    """
    name = getattr(func, "__name__", "")
    if name in NARROW:
        wanted = narrow
    elif name in WIDE:
        wanted = torch.float32
    elif name in WIDEST:
        found = {x.dtype for x in tree_leaves((args, kwargs)) if _castable(x)}
        wanted = torch.float32 if torch.float32 in found else narrow
    else:
        return args, kwargs
    if name == "sum" and "dtype" in kwargs:
        return args, kwargs

    def cast(x):
        return x.to(wanted) if _castable(x) and x.dtype != wanted else x

    return tree_map(cast, args), tree_map(cast, kwargs)


def _castable(x) -> bool:
    return isinstance(x, torch.Tensor) and (x.dtype == torch.float32 or x.dtype in HALVES)
