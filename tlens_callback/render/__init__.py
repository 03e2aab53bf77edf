"""Draws readings as pictures, figures and tables, without any logging package; sinks use these."""

from tlens_callback.render.lines import is_curve as is_curve
from tlens_callback.render.lines import line_figure as line_figure
from tlens_callback.render.matrices import score_figure as score_figure
from tlens_callback.render.mosaic import is_mosaic as is_mosaic
from tlens_callback.render.mosaic import mosaic as mosaic
from tlens_callback.render.score_panels import is_matrix as is_matrix
from tlens_callback.render.table import axis_table as axis_table
from tlens_callback.render.table import is_ranked as is_ranked
from tlens_callback.render.table import neuron_table as neuron_table
from tlens_callback.store.tables import long_frame as long_frame
