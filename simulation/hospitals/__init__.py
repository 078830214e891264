"""Virtual hospitals: how patients are divided and which scanners they have."""
