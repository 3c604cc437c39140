"""What torch.compile takes as a constant of the graph: what machine there is, found while it traces."""


def compile_time(fn):
    """``torch.compiler.assume_constant_result``, which would import the whole compiler here."""
    fn._dynamo_marked_constant = True
    return fn
