"""Sparse autoencoders: computes, loads and trains them."""

from tlens_callback.sae.autoencoder import Autoencoder as Autoencoder
from tlens_callback.sae.files import load_sae as load_sae
