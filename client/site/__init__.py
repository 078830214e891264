"""The site as an installation: its folder, service, code gate and preflight."""
