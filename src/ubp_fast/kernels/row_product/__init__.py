"""Products of matrices in which no row knows the others, and a small network of pairs made of them."""

from ubp_fast.kernels.row_product.api import pair_network, row_product

__all__ = ["pair_network", "row_product"]
