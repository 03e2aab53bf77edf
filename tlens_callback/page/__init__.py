"""Makes one HTML page with everything in a store. It needs no server, network or library."""

from tlens_callback.page.folder import PageFolder as PageFolder
from tlens_callback.page.pack import page as page
