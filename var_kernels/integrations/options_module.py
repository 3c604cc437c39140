"""The base of modules whose constructor only takes options: those of the libraries whose calls this one takes."""

from torch import nn


class OptionsModule(nn.Module):
    """To be decorated with ``@dataclass(eq=False, repr=False)``: the fields are the constructor's arguments."""

    def __new__(cls, *_args, **_kwargs):
        module = super().__new__(cls)
        nn.Module.__init__(module)  # before the first attribute is set
        return module
