"""A stand-in for Transformer Engine on a CPU: the constructors, parameter names, attributes and
collectives that Megatron-core 0.16.1 and 0.19.2 meet (after Transformer Engine 2.6 to 2.20), in
plain torch.

It multiplies in the tensors' own type. What FP8 changes around the products is here: the recipe
that a linear layer runs under, the number of rows it gets, weights that are kept from the first
micro-batch on, the extra state of a checkpoint. `fp8.PRODUCTS` records every product.
"""

from . import common, pytorch

# From 2.7 on, Megatron asks for modules of mixtures of experts.
__version__ = "2.6.0"

__all__ = ["common", "pytorch"]
