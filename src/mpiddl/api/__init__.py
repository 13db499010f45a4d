"""The collectives as users call them."""
