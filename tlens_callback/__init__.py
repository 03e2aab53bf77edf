"""Look inside a language model while it is being fine-tuned.

What is public is listed in `__init__.pyi` and imported when it is asked for: the command line
answers at once, where torch and PEFT take seconds.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

__version__ = "0.1.0"
