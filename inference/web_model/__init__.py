"""A finished model as a page that any browser runs by itself: on a phone, without a network, from a folder."""
