"""The type of what a forward pass is entered in."""

from collections.abc import Callable
from contextlib import AbstractContextManager

Context = Callable[[], AbstractContextManager[object]]
"""Makes what a network's forward pass is entered in, such as autocast; nullcontext where there is nothing."""
