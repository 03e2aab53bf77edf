"""The hooked copy of a live model: it reads the live model and never writes to it."""

from tlens_callback.shadow.fidelity import Fidelity as Fidelity
from tlens_callback.shadow.fidelity import FidelityError as FidelityError
from tlens_callback.shadow.shadow import Shadow as Shadow
from tlens_callback.shadow.taps import LAST_LOGITS as LAST_LOGITS
from tlens_callback.shadow.taps import Reduce as Reduce
from tlens_callback.shadow.taps import Taken as Taken
