"""The methods by the name that a configuration gives them."""

from danceopd.methods.danceopd import danceopd_loss

METHODS = {"danceopd": danceopd_loss}
