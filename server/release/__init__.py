"""The release gate: a new model goes out only if no site and no held-out set shows, or may hide, that it is worse than the old one."""
