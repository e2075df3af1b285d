"""Names that Megatron's annotations mention."""


class FusibleOperation:
    pass


class Sequential:
    pass
