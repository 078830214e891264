"""The reading room: a page on the hospital's own machine where radiologists have images judged, look, and accept or correct."""
