"""What the coordinator's live page and the hospital's reading room share: sessions, and the headers that keep a page to itself."""
