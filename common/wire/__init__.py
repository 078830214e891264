"""What travels between coordinator and sites: messages, the layout of the weights, their encoding, keys."""
