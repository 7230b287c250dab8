"""Handlers see a model's random calls and decide how each is served, after the handlers of Pyro and numpyro.

base               the function mode that all handlers are
tracker, calls     which module runs; one random call, described
random_functions, random_tensors   the functions of torch and torchdrop that draw, and how each is described and served
trace, substitute, disable         record each call; give it a mask of its own; leave it out
freeze             every forward from one state of PyTorch's generators: `frozen_masks`
masks, prefix, sources             masks by sample and row; calls that run once for all samples; a call's description
"""
