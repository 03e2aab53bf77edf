"""Sparse autoencoders: what they compute, reading published ones, training one."""

from tlens_callback.sae.autoencoder import Autoencoder as Autoencoder
from tlens_callback.sae.files import load_sae as load_sae
