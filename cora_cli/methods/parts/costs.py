"""Arithmetic of computing a start, for time estimates."""


def svd_flops(out: int, inside: int) -> float:
    """Floating-point operations of the SVD of an (out, in) matrix, roughly."""
    return 9.0 * min(out, inside) ** 3
