"""Virtual hospitals: how patients are dealt to them, their archives, and their files in a run folder."""
