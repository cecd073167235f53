"""Tells torch of the pretend card before any test has made a backward, in whatever order they run."""

import pretend_card

pretend_card.register()
