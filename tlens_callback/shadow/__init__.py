"""The hooked copy of a live model: it reads the live model and never writes to it."""

from tlens_callback.shadow.fidelity import Fidelity as Fidelity
from tlens_callback.shadow.fidelity import FidelityError as FidelityError
from tlens_callback.shadow.shadow import Shadow as Shadow
from tlens_callback.shadow.stacks import Stack as Stack
from tlens_callback.shadow.stacks import Taken as Taken
from tlens_callback.shadow.taps import LAST_LOGITS as LAST_LOGITS
from tlens_callback.shadow.taps import Reduce as Reduce
from tlens_callback.shadow.taps import Taps as Taps
from tlens_callback.shadow.unembed import Unembedded as Unembedded
