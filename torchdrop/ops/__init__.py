"""The registered operators, each a function of tensors and a key.

operators     masked and gaussian, which `apply` runs
fused         dropout together with an addition or an activation
random_bits   masks, random bits and normal variates themselves
arguments     the checks that implementations and fakes share
fast_path     the same for contiguous tensors in eager mode, with fewer calls of Python
"""
