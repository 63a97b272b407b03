"""Extreme multi-label classification with sparse output layers, in JAX and Flax.

`__init__.pyi` lists the public names. A name is imported at its first use, so that `import sparse_xmc`
does not load JAX.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
