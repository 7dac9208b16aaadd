"""The kernels of the residual tail. Tensors in, tensors out: no autograd, no modules."""
