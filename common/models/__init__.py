"""The networks, their losses, weights and the device they run on."""
