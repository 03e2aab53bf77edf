"""One HTML page with everything a store holds: it needs no server, no network, no library."""

from tlens_callback.page.folder import PageFolder as PageFolder
from tlens_callback.page.pack import page as page
