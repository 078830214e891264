"""The real thing: coordinator and hospitals as separate processes with separate folders, over TLS, through the door."""
