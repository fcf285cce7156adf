"""What a file of weights may be, before anything of it is read."""

#: dtypes that weights can be stored in, as safetensors names them.
DTYPES = ("F32", "F16", "BF16")
#: Endings of weights that are not safetensors. They are pickles, which run code when they are read.
PICKLES = (".bin", ".pth", ".pt", ".ckpt")
