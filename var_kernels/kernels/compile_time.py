"""Constants of a compiled graph: facts about the machine, found while torch.compile traces."""


def compile_time(fn):
    """``torch.compiler.assume_constant_result``, which would import the whole compiler here."""
    fn._dynamo_marked_constant = True
    return fn
