"""Prompts that are shown to the model, and the same as tensors."""

from tlens_callback.probes.batch import ProbeBatch as ProbeBatch
from tlens_callback.probes.encoding import own_tokenizer as own_tokenizer
from tlens_callback.probes.encoding import special_ids as special_ids
from tlens_callback.probes.encoding import token_ids as token_ids
from tlens_callback.probes.file import read_probes as read_probes
from tlens_callback.probes.probe import Probe as Probe
from tlens_callback.probes.shown import encoded_lines as encoded_lines
