"""The user's own training function on a gang: what its ranks see, and what is set up for them."""
