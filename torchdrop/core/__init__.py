"""The parts that every layer is made of, one idea in each file.

rate          how a keep probability is given, checked, held, and turned into the parameters of a mask
sites         a layer's verbs: whether this call drops, apply a mask, a keep mask, random bits, random variates
checks        arguments that are refused, with the same words everywhere
shard         masks of tensors that are parts of larger ones
symbolic, exported, portable   graphs of torch.fx, torch.export, torch.jit.trace and ONNX
names         patterns over the names in a model
torch_state   the state of PyTorch; it and torch_inductor are the only places that name its private parts
"""
