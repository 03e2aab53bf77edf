"""Readings as pictures and tables. Knows no logging package: a sink takes what is made here."""

from tlens_callback.render.matrices import is_matrix as is_matrix
from tlens_callback.render.matrices import score_figure as score_figure
from tlens_callback.render.mosaic import is_mosaic as is_mosaic
from tlens_callback.render.mosaic import mosaic as mosaic
from tlens_callback.render.table import long_frame as long_frame
from tlens_callback.render.table import neuron_table as neuron_table
